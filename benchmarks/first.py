"""A first implementation of a decoder layer and of thinking, from spec sections 2 and 3: what ``step.py`` compares with.

One projection after the other, a loop over the experts that any token chose, keys repeated for grouped heads, attention under a
mask, a cache that thinking grows by ``torch.cat``, scores for all rows of the prompt, ``generator.straightforward``, and the
VAE's convolutions with all of their weights. Its LoRA has the scale folded into B, as ours has, which spares it a product.
Owns also the random backbone and LoRA that both ways are run on, and switching between them (``armed``); measures nothing.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
from torch.nn import functional as F

from ..hywu_core import think as thinking_module
from ..hywu_core.backbone import inputs
from ..hywu_core.backbone.adapted import AdaptedLinear, Experts
from ..hywu_core.backbone.layer import DecoderLayer
from ..hywu_core.backbone.model import Backbone, build_backbone
from ..hywu_core.config import BackboneConfig
from ..hywu_core.generator.model import ParameterGenerator
from ..hywu_core.text.template import Sequence
from ..hywu_core.think import Continuation
from ..hywu_core.training.recipe import Sizes
from ..hywu_core.vision.vae_blocks import Conv3
from ..kernels.reference import Adapter
from . import generator as generator_benchmark
from .moe_lora import RANK, SCALE


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def turned(x_BHLQ: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    wide = x_BHLQ.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * rope[0] + torch.cat((-second, first), dim=-1) * rope[1]).to(x_BHLQ.dtype)


def project(x: torch.Tensor, weight: torch.Tensor, adapter: Adapter | None, expert: int | None = None) -> torch.Tensor:
    """``W x + B (A x)``, of one expert where it is given."""
    y = x @ (weight if expert is None else weight[expert]).mT
    if adapter is None:
        return y
    a, b = (adapter.a, adapter.b) if expert is None else (adapter.a[expert], adapter.b[expert])
    return y + (x @ a.mT) @ b.mT


def linear(module: AdaptedLinear, x: torch.Tensor) -> torch.Tensor:
    return project(x, module.weight, module.adapter)


def loop_experts(module: Experts, x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
    up_lora, gate_lora, down_lora = (module.adapters.get(name) for name in ("w3", "w1", "w2"))
    inner, out_TD = module.down_proj.shape[2], torch.zeros_like(x_TD)
    for expert in expert_TK.unique().tolist():
        token, choice = torch.where(expert_TK == expert)
        x = x_TD[token]
        up, gate = project(x, module.gate_and_up_proj, None, expert).split(inner, dim=-1)
        if up_lora is not None:
            up = up + (x @ up_lora.a[expert].mT) @ up_lora.b[expert].mT
            gate = gate + (x @ gate_lora.a[expert].mT) @ gate_lora.b[expert].mT
        y = project(up * F.silu(gate), module.down_proj, down_lora, expert)
        out_TD.index_add_(0, token, y * weight_TK[token, choice].unsqueeze(-1))
    return out_TD


def loop_layer(self: DecoderLayer, hidden_BLD, rope, mask, cache=None, layer=0, positions_L=None) -> torch.Tensor:
    """``DecoderLayer.forward``, one step of the spec after the other; ``mask`` is a mask or None."""
    attention, mlp = self.self_attn, self.mlp
    x_BLD = rms_norm(hidden_BLD, self.input_layernorm.weight, self.input_layernorm.eps)
    rows, length, _ = x_BLD.shape
    heads = linear(attention.qkv_proj, x_BLD).view(rows, length, attention.kv_heads, attention.group + 2, attention.head_dim)
    q, k, v = heads.split([attention.group, 1, 1], dim=3)
    q, k, v = (part.flatten(2, 3).transpose(1, 2) for part in (q, k, v))
    q = rms_norm(turned(q, rope), attention.query_layernorm.weight, attention.query_layernorm.eps)
    k = rms_norm(turned(k, rope), attention.key_layernorm.weight, attention.key_layernorm.eps)
    if cache is not None:
        k, v = cache.write(layer, k, v, positions_L)
    k, v = (part.repeat_interleave(attention.group, dim=1) for part in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(rows, length, -1)
    hidden_BLD = hidden_BLD + linear(attention.o_proj, out)
    x_BLD = rms_norm(hidden_BLD, self.post_attention_layernorm.weight, self.post_attention_layernorm.eps)
    x_TD = x_BLD.flatten(0, 1)
    share_TE = F.linear(x_TD, mlp.gate.wg.weight.to(x_TD.dtype)).float().softmax(dim=-1)
    share_TK, expert_TK = share_TE.topk(mlp.gate.top_k, dim=-1)
    share_TK = (share_TK / share_TK.sum(-1, keepdim=True).clamp_min(1e-8)).to(x_TD.dtype)
    up, gate = linear(mlp.shared_mlp.gate_and_up_proj, x_BLD).chunk(2, dim=-1)
    shared_BLD = linear(mlp.shared_mlp.down_proj, up * F.silu(gate))
    return hidden_BLD + shared_BLD + loop_experts(mlp.experts, x_TD, expert_TK, share_TK).view_as(x_BLD)


class CatCache:
    """Keys and values of all layers, longer by a token with every ``torch.cat``."""

    def __init__(self, keys: dict[int, torch.Tensor] | None = None, values: dict[int, torch.Tensor] | None = None):
        self.keys, self.values = dict(keys or {}), dict(values or {})

    def reserve(self, length: int) -> None:
        pass

    def write(self, layer: int, k_BHLQ: torch.Tensor, v_BHLQ: torch.Tensor, positions_L) -> tuple[torch.Tensor, torch.Tensor]:
        for kept, new in ((self.keys, k_BHLQ), (self.values, v_BHLQ)):
            kept[layer] = torch.cat((kept[layer], new), dim=2) if layer in kept else new
        return self.keys[layer], self.values[layer]


class LoopContinuation(Continuation):
    """Thinking against such a cache, with scores for all rows of what was run."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._caches = [CatCache()]

    @torch.no_grad()
    def __call__(self, tokens: list[int]) -> torch.Tensor:
        hidden_BLD, rope, mask, _ = self._given(tokens)
        return self._backbone.logits(self._backbone.run(hidden_BLD, rope, mask, self._caches))[:, -1]


