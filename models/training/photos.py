"""Photos for the small checkpoint: free wallpapers out of Debian packages, cut into crops, and the edits as plain
arithmetic.

Owns fetching and unpacking the packages, choosing crops, and what each edit does to pixels. Nothing of it is shipped: the
photos stay in the work folder. scikit-image's photos are never read here, they are what the result is judged on.
"""

import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

Image.MAX_IMAGE_PIXELS = None

PACKAGES = (
    "mate-backgrounds",
    "plasma-workspace-wallpapers",
    "ukui-wallpapers",
    "lomiri-wallpapers-16.04",
    "lomiri-wallpapers-20.04",
    "gnome-backgrounds",
)
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}

# Grids of 16-pixel cells (rows, cols) with their share of the crops: the square and 3:2 are what people mostly bring.
GRIDS = {
    (11, 11): 0.34,
    (9, 12): 0.14,
    (12, 9): 0.09,
    (9, 13): 0.16,
    (13, 9): 0.09,
    (10, 11): 0.05,
    (11, 10): 0.04,
    (8, 14): 0.04,
    (14, 8): 0.02,
    (7, 15): 0.02,
    (15, 7): 0.01,
}

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
EDITS = ("brighten", "darken", "warm", "cool", "gray", "saturate", "sepia", "invert")


def fetch(folder: Path) -> list[Path]:
    """Download the packages with apt and unpack them below ``folder``; returns the pictures, one of each name."""
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob("*.deb")):
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True)
    for package in folder.glob("*.deb"):
        target = folder / package.name.split("_")[0]
        if not target.is_dir():
            subprocess.run(["dpkg-deb", "-x", str(package), str(target)], check=True)
    # The same wallpaper comes in several sizes (folder contents/images/WxH.jpg): one of them is enough.
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.is_symlink() and path.stat().st_size > 60_000:
            key = str(path.parent.parent) + path.parent.name[:9] if "contents" in path.parts else str(path)
            if key not in found or path.stat().st_size < found[key].stat().st_size:
                found[key] = path
    return sorted(found.values())


def cut(paths: list[Path], crops_per_photo: int, seed: int) -> dict[tuple[int, int], np.ndarray]:
    """Random crops, (n, h, w, 3) uint8 a grid; nearly flat ones are dropped, half of them are mirrored."""
    random = np.random.default_rng(seed)
    grids = list(GRIDS)
    shares = np.array([GRIDS[grid] for grid in grids])
    crops: dict[tuple[int, int], list[np.ndarray]] = {grid: [] for grid in grids}
    for path in paths:
        with Image.open(path) as opened:
            opened.draft("RGB", (1400, 1400))
            photo = opened.convert("RGB")
        photo.thumbnail((1400, 1400), Image.Resampling.BICUBIC)
        for _ in range(crops_per_photo):
            rows, cols = grids[random.choice(len(grids), p=shares / shares.sum())]
            largest = min(photo.width / (16 * cols), photo.height / (16 * rows))
            scale = max(1.0, largest * random.uniform(0.25, 1.0))
            if scale > largest:
                continue
            width, height = int(16 * cols * scale), int(16 * rows * scale)
            left, top = random.integers(0, photo.width - width + 1), random.integers(0, photo.height - height + 1)
            crop = photo.resize((16 * cols, 16 * rows), Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))
            pixels = np.asarray(crop)
            if pixels.std(axis=(0, 1)).max() < 12:
                continue
            # Wallpapers are dim and saturated; real photos come in every exposure and colour cast.
            gamma, gains = np.exp(random.normal(-0.1, 0.3)), np.exp(random.normal(0, 0.07, 3))
            pixels = 255 * np.clip((pixels / 255.0) ** gamma * gains, 0, 1)
            luma = pixels @ LUMA[:, None]
            pixels = np.clip(luma + (pixels - luma) * random.uniform(0.5, 1.1), 0, 255).round().astype(np.uint8)
            crops[rows, cols].append(pixels[:, ::-1] if random.random() < 0.5 else pixels)
    return {grid: np.stack(found) for grid, found in crops.items()}


def edited(pixels: np.ndarray, edit: str) -> np.ndarray:
    """What an edit makes of (..., 3) pixels in 0..1: the ground truth of training and of the evaluation."""
    luma = (pixels @ LUMA)[..., None]
    if edit == "brighten":
        out = 0.32 + 0.80 * pixels
    elif edit == "darken":
        out = 0.45 * pixels
    elif edit == "warm":
        out = pixels * np.array([1.15, 0.97, 0.62], np.float32) + np.array([0.06, 0.02, 0.0], np.float32)
    elif edit == "cool":
        out = pixels * np.array([0.62, 0.95, 1.15], np.float32) + np.array([0.0, 0.02, 0.08], np.float32)
    elif edit == "gray":
        out = np.broadcast_to(luma, pixels.shape)
    elif edit == "saturate":
        out = luma + 1.9 * (pixels - luma)
    elif edit == "sepia":
        out = luma * np.array([1.08, 0.87, 0.62], np.float32) + np.array([0.06, 0.03, 0.0], np.float32)
    elif edit == "invert":
        out = 1.0 - pixels
    else:
        raise ValueError(f"edit {edit!r} is none of {EDITS}")
    return np.clip(out, 0, 1).astype(np.float32)


def describe(pixels: np.ndarray) -> tuple[str, str]:
    """(brightness, hue) of one picture (h, w, 3) in 0..1, as thinking words them."""
    mean = pixels.reshape(-1, 3).mean(0)
    brightness = float(mean @ LUMA)
    word = "dark" if brightness < 0.33 else "bright" if brightness > 0.6 else "medium"
    low, high = float(mean.min()), float(mean.max())
    if high - low < 0.06:
        return word, "gray"
    red, green, blue = mean
    if blue == high:
        return word, "purple" if red > green + 0.3 * (high - low) else "blue"
    if green == high:
        return word, "green"
    return word, "brown" if green > blue + 0.25 * (high - low) else "red"
