"""What changed between two pictures, amplified until it can be seen, with the factor written into it."""

import torch
from PIL import ImageDraw, ImageFont

from . import host

FACTORS = (1, 2, 4, 8, 16, 32)
SEEN = 0.999  # this share of all values is within the picture's range; the rest is cut off


def difference(before_BHWC: torch.Tensor, after_BHWC: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Two IMAGEs of one size -> 0.5 + factor · (after - before) / 2 as IMAGE, and the factor."""
    change = after_BHWC.float().cpu() - before_BHWC.float().cpu()
    size = change.abs().flatten()
    # Of at most a million values: torch.quantile takes no more than 16 million.
    reached = float(torch.quantile(size[:: max(1, size.numel() // 1_000_000)], SEEN))
    factor = max((factor for factor in FACTORS if factor * reached <= 1), default=1)
    shown = (0.5 + factor * change / 2).clamp(0, 1)
    return torch.cat([_labelled(frame_HWC, f"x {factor}") for frame_HWC in shown]), factor


def _labelled(frame_HWC: torch.Tensor, label: str) -> torch.Tensor:
    picture = next(iter(host.frames(frame_HWC[None])))
    letters = ImageFont.load_default(max(12, picture.height // 24))
    draw = ImageDraw.Draw(picture)
    left, top, right, bottom = draw.textbbox((6, 4), label, font=letters)
    draw.rectangle([0, 0, right + 6, bottom + 5], fill="black")
    draw.text((6, 4), label, font=letters, fill="white")
    return host.image_tensor(picture)
