"""One decoder layer: attention with rope before the query/key norm, then shared and routed experts (spec section 2).

Parameter names are the published ones below ``model.layers.{i}.``. Masks, positions and caches come from outside.
"""

import torch
from torch import nn
from torch.nn import functional as F

from ...kernels.reference import swiglu
from ...kernels.token_attention import token_attention
from ..config import BackboneConfig
from .adapted import AdaptedLinear, Experts
from .cache import KVCache
from .mask import CanvasSight, UpToSlot
from .rope import rotate


def rms_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) in fp32, rounded to the dtype of x: the reference rounds before it multiplies by the weight."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)


class RMSNorm(nn.Module):
    """``rms_norm`` times a weight. The weight generator's norm too, with another eps."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.eps) * self.weight


class Attention(nn.Module):
    """Grouped-query attention; qkv_proj's rows come group by group: the group's queries, its key, its value."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.kv_heads, self.head_dim = config.num_key_value_heads, config.attention_head_dim
        self.group = config.num_attention_heads // self.kv_heads
        self.qkv_proj = AdaptedLinear(config.hidden_size, (self.group + 2) * self.kv_heads * self.head_dim)
        self.o_proj = AdaptedLinear(self.group * self.kv_heads * self.head_dim, config.hidden_size)
        self.query_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.key_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self,
        x_BLD: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | CanvasSight | UpToSlot | None,
        cache: KVCache | None = None,
        layer: int = 0,
        positions_L: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend from x to itself, or, with a cache, to everything in it after x's keys and values are written there.

        rope: cos and sin (L, Q) of x's tokens. mask: (L, keys), bool with True = may attend, or ``as_numbers``; None: attend to
        all; a canvas's or a single token's sight.
        """
        rows, length, _ = x_BLD.shape
        heads = self.qkv_proj(x_BLD).view(rows, length, self.kv_heads, self.group + 2, self.head_dim)
        # Queries and key of every group at once: rotated, then normalised, each with its own weight.
        turned = rotate(heads[..., :-1, :], *(part_LQ[:, None, None] for part_LQ in rope))
        turned = rms_norm(turned, self.query_layernorm.eps)
        q_BHLQ = (turned[..., :-1, :] * self.query_layernorm.weight).flatten(2, 3).transpose(1, 2)
        k_BHLQ = (turned[..., -1, :] * self.key_layernorm.weight).transpose(1, 2)
        v_BHLQ = heads[..., -1, :].transpose(1, 2)
        del turned, heads
        if cache is not None:
            k_BHLQ, v_BHLQ = cache.write(layer, k_BHLQ, v_BHLQ, positions_L)
        return self.o_proj(attend(q_BHLQ, k_BHLQ, v_BHLQ, mask).reshape(rows, length, -1))


def attend(
    q_BHLQ: torch.Tensor, k_BHLQ: torch.Tensor, v_BHLQ: torch.Tensor, mask: torch.Tensor | CanvasSight | UpToSlot | None
) -> torch.Tensor:
    """Attention of grouped heads, (B, H, L, Q) to (B, L, H, Q); the picture of a canvas is attended from without any mask."""
    if isinstance(mask, UpToSlot):
        return token_attention(q_BHLQ, k_BHLQ, v_BHLQ, mask.last_L).transpose(1, 2)
    grouped = q_BHLQ.shape[1] != k_BHLQ.shape[1]
    if not isinstance(mask, CanvasSight):
        if grouped and mask is not None and q_BHLQ.is_cuda:
            # No fused kernel takes both a mask and grouped heads, and the plain one makes all scores at once.
            group = q_BHLQ.shape[1] // k_BHLQ.shape[1]
            k_BHLQ, v_BHLQ = k_BHLQ.repeat_interleave(group, dim=1), v_BHLQ.repeat_interleave(group, dim=1)
            grouped = False
        return F.scaled_dot_product_attention(q_BHLQ, k_BHLQ, v_BHLQ, attn_mask=mask, enable_gqa=grouped).transpose(1, 2)
    special, seen = mask.causal_SK.shape
    first = F.scaled_dot_product_attention(
        q_BHLQ[:, :, :special], k_BHLQ[:, :, :seen], v_BHLQ[:, :, :seen], attn_mask=mask.causal_SK, enable_gqa=grouped)
    rest = F.scaled_dot_product_attention(
        q_BHLQ[:, :, special:], k_BHLQ[:, :, : mask.keys], v_BHLQ[:, :, : mask.keys], enable_gqa=grouped)
    return torch.cat((first.transpose(1, 2), rest.transpose(1, 2)), dim=1)


class MLP(nn.Module):
    """Gate and up, SwiGLU, down."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_and_up_proj = AdaptedLinear(width, 2 * inner)
        self.down_proj = AdaptedLinear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(swiglu(self.gate_and_up_proj(x)))


class Router(nn.Module):
    """Chooses each token's experts; its weight is fp32 whatever the checkpoint's dtype (spec section 1).

    ``counts_E``, int64 on the router's device: what it chooses is added there, by whoever records it (``lora/routing.py``).
    """

    def __init__(self, width: int, experts: int, top_k: int):
        super().__init__()
        self.wg = nn.Linear(width, experts, bias=False, dtype=torch.float32)
        self.wg.weight.requires_grad_(False)
        self.top_k = top_k
        self.counts_E: torch.Tensor | None = None

    def forward(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, D) -> chosen experts (T, K) int64 and their weights (T, K) fp32, which sum to 1."""
        # The published pipeline computes them in the dtype of x, and which expert wins hangs on that rounding.
        score_TE = F.linear(x_TD, self.wg.weight.to(x_TD.dtype)).float()
        # The softmax over all, divided by its sum over the chosen, is the softmax over the chosen.
        score_TK, expert_TK = score_TE.topk(self.top_k, dim=-1)
        if self.counts_E is not None:
            # Not bincount: on a GPU it waits for the largest number.
            self.counts_E.index_add_(0, expert_TK.reshape(-1), self.counts_E.new_ones(()).expand(expert_TK.numel()))
        return expert_TK, score_TK.softmax(dim=-1)


class MixtureOfExperts(nn.Module):
    """Shared MLP plus the routed experts. No capacity: every token reaches all of its experts."""

    def __init__(self, config: BackboneConfig, layer: int):
        super().__init__()
        self.gate = Router(config.hidden_size, config.num_experts, config.moe_topk[layer])
        self.shared_mlp = MLP(config.hidden_size, config.moe_intermediate_size[layer] * config.num_shared_expert[layer])
        self.experts = Experts(config.num_experts, config.hidden_size, config.moe_intermediate_size[layer])

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
        return self.shared_mlp(x_BLD) + self.experts(x_BLD, *self.gate(x_TD))


class DecoderLayer(nn.Module):
    """Pre-norm: h += attention(norm(h)); h += mlp(norm(h))."""

    def __init__(self, config: BackboneConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        dense = layer < config.moe_layer_num_skipped
        self.mlp = MLP(config.hidden_size, config.intermediate_size) if dense else MixtureOfExperts(config, layer)

    def forward(self, hidden_BLD, rope, mask, cache=None, layer=0, positions_L=None) -> torch.Tensor:
        """(B, L, D) -> (B, L, D); the other arguments as in Attention.forward."""
        hidden_BLD = hidden_BLD + self.self_attn(
            self.input_layernorm(hidden_BLD), rope, mask, cache, layer, positions_L)
        return hidden_BLD + self.mlp(self.post_attention_layernorm(hidden_BLD))
