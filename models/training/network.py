"""The small backbone as a batched, differentiable forward.

Owns the decoder layers for training; embedders, towers and norms are the core's own modules. All samples of a batch share
one layout (grid and text length), so positions and masks have no batch axis. What it computes is what
``hywu_core/backbone`` computes: ``evaluate.py`` compares the two. Experts are evaluated densely with zero gates, which is
faster at this size. LoRAs have no place here: the core applies them, and the generator is taught without painting.
"""

import torch
from comfyui_hywu.hywu_core.backbone.embedders import FinalLayer, NumberEmbedder, PatchEmbed
from comfyui_hywu.hywu_core.backbone.layer import RMSNorm
from comfyui_hywu.hywu_core.backbone.rope import rotate, table
from comfyui_hywu.hywu_core.config import BackboneConfig
from comfyui_hywu.hywu_core.vision.vit import Aligner, VisionTower
from layout import Layout
from torch import nn
from torch.nn import functional as F


class Layer(nn.Module):
    """One decoder layer; attribute names follow the published ones, with experts stacked."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        d, self.q, self.kv = config.hidden_size, config.attention_head_dim, config.num_key_value_heads
        self.group = config.num_attention_heads // self.kv
        f, e = config.moe_intermediate_size[0], config.num_experts
        self.top_k = config.moe_topk[0]
        self.input_layernorm = RMSNorm(d, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(d, config.rms_norm_eps)
        self.query_layernorm = RMSNorm(self.q, config.rms_norm_eps)
        self.key_layernorm = RMSNorm(self.q, config.rms_norm_eps)
        self.qkv_proj = nn.Parameter(torch.randn((self.group + 2) * self.kv * self.q, d) * d**-0.5)
        self.o_proj = nn.Parameter(torch.randn(d, self.group * self.kv * self.q) * 0.3 * d**-0.5)
        self.wg = nn.Parameter(torch.randn(e, d) * d**-0.5)
        self.shared_in = nn.Parameter(torch.randn(2 * f, d) * d**-0.5)
        self.shared_out = nn.Parameter(torch.randn(d, f) * 0.3 * f**-0.5)
        self.experts_in = nn.Parameter(torch.randn(e, 2 * f, d) * d**-0.5)
        self.experts_out = nn.Parameter(torch.randn(e, d, f) * 0.3 * f**-0.5)

    def heads(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]):
        """Normed input -> q (B, H, L, Q), k and v (B, KV, L, Q), rotated and normed."""
        qkv = F.linear(x, self.qkv_proj).unflatten(-1, (self.kv, self.group + 2, self.q))
        q, k, v = qkv.split((self.group, 1, 1), dim=3)
        q = self.query_layernorm(rotate(q.flatten(2, 3).transpose(1, 2), *rope))
        k = self.key_layernorm(rotate(k.squeeze(3).transpose(1, 2), *rope))
        return q, k, v.squeeze(3).transpose(1, 2)

    def finish(self, h: torch.Tensor, attended: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Residual stream and attention output (B, H, L, Q) -> new stream and the load-balance term of the router."""
        h = h + F.linear(attended.transpose(1, 2).flatten(2), self.o_proj)
        x = self.post_attention_layernorm(h)
        share = F.linear(x.float(), self.wg.float()).softmax(-1)
        top, chosen = share.topk(self.top_k, -1)
        gates = torch.zeros_like(share).scatter(-1, chosen, top / top.sum(-1, keepdim=True)).to(x.dtype)
        up, gate = F.linear(x, self.shared_in).chunk(2, -1)
        out = F.linear(up * F.silu(gate), self.shared_out)
        count, double = self.experts_in.shape[:2]
        inner = F.linear(x, self.experts_in.flatten(0, 1)).unflatten(-1, (count, double))
        up, gate = inner.chunk(2, -1)
        weighted = up * F.silu(gate) * gates.unsqueeze(-1)  # (B, L, E, F)
        out = out + F.linear(weighted.flatten(2), self.experts_out.permute(1, 0, 2).flatten(1))
        balance = (share.mean((0, 1)) * (gates > 0).float().mean((0, 1))).sum() * count / self.top_k
        return h + out, balance


