"""Two-dimensional rotary positions of the backbone (spec section 2): text on the diagonal, pictures on their grid.

Owns positions, tables and the rotation; does not know what a picture is, only spans with grids. The generator's rope is another
kind (interleaved) and lives with the generator.
"""

from collections.abc import Sequence

import torch

# ((start, stop), (rows, cols)): the half-open span of a picture's tokens and its grid.
Span = tuple[tuple[int, int], tuple[int, int]]


def positions(length: int, spans: Sequence[Span]) -> torch.Tensor:
    """(L, 2) int64 (y, x) of every token.

    A token outside all spans has y = x = its index. A picture's grid is centred on the diagonal; half-integers are truncated.
    Tokens of a span beyond rows·cols (the padding of the vision tower) are plain text positions.
    """
    yx_L2 = torch.arange(length).unsqueeze(1).repeat(1, 2)
    for (start, stop), (rows, cols) in spans:
        count = rows * cols
        if start < 0 or stop > length or count > stop - start:
            raise ValueError(f"span [{start}, {stop}) with grid {rows}x{cols} does not fit into {length} tokens")
        top, left = start + (count - rows) / 2, start + (count - cols) / 2
        y = (torch.arange(rows, dtype=torch.float64) + top).floor().long()
        x = (torch.arange(cols, dtype=torch.float64) + left).floor().long()
        yx_L2[start : start + count, 0] = y.repeat_interleave(cols)
        yx_L2[start : start + count, 1] = x.repeat(rows)
    return yx_L2


def table(yx_L2: torch.Tensor, head_dim: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (L, Q), fp32, of (L, 2) positions: even frequencies turn with y, odd ones with x."""
    half = head_dim // 2
    # The exponent is taken in fp32, as the published tables are.
    theta = 1.0 / (base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    axis = torch.arange(half) % 2
    angle_LQ = (yx_L2[:, axis].float() * theta).repeat(1, 2)
    return angle_LQ.cos(), angle_LQ.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate heads (..., Q) in fp32, half against half, and return them in their own dtype; cos and sin must broadcast."""
    half, wide = x.shape[-1] // 2, x.float()
    turned = wide * cos
    turned[..., :half].addcmul_(wide[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(wide[..., :half], sin[..., half:])
    return turned.to(x.dtype)
