"""The geometry of a training batch: where the pictures lie in a sequence, every token's position, and the masks.

All samples of a batch share it. ``None`` grid stands for text alone, which the language part is trained on too. Positions
come from the core; ``evaluate.py`` checks the whole layout against the core's own template.
"""

from dataclasses import dataclass

import torch
from comfyui_hywu.hywu_core.backbone.mask import attention_mask
from comfyui_hywu.hywu_core.backbone.rope import positions

VIT_TOKENS = 16


@dataclass(frozen=True, eq=False)
class Layout:
    """One sequence: prefix (``<bos>`` to the answer's ``<img_size>``) and painted part (ratio, timestep, guidance, latents)."""

    prefix: int
    vae: tuple[int, int] | None
    vit: tuple[int, int] | None
    cond_timestep: int | None
    prefix_positions: torch.Tensor
    prefix_mask: torch.Tensor
    painted_positions: torch.Tensor | None = None
    painted_mask: torch.Tensor | None = None


def lay_out(head: int, text: int, grid: tuple[int, int] | None, patch_grid: tuple[int, int] | None = None) -> Layout:
    """head: tokens before the source picture; text: tokens after it, up to and with the answer's ``<img_size>``."""
    if grid is None:
        length = head + text
        return Layout(length, None, None, None, positions(length, []), attention_mask(length, []))
    cells = grid[0] * grid[1]
    timestep = head + 3  # <boi> <img_size> <img_ratio> <timestep>
    vae = (timestep + 1, timestep + 1 + cells)
    vit = (vae[1] + 1, vae[1] + 1 + VIT_TOKENS)
    prefix = vit[1] + 1 + text
    painted = (prefix + 3, prefix + 3 + cells)
    yx = positions(painted[1], [(vae, grid), (vit, patch_grid), (painted, grid)])
    mask = attention_mask(painted[1], [(vae[0], vit[1]), painted])
    return Layout(prefix, vae, vit, timestep, yx[:prefix], mask[:prefix, :prefix], yx[prefix:], mask[prefix:])
