"""How many bytes each part of a model has in each form, from the configuration alone.

Owns ``ModelSizes``, counted on modules that are built on ``meta``, and ``GeneratorSizes``, which ``generator/sizes.py`` fills
in. What a run needs besides weights is ``activations.py``'s. No size of the published model is written down here.

A decoder layer's *adapted* weights (what a LoRA reaches: all but norms and router) lie in one slab, field after field at
multiples of 256 bytes. *Compute form*: the dtype that is computed in, with room for a LoRA behind every weight. *Stored form*:
packed by a format, or the same as the compute form.
"""

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from ...kernels.padding import aligned
from ..backbone.adapted import Adapted, Experts
from ..backbone.model import build_backbone
from ..checkpoint.formats import FORMATS, codec
from ..config import BackboneConfig
from ..errors import PlacementError
from .slab import ALIGNMENT

PLAIN = FORMATS[0]  # as published: the compute form
PACKED = FORMATS[1:]
RANK = 16  # of the LoRA that there is room for: what HY-WU writes; a higher one costs two more products a projection


@functools.cache  # a search asks for few different weights many times
def stored_bytes(form: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes in a slab of one weight (..., O, I) packed as ``form``; what the format has no form for stays in ``dtype``."""
    found = codec(form, shape)
    fields = [(dtype, shape)] if found is None else found.fields(shape).values()
    return sum(_in_slab(math.prod(size) * kept.itemsize) for kept, size in fields)


def _in_slab(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Weight:
    """One adapted weight of a layer: its shape, and where how many sides of a LoRA lie behind it."""

    shape: tuple[int, ...]
    dim: int
    sides: int
    routed: bool

    def computed(self, dtype: torch.dtype) -> int:
        """Bytes in a slab of compute form, room for a LoRA included."""
        shape = list(self.shape)
        shape[self.dim] += self.sides * RANK
        if self.dim == len(shape) - 1:
            shape[-1] = aligned(shape[-1], dtype)
        return _in_slab(math.prod(shape) * dtype.itemsize)

    def stored(self, form: str, dtype: torch.dtype) -> int:
        """Bytes in a slab of stored form."""
        return stored_bytes(form, self.shape, dtype) if form in PACKED else self.computed(dtype)

    @property
    def values(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelSizes:
    """Bytes and values of a backbone. All layers count as large as the largest.

    weights: a layer's adapted ones. rest: norms and router of a layer. lora_beside: of a layer's LoRA what does not lie in the
    room behind the weights; lora: all of it. wte, lm_head, vision (tower and aligner), vae and small (embedders, patch
    embedder, final layer, last norm) are parts of their own, all in the compute dtype. own_form: what the files hold.
    """

    config: BackboneConfig
    dtype: torch.dtype
    own_form: str
    weights: tuple[Weight, ...]
    rest: int
    lora: int
    lora_beside: int
    wte: int
    lm_head: int
    vision: int
    vae: int
    small: int
    patch_values: int
    final_values: int
    encoder_flops: float  # of the VAE, a pixel
    decoder_flops: float

    @property
    def layers(self) -> int:
        return self.config.num_hidden_layers

    def forms(self) -> tuple[str, ...]:
        """The formats that these files can be loaded as, the best first."""
        return (self.own_form,) if self.own_form in PACKED else (self.own_form, *PACKED)

    def packed(self, form: str) -> bool:
        return form in PACKED

    def stored_layer(self, form: str) -> int:
        """A layer's slab in stored form."""
        return sum(weight.stored(form, self.dtype) for weight in self.weights)

    def computed_layer(self) -> int:
        """A layer's slab in compute form."""
        return self.stored_layer(PLAIN)

    def chosen(self, form: str | None = None, *, routed: bool | None = None) -> int:
        """Bytes of a layer that one token meets: all dense weights and its chosen experts (``routed``: only the ones or the
        others), in stored form, or in compute form for None."""
        total = 0
        for weight in self.weights:
            if routed is None or weight.routed is routed:
                nbytes = weight.computed(self.dtype) if form is None else weight.stored(form, self.dtype)
                total += nbytes * self.share(weight)[0] // self.share(weight)[1]
        return total

    def chosen_values(self) -> int:
        """Values of a layer that multiply one token."""
        return sum(weight.values * self.share(weight)[0] // self.share(weight)[1] for weight in self.weights)

    def share(self, weight: Weight) -> tuple[int, int]:
        """How much of a weight one token meets, as (chosen, all)."""
        return (max(self.config.moe_topk), self.config.num_experts) if weight.routed else (1, 1)

    def total(self, form: str) -> int:
        """The whole backbone."""
        return self.layers * (self.stored_layer(form) + self.rest) + self.parts()

    def parts(self) -> int:
        return self.wte + self.lm_head + self.vision + self.vae + self.small


def model_sizes(config: BackboneConfig, dtype: torch.dtype, own_form: str = PLAIN) -> ModelSizes:
    """Count a backbone that computes in ``dtype``; ``own_form``: the format of its files, "bf16" for plain ones of any dtype.

    Raises: PlacementError for a format that is none.
    """
    if own_form not in FORMATS:
        raise PlacementError(f"there is no format {own_form!r}: choose one of {', '.join(FORMATS)}")
    # Every kind of layer once: what is not a layer is there only once anyhow.
    backbone = build_backbone(_short(config), dtype)
    largest = max(backbone.model.layers, key=lambda layer: sum(parameter.nbytes for parameter in layer.parameters()))
    weights, lora, beside = [], 0, 0
    for module in largest.modules():
        if not isinstance(module, Adapted):
            continue
        for name, room in module.ROOMS.items():
            weights.append(Weight(tuple(getattr(module, name).shape), room.dim, room.sides, isinstance(module, Experts)))
        for target in module.targets():
            a, b = (math.prod(shape) * dtype.itemsize for shape in (target.a_shape(RANK), target.b_shape(RANK)))
            lora, beside = lora + a + b, beside + (a if target.name == "w2" else b)
    adapted = sum(weight.values for weight in weights) * dtype.itemsize
    small = [module for name, module in backbone.named_children() if name not in ("model", "lm_head", "vision_model",
                                                                                   "vision_aligner", "vae")]
    encoder, decoder = _vae_flops(backbone.vae)
    return ModelSizes(
        config=config, dtype=dtype, own_form=own_form, weights=tuple(weights), rest=_nbytes(largest) - adapted,
        lora=lora, lora_beside=beside, wte=_nbytes(backbone.model.wte), lm_head=_nbytes(backbone.lm_head),
        vision=_nbytes(backbone.vision_model) + _nbytes(backbone.vision_aligner), vae=_nbytes(backbone.vae),
        small=sum(map(_nbytes, small)) + _nbytes(backbone.model.ln_f), patch_values=_values(backbone.patch_embed),
        final_values=_values(backbone.final_layer), encoder_flops=encoder, decoder_flops=decoder)


def _short(config: BackboneConfig) -> BackboneConfig:
    """The same with one dense and one routed layer, as far as it has them."""
    kept = sorted({0, config.num_hidden_layers - 1} if 0 < config.moe_layer_num_skipped else {config.num_hidden_layers - 1})
    per_layer = {name: tuple(getattr(config, name)[index] for index in kept)
                 for name in ("moe_topk", "moe_intermediate_size", "num_shared_expert")}
    return replace(config, num_hidden_layers=len(kept), moe_layer_num_skipped=len(kept) - 1, **per_layer)


def _vae_flops(vae: nn.Module) -> tuple[float, float]:
    """Of encoding and decoding a pixel, counted on a small picture on ``meta``; its attention is left out, as it is small."""
    from torch.utils.flop_counter import FlopCounterMode

    cell, channels = vae.config.ffactor_spatial, vae.config.latent_channels
    pixels = torch.empty(1, vae.config.in_channels, 4 * cell, 4 * cell, device="meta", dtype=vae.dtype)
    latent = torch.empty(1, channels, 4, 4, device="meta", dtype=vae.dtype)
    counts = []
    for step, value in ((vae.encode, pixels), (vae.decode, latent)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            step(value)
        counts.append(counter.get_total_flops() / (4 * cell) ** 2)
    return counts[0], counts[1]


def _nbytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _values(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class GeneratorSizes:
    """Bytes and values of a weight generator.

    blocks: how many; block: bytes of one; rest: bytes of everything around them. width: G. layers, row: N and W, tokens of its
    blocks. written: bytes of the LoRA that it writes. at_once: tokens that one slice holds.
    """

    blocks: int
    block: int
    rest: int
    width: int
    head_dim: int
    layers: int
    row: int
    written: int
    at_once: int
    itemsize: int

    @property
    def total(self) -> int:
        return self.blocks * self.block + self.rest

    @property
    def tokens(self) -> int:
        return self.layers * self.row