class Backbone(nn.Module):
    """Embedders, layers and heads under their published names (``layers`` excepted, see ``export.py``)."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.config = config
        d, z, inner = config.hidden_size, config.vae.latent_channels, config.patch_embed_hidden_dim
        self.wte = nn.Embedding(config.vocab_size, d)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.ln_f = RMSNorm(d, config.rms_norm_eps)
        self.lm_head = nn.Linear(d, config.vocab_size, bias=False)
        for name in ("timestep_emb", "time_embed", "time_embed_2", "guidance_emb"):
            self.add_module(name, NumberEmbedder(d))
        self.patch_embed = PatchEmbed(z, inner, d)
        self.final_layer = FinalLayer(d, inner, z)
        self.vision_model = VisionTower(config)
        self.vision_aligner = Aligner(config)

    def rope(self, positions_L2: torch.Tensor):
        return table(positions_L2, self.config.attention_head_dim, self.config.rope_theta)

    def embed_prefix(
        self,
        ids: torch.Tensor,
        layout: Layout,
        source: torch.Tensor,
        patches: torch.Tensor,
        patch_mask: torch.Tensor,
        patch_grids: list[tuple[int, int]],
    ) -> torch.Tensor:
        """ids (B, S), source latents (B, z, h, w) -> (B, S, D)."""
        h = self.wte(ids)
        if layout.vae is None:
            return h
        zero = torch.zeros(len(ids))
        vit = self.vision_aligner(self.vision_model(patches, patch_mask, patch_grids))
        parts = {
            layout.vae[0]: self.patch_embed(source, self.time_embed(zero)),
            layout.vit[0]: vit,
            layout.cond_timestep: self.timestep_emb(zero).unsqueeze(1),
        }
        pieces, done = [], 0
        for start in sorted(parts):
            pieces += [h[:, done:start], parts[start].to(h.dtype)]
            done = start + parts[start].shape[1]
        return torch.cat([*pieces, h[:, done:]], 1)

    def embed_painted(
        self, x_t: torch.Tensor, t: torch.Tensor, guidance: torch.Tensor, ratio_ids: torch.Tensor
    ) -> torch.Tensor:
        """The painted part from its ``<img_ratio>`` on: ratio, timestep, guidance, latent tokens (B, 3 + hw, D)."""
        tokens = self.patch_embed(x_t, self.time_embed(1000 * t))
        head = torch.stack((self.wte(ratio_ids), self.timestep_emb(1000 * t), self.guidance_emb(1000 * guidance)), 1)
        return torch.cat((head, tokens), 1)

    def run_prefix(self, h: torch.Tensor, layout: Layout):
        """Prefix (B, S, D) -> last hidden states, keys and values of every layer, load balance."""
        rope = self.rope(layout.prefix_positions)
        kept, balance = [], 0.0
        for layer in self.layers:
            q, k, v = layer.heads(layer.input_layernorm(h), rope)
            h, share = layer.finish(h, F.scaled_dot_product_attention(q, k, v, attn_mask=layout.prefix_mask, enable_gqa=True))
            kept.append((k, v))
            balance = balance + share
        return h, kept, balance

    def run_painted(self, h: torch.Tensor, kept: list, layout: Layout, watch: int):
        """Painted part (B, 3 + hw, D) over the prefix's keys -> last hidden states of its latent tokens.

        watch: the layer whose attention (B, H, hw, keys) of the latent tokens is returned too.
        """
        rope, watched = self.rope(layout.painted_positions), None
        for index, layer in enumerate(self.layers):
            q, k, v = layer.heads(layer.input_layernorm(h), rope)
            k, v = torch.cat((kept[index][0], k), 2), torch.cat((kept[index][1], v), 2)
            if watch == index:
                logits = (q @ k.repeat_interleave(layer.group, 1).transpose(2, 3)) * layer.q**-0.5
                watched = logits.masked_fill(~layout.painted_mask, -1e9).softmax(-1)[:, :, 3:]
            h, _ = layer.finish(h, F.scaled_dot_product_attention(q, k, v, attn_mask=layout.painted_mask, enable_gqa=True))
        return h[:, 3:], watched

    def velocity(self, tokens: torch.Tensor, t: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Latent tokens (B, hw, D) -> velocity (B, z, h, w)."""
        return self.final_layer(tokens, self.time_embed_2(1000 * t), grid)

    def words(self, h: torch.Tensor) -> torch.Tensor:
        """Hidden states -> logits over the vocabulary."""
        return self.lm_head(self.ln_f(h)).float()
