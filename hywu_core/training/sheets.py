"""Sheets of pictures: what a stage paints beside what is wanted, and the grid that evaluation draws.

Owns putting pictures side by side; who painted them is the caller's business.
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from ..backbone.model import Backbone
from .batches import Batch, Batches, Draws

GAP = 4


@torch.no_grad()
def decoded(model: Backbone, latent_bchw: torch.Tensor) -> np.ndarray:
    """Latents -> pictures (B, h, w, 3) uint8."""
    pixels_bchw = model.vae.decode(model.vae.unscale(latent_bchw).to(model.vae.dtype))
    return ((pixels_bchw / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def samples(model: Backbone, batches: Batches, paint: Callable[[Batch, Draws], torch.Tensor]) -> Image.Image:
    """One column an edit, on held-out crops: source, painted, wanted. The same crops every time."""
    grid = max(batches.crops, key=lambda each: (len(batches.crops[each]) >= 4, each[0] * each[1] <= 64, each[0] * each[1]))
    columns = []
    for number, edit in enumerate(batches.recipe.edit_names()):
        batch = batches.draw(1, Draws.of(1, "sheet", number), grid=grid, thinks=True, edit=edit)
        painted = decoded(model, paint(batch, Draws.of(2, "sheet", number)))
        wanted = (batch.wanted_pixels * 255).round().astype(np.uint8)
        columns.append([batch.sources[0].pixels[0], painted[0], wanted[0]])
    return table([list(row) for row in zip(*columns, strict=True)])


def table(rows: list[list[np.ndarray]]) -> Image.Image:
    """Pictures (h, w, 3) uint8 in rows and columns; every cell as large as the largest picture."""
    height = max(each.shape[0] for row in rows for each in row) + GAP
    width = max(each.shape[1] for row in rows for each in row) + GAP
    sheet = Image.new("RGB", (width * max(map(len, rows)), height * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, each in enumerate(row):
            sheet.paste(Image.fromarray(each), (x * width, y * height))
    return sheet
