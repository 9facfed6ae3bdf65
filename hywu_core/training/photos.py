"""Photos for training: a folder of pictures cut into crops, in memory.

Owns finding pictures, skipping what is no use (counted by reason, never silently), and the crops: random places, sizes, mirror
images, exposures and colour casts. Nothing of it is kept in a checkpoint.
"""

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import PictureError, RequestError
from ..progress import Tick, silent
from ..vision.pictures import load_picture

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
LONGEST = 1400  # pixels; larger photos are scaled down first
FLAT = 12.0  # crops whose brightest channel varies less (of 255) are skipped
CELL = 16

LUMA = np.array([0.299, 0.587, 0.114])


@dataclass
class Crops:
    """Crops (n, h, w, 3) uint8 by their grid of latent cells, what was skipped, and how many photos they come from."""

    by_grid: dict[tuple[int, int], np.ndarray]
    skipped: Counter = field(default_factory=Counter)
    photos: int = 0

    def __len__(self) -> int:
        return sum(map(len, self.by_grid.values()))

    def summary(self) -> str:
        """One line: how much there is, and what was skipped why."""
        skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items())) or "nothing"
        return f"{len(self)} crops of {self.photos} photos; skipped: {skipped}"


def find_pictures(folder: Path) -> list[Path]:
    """All picture files below a folder, links not followed; of one wallpaper in several sizes the smallest file.

    Raises:
        RequestError: there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise RequestError(f"{folder} is no folder: give one with photos to train on ({', '.join(SUFFIXES)})")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or path.is_symlink() or not path.is_file():
            continue
        # "contents/images/1920x1080.jpg", "contents/images/2560x1600.jpg": the same wallpaper.
        sized = re.fullmatch(r"\d+x\d+", path.stem) and "contents" in path.relative_to(folder).parts
        key = str(path.parent) if sized else str(path)
        if key not in found or path.stat().st_size < found[key].stat().st_size:
            found[key] = path
    if not found:
        raise RequestError(f"{folder} holds 0 pictures ({', '.join(SUFFIXES)}), at least 1 is needed: give another folder")
    return sorted(found.values())


def cut(folder: Path, grids: dict[tuple[int, int], float], crops_per_photo: int, seed: int, on_tick: Tick = silent) -> Crops:
    """Random crops of every picture below ``folder``; ``grids``: grid of 16-pixel cells -> its share of the crops.

    Broken files, files that are no picture, pictures too small for any grid, doubles and flat crops are skipped and counted.

    Raises:
        RequestError: no usable crop is left.
    """
    paths = find_pictures(folder)
    random = np.random.default_rng(seed)
    shapes, shares = list(grids), np.array(list(grids.values()))
    made: dict[tuple[int, int], list[np.ndarray]] = {grid: [] for grid in shapes}
    skipped: Counter = Counter()
    seen: set[str] = set()
    used = 0
    for number, path in enumerate(paths):
        on_tick(number, len(paths), None)
        try:
            photo = load_picture(path)
        except PictureError:
            skipped["files that are broken, no picture, or too thin or small"] += 1
            continue
        photo.thumbnail((LONGEST, LONGEST), Image.Resampling.BICUBIC)
        digest = hashlib.sha256(photo.tobytes()).hexdigest()
        if digest in seen:
            skipped["doubles"] += 1
            continue
        seen.add(digest)
        before = sum(map(len, made.values()))
        for _ in range(crops_per_photo):
            grid = shapes[random.choice(len(shapes), p=shares / shares.sum())]
            crop = _crop(photo, grid, random)
            if crop is None:
                skipped["crops of photos smaller than the grid"] += 1
            elif np.asarray(crop).std(axis=(0, 1)).max() < FLAT:
                skipped["flat crops"] += 1
            else:
                made[grid].append(_varied(np.asarray(crop), random))
        used += sum(map(len, made.values())) > before
    on_tick(len(paths), len(paths), None)
    by_grid = {grid: np.stack(parts) for grid, parts in made.items() if parts}
    crops = Crops(by_grid, skipped, used)
    if not by_grid:
        raise RequestError(f"{folder} gave 0 usable crops out of {len(paths)} files (skipped: {crops.summary()}): give photos "
                           f"of at least {CELL * min(min(grid) for grid in shapes)} pixels a side")
    return crops


def _crop(photo: Image.Image, grid: tuple[int, int], random: np.random.Generator) -> Image.Image | None:
    rows, cols = grid
    largest = min(photo.width / (CELL * cols), photo.height / (CELL * rows))
    if largest < 1:
        return None
    scale = max(1.0, largest * random.uniform(0.25, 1.0))
    width, height = int(CELL * cols * scale), int(CELL * rows * scale)
    left, top = random.integers(0, photo.width - width + 1), random.integers(0, photo.height - height + 1)
    return photo.resize((CELL * cols, CELL * rows), Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))


def _varied(pixels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Wallpapers are dim and saturated; what people bring comes in every exposure and colour cast."""
    gamma, gains = np.exp(random.normal(-0.1, 0.4)), np.exp(random.normal(0, 0.07, 3))
    pixels = 255 * np.clip((pixels / 255.0) ** gamma * gains, 0, 1)
    light = pixels @ LUMA[:, None]
    pixels = np.clip(light + (pixels - light) * random.uniform(0.5, 1.1), 0, 255).round().astype(np.uint8)
    return pixels[:, ::-1] if random.random() < 0.5 else pixels
