"""The SigLIP2 vision tower and the aligner that brings its outputs to the backbone's width (spec sections 7 and 10).

Owns building transformers' encoder (4.57 and 5.x have it under different names), the position table for a picture's grid, and
the aligner. Cutting a picture into patches is in ``pictures.py``. Tensor names are the published ones below ``vision_model.``
and ``vision_aligner.``.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..config import BackboneConfig
from ..errors import CheckpointError

# What shapes the network. Everything else in a published `vit` block steers a training script or an output format, and some of
# it (use_return_dict) newer transformers refuse.
_ARCHITECTURE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "num_patches", "patch_size",
    "hidden_act", "layer_norm_eps", "attention_dropout")


def _library_tower(vit: dict[str, Any]) -> nn.Module:
    """transformers' tower without its pooling head, which nothing here uses."""
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    config = Siglip2VisionConfig(**{key: vit[key] for key in _ARCHITECTURE if key in vit}, vision_use_head=False)
    config._attn_implementation = "sdpa"
    model = Siglip2VisionModel(config)
    # 4.57 wraps the tower once more than 5.x does; the published names are those of the inner one.
    return getattr(model, "vision_model", model)


class VisionTower(nn.Module):
    """SigLIP2 with variable grids: patches of several pictures -> one vector per patch, padding included."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        tower = _library_tower(config.vit)
        # The library's embedding module holds the parameters only: its forward reads grids from a tensor, which costs a device
        # sync a picture, and interpolates the position table in the storage dtype.
        self.embeddings = tower.embeddings
        self.encoder = tower.encoder
        self.post_layernorm = tower.post_layernorm
        entries = self.embeddings.position_embedding.num_embeddings
        self.side = math.isqrt(entries)
        if self.side**2 != entries:
            raise CheckpointError(f"config.json: vit.num_patches is {entries}, the position table must be a square")

    def embed(self, patches_bpd: torch.Tensor, grids: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Patches ``(b, p, d)`` plus their positions -> ``(b, p, vit width)`` (spec section 10).

        Raises:
            ValueError: the number of grids is not b, or a grid has more cells than there are patches.
        """
        b, p, _ = patches_bpd.shape
        if len(grids) != b:
            raise ValueError(f"{len(grids)} grids for {b} pictures")
        linear = self.embeddings.patch_embedding
        embedded = linear(patches_bpd.to(linear.weight.dtype))
        return embedded + torch.stack([self._positions(grid, p) for grid in grids]).to(embedded)

    def _positions(self, grid: tuple[int, int], p: int) -> torch.Tensor:
        """The square table resized to ``grid``, in fp32; padding gets entry 0, as the tower was trained."""
        cells = grid[0] * grid[1]
        if cells > p:
            raise ValueError(f"a grid of {grid[0]} x {grid[1]} has {cells} cells, the input only {p} patches")
        table = self.embeddings.position_embedding.weight
        table = table.to(torch.promote_types(table.dtype, torch.float32))
        table = table.reshape(1, self.side, self.side, -1).permute(0, 3, 1, 2)
        # Antialias, because a grid may be coarser than the table.
        table = F.interpolate(table, size=grid, mode="bilinear", align_corners=False, antialias=True)
        table = table.flatten(2).squeeze(0).T  # (cells, vit width)
        return torch.cat([table, table[:1].expand(p - cells, -1)])

    def forward(self, patches_bpd: torch.Tensor, mask_bp: torch.Tensor, grids: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Outputs ``(b, p, vit width)`` of all p patches, padded ones too (spec section 10).

        Args:
            patches_bpd: ``(b, p, d)`` from ``SourcePicture.patches``.
            mask_bp: ``(b, p)``, nonzero for real patches; padding is never attended to.
            grids: (rows, cols) of each picture.
        """
        hidden = self.embed(patches_bpd, grids)
        b, p = mask_bp.shape
        attend = mask_bp.to(hidden.device, torch.bool)[:, None, None, :].expand(b, 1, p, p)
        hidden = self.encoder(inputs_embeds=hidden, attention_mask=attend).last_hidden_state
        return self.post_layernorm(hidden)


class Aligner(nn.Module):
    """An MLP from the tower's width to the backbone's: ``layers.{0,2,...}`` linear, exact GELU in between (spec section 7)."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        if config.vit_aligner_depth < 1:
            raise CheckpointError(f"config.json: vit_aligner.depth is {config.vit_aligner_depth}, it must be at least 1")
        layers: list[nn.Module] = [nn.Linear(config.vit["hidden_size"], config.hidden_size)]
        for _ in range(config.vit_aligner_depth - 1):
            layers += [nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]
        self.layers = nn.Sequential(*layers)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``(..., vit width)`` -> ``(..., hidden_size)``."""
        return self.layers(hidden)
