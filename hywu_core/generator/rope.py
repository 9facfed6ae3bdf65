"""Rotary positions of the generator: the interleaved kind, over one or two integer axes.

Owns the tables and the rotation. The backbone's rotary positions are another kind (half-split) and lie in ``backbone/rope.py``.

A table holds one cosine and one sine per (position, feature pair); the 2 x 2 rotation matrices are never built, which for all
176,512 tokens of the published generator saves three quarters of 360 MB.
"""

from typing import NamedTuple

import torch

THETA = 10000.0


class RotaryTable(NamedTuple):
    """Cosines and sines of every feature pair, fp32, each (positions, Q/2)."""

    cos: torch.Tensor
    sin: torch.Tensor

    def rows(self, start: int, stop: int) -> "RotaryTable":
        """The table of the positions [start, stop)."""
        return RotaryTable(self.cos[start:stop], self.sin[start:stop])


def rotary_table(axes: tuple[torch.Tensor, ...], head_dim: int) -> RotaryTable:
    """Angles position * 10000^(-2j / d) of each axis, the axes side by side along the head (spec section 4).

    Args:
        axes: integer positions (L,), one tensor per axis; each axis gets ``d = head_dim / len(axes)`` features.
    """
    width = head_dim // len(axes)
    # fp32 throughout, like the reference: in fp64 the angles of far positions differ by 1e-5.
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=axes[0].device) / width
    frequencies = 1.0 / THETA**exponents
    angles = torch.cat([positions.float()[:, None] * frequencies for positions in axes], dim=-1)
    return RotaryTable(angles.cos(), angles.sin())


def rotate(x_BLHQ: torch.Tensor, table: RotaryTable) -> torch.Tensor:
    """Rotate the feature pairs (2j, 2j+1) by their position's angle, in fp32; returns the dtype that came in."""
    pairs = x_BLHQ.float().unflatten(-1, (-1, 2))
    cos, sin = table.cos[:, None], table.sin[:, None]  # (L, 1, Q/2): the same for every head
    rotated = pairs * cos[..., None]
    rotated[..., 0].addcmul_(pairs[..., 1], sin, value=-1)
    rotated[..., 1].addcmul_(pairs[..., 0], sin)
    return rotated.flatten(-2).to(x_BLHQ.dtype)