@contextmanager
def straightforward() -> Iterator[None]:
    """While the block runs, everything that differs is done the first implementation's way."""
    def masked(backbone: Backbone, sequence: Sequence) -> torch.Tensor:
        return inputs.mask(backbone, sequence, torch.arange(*sequence.later_slice))

    with (patch.object(DecoderLayer, "forward", loop_layer), patch.object(inputs, "canvas_sight", masked),
          patch.object(thinking_module, "Continuation", LoopContinuation),
          patch.object(Conv3, "reach", lambda conv: (1, 1, 1)),
          patch.object(ParameterGenerator, "forward", generator_benchmark.straightforward)):
        yield


def sized(config: BackboneConfig, sizes: Sizes, **changes) -> BackboneConfig:
    """``config`` with another size of decoder."""
    each = {name: (value,) * sizes.layers for name, value in (
        ("moe_topk", sizes.top_k), ("moe_intermediate_size", sizes.expert_width), ("num_shared_expert", sizes.shared))}
    return replace(
        config, hidden_size=sizes.hidden, num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads, attention_head_dim=sizes.head_dim, num_experts=sizes.experts,
        intermediate_size=sizes.expert_width, image_base_size=sizes.base_size, **each, **changes)


def random_backbone(config: BackboneConfig, device: torch.device, dtype: torch.dtype) -> Backbone:
    backbone = build_backbone(config, dtype).to_empty(device=device)
    torch.manual_seed(0)
    for name, parameter in backbone.named_parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            experts = "mlp.experts." in name
            parameter.data.normal_(0, (parameter.shape[-1] if experts else parameter[0].numel()) ** -0.5)
    return backbone


def random_lora(backbone: Backbone) -> dict[str, dict[str, Adapter]]:
    """A LoRA in the room behind all projections: what each module has when it is worn."""
    for _, module in backbone.adapted_modules():
        for target in module.targets():
            a, b = (torch.randn(shape, device=backbone.device, dtype=backbone.dtype) * 0.02
                    for shape in (target.a_shape(RANK), target.b_shape(RANK)))
            module.attach(target.name, Adapter(a, b, torch.full((RANK,), SCALE, device=backbone.device)))
    return {name: dict(module.adapters) for name, module in backbone.adapted_modules()}


@contextmanager
def armed(backbone: Backbone, lora: dict[str, dict[str, Adapter]] | None, straight: bool) -> Iterator[None]:
    """While the block runs, the backbone wears this LoRA or none, and does its work this way."""
    with ExitStack() as stack:
        for name, module in backbone.adapted_modules():
            module.adapters = dict(lora[name]) if lora else {}
        if straight:
            stack.enter_context(straightforward())
        yield
