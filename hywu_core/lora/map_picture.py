"""The map of many LoRAs as a picture: a thumbnail or dot for each, with its number and instruction.

Owns where things go so that they can be read; the points are ``map.py``'s.
"""

import numpy as np
from PIL import Image

from .drawing import FAINT, GRID, INK, LINES, Sheet
from .map import Map

WIDTH, HEIGHT, MARGIN = 1400, 1000, 90
THUMBNAIL = 96  # pixels of the longer side; smaller where there are many
CAPTION, BESIDE = 26, 44  # pixels below a thumbnail for its caption, and how much wider that may be
STEP = 8  # pixels between the places that a tile may take


def map_picture(found: Map, title: str = "LoRAs by their updates") -> Image.Image:
    """All points of a map; tiles that would overlap move aside and are tied to their place by a line."""
    sheet = Sheet(WIDTH, HEIGHT)
    sheet.text(24, 18, f"{title}: {len(found.points)}", 22)
    left, top, width, height = MARGIN, 70, WIDTH - 2 * MARGIN, HEIGHT - 70 - MARGIN
    sheet.rectangle(left - 60, top - 10, width + 120, height + 50, outline=GRID)
    sheet.text(WIDTH / 2, HEIGHT - 28, f"first direction, {found.shares[0]:.0%} of the spread", 15, FAINT, "mm")
    sheet.text(24, HEIGHT - 28, f"upwards: second direction, {found.shares[1]:.0%}", 15, FAINT, "lm")
    sheet.text(WIDTH - 24, HEIGHT - 28, "dots: where they lie; a line: moved aside for room", 15, FAINT, "rm")
    places = _on_sheet(found.places.numpy(), left + 60, top + 70, width - 120, height - 140)
    size = max(20, min(THUMBNAIL, round(THUMBNAIL * (20 / max(20, len(places))) ** 0.5)))
    tiles = _apart(places, size + BESIDE, size + CAPTION + 8, (left - 10, top + 30, width + 20, height - 40))
    for place, tile in zip(places, tiles, strict=True):
        if abs(place - tile).max() > 4:
            sheet.line([tuple(place), tuple(tile)], GRID, 1.5)
    for place in places:
        sheet.dot(*place, 4, FAINT)
    for number, (point, tile) in enumerate(zip(found.points, tiles, strict=True), start=1):
        _tile(sheet, tile, size, number, point.instruction or point.name, point.thumbnail)
    return sheet.done()


def _tile(sheet: Sheet, at: np.ndarray, size: int, number: int, caption: str, thumbnail: Image.Image | None) -> None:
    x, y = at[0], at[1] - CAPTION / 2
    middle, half = y, size / 2
    if thumbnail is None:
        half = 11
    else:
        shrink = size / max(thumbnail.size)
        shown = tuple(max(1, round(side * shrink)) for side in thumbnail.size)
        half = shown[1] / 2
        sheet.paste(thumbnail, x - shown[0] / 2, y - half, shown)
        sheet.rectangle(x - shown[0] / 2, y - half, *shown, outline=INK)
        x, y = x - shown[0] / 2, y - half
    sheet.dot(x, y, 11, LINES[0])
    sheet.text(x, y, str(number), 12, "#ffffff", "mm")
    sheet.text(at[0], middle + half + 4, caption, 13, INK, "ma", width=size + BESIDE - 6)


def _on_sheet(places: np.ndarray, x: float, y: float, width: float, height: float) -> np.ndarray:
    """(n, 2) into the rectangle, both axes by the same factor, so that distances can be compared; the second upwards."""
    low, high = places.min(0), places.max(0)
    spans = np.maximum(high - low, 1e-12)
    factor = min(width / spans[0], height / spans[1]) if (high - low).max() > 0 else 0.0
    middle = (low + high) / 2
    return np.array([x + width / 2, y + height / 2]) + (places - middle) * factor * np.array([1, -1])


def _apart(places: np.ndarray, width: float, height: float, inside: tuple[float, float, float, float]) -> np.ndarray:
    """Middles of tiles of one size, each as near its place as those before it leave room; without any, at its place."""
    x, y, inner_width, inner_height = inside
    columns = np.arange(x + width / 2, x + inner_width - width / 2 + 1, STEP)
    rows = np.arange(y + height / 2, y + inner_height - height / 2 + 1, STEP)
    spots = np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2)
    free, tiles = np.ones(len(spots), dtype=bool), []
    for place in places:
        far = np.where(free, ((spots - place) ** 2).sum(1), np.inf)
        tile = spots[far.argmin()] if free.any() else place
        tiles.append(tile)
        free &= (abs(spots - tile) >= (width, height)).any(1)
    return np.array(tiles)
