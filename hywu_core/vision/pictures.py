"""Source pictures: from a file or a PIL image to the tensors of the two towers, and the size an edit is restored to.

Owns reading, turning, flattening and refusing pictures, fitting them to a resolution bucket for the VAE, and cutting them into
SigLIP2 patches (spec section 10). Which buckets there are is in ``buckets.py``; nothing here runs a network.
"""

import hashlib
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from ..config import BackboneConfig
from ..errors import PictureError
from .buckets import Bucket, Buckets

# The buckets reach 4:1. Up to twice that a picture is still recognisable after fitting; beyond, the fit would keep less than
# half of it (crop) or squeeze it by more than two (stretch).
MAX_ASPECT = 8.0
# One cell of either tower; a smaller picture says nothing to them.
MIN_SIDE = 16
# Where Pillow refuses by default. Kept here too, because hosts switch Pillow's own limit off.
MAX_PIXELS = 178_956_970

# Everything that Pillow's decoders raise for damaged files, which is no single class.
_DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, struct.error, zlib.error)
_HAS_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


@dataclass(frozen=True, eq=False)
class SourcePicture:
    """One picture, ready for both towers.

    pixels_chw: (3, bucket.height, bucket.width) in -1..1, for the VAE. patches: (P, 3 * patch_size²) in -1..1, zero-padded;
    patch_mask: (P,) int32, 1 for real patches; grid: (rows, cols) of real patches. original_hw: upright pixels before fitting.
    digest: sha256 of size and RGB bytes, equal for equal pictures whatever the file format.
    """

    pixels_chw: torch.Tensor
    bucket: Bucket
    patches: torch.Tensor
    patch_mask: torch.Tensor
    grid: tuple[int, int]
    original_hw: tuple[int, int]
    digest: str


def load_picture(path: Path | str) -> Image.Image:
    """Read a picture file as upright RGB; of an animation the first frame (spec section 10).

    Raises:
        PictureError: the file is missing, damaged, no picture, or of a size that ``upright_rgb`` refuses.
    """
    path = Path(path)
    if not path.is_file():
        raise PictureError(f"{path}: there is no such file")
    try:
        opened = Image.open(path)
    except Image.DecompressionBombError as error:
        raise PictureError(f"{path}: {error}; scale the picture down first") from None
    except Image.UnidentifiedImageError:
        raise PictureError(f"{path} ({path.stat().st_size} bytes) is not a picture: choose a PNG, JPEG or WebP file") from None
    except _DAMAGED as error:
        raise PictureError(f"{path} cannot be read ({error}): save it again as PNG or JPEG") from None
    with opened:
        return upright_rgb(opened, name=str(path))


def upright_rgb(image: Image.Image, name: str = "the picture") -> Image.Image:
    """Turn by the EXIF orientation, lay transparency on white, and convert any mode to 8-bit RGB.

    The reference drops the alpha channel instead, which shows whatever colour lies under transparent pixels; pictures without
    transparency are unaffected.

    Raises:
        PictureError: the data is cut off or damaged, the size is refused, or the mode has no agreed meaning as RGB.
    """
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise PictureError(f"{name} is {width} x {height} pixels, at most {MAX_PIXELS} in all are read: scale it down")
    if max(width, height) > MAX_ASPECT * min(width, height) > 0:
        raise PictureError(
            f"{name} is {width} x {height} pixels, a ratio of {max(width, height) / min(width, height):.5g}:1; "
            f"at most {MAX_ASPECT:g}:1 fits the sizes that the model knows: crop it")
    if min(width, height) < MIN_SIDE:
        raise PictureError(f"{name} is {width} x {height} pixels, each side must have at least {MIN_SIDE}: choose a larger one")
    try:
        image.load()
        return _flatten(ImageOps.exif_transpose(image), name)
    except _DAMAGED as error:
        raise PictureError(f"{name} is damaged or cut off ({error}): save it again as PNG or JPEG") from None


def _flatten(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I"):
        image = _from_16_bit(image, name)
    if image.mode == "F":
        raise PictureError(f"{name} holds 32-bit floating-point values, whose white is unknown: save it with 8 or 16 bits")
    if image.mode in _HAS_ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _from_16_bit(image: Image.Image, name: str) -> Image.Image:
    """16-bit gray to 8-bit: Pillow's own conversion would clip everything above 255 to white."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise PictureError(
            f"{name} holds integers from {values.min()} to {values.max()}, expected 0 to 65535: save it with 8 or 16 bits")
    return Image.fromarray(np.round(values / 257.0).astype(np.uint8))


def prepare_picture(image: Image.Image, config: BackboneConfig, fit: str) -> SourcePicture:
    """Fit a picture to its nearest bucket and cut it into patches (spec section 10).

    Args:
        image: any mode and orientation; ``upright_rgb`` is applied.
        fit: "crop" covers the bucket and cuts the middle out, "stretch" distorts to the bucket.

    Raises:
        PictureError: as ``upright_rgb``.
        ValueError: ``fit`` is neither.
    """
    image = upright_rgb(image)
    width, height = image.size
    bucket = Buckets.of(config).nearest(height, width)
    if fit == "crop":
        fitted = _crop(image, bucket)
    elif fit == "stretch":
        fitted = image.resize((bucket.width, bucket.height), Image.Resampling.LANCZOS)
    else:
        raise ValueError(f"fit is {fit!r}, it must be 'crop' or 'stretch'")
    patch = config.vit.get("patch_size", 16)
    patches, mask, grid = _patches(resize_for_vit(image, patch, config.vit_max_num_patches), patch, config.vit_max_num_patches)
    digest = hashlib.sha256(f"{width}x{height}:".encode())
    digest.update(image.tobytes())
    return SourcePicture(
        pixels_chw=(_bytes_chw(fitted).float() / 255 - 0.5) / 0.5,
        bucket=bucket, patches=patches, patch_mask=mask, grid=grid, original_hw=(height, width),
        digest=digest.hexdigest())


def _crop(image: Image.Image, bucket: Bucket) -> Image.Image:
    """Scale so that the bucket is just covered, then cut its middle out; Python's half-even rounding, as in the reference."""
    width, height = image.size
    if height / width < bucket.ratio:
        covering_height, covering_width = bucket.height, round(bucket.height / height * width)
    else:
        covering_width, covering_height = bucket.width, round(bucket.width / width * height)
    image = image.resize((covering_width, covering_height), Image.Resampling.LANCZOS)
    top, left = round((covering_height - bucket.height) / 2), round((covering_width - bucket.width) / 2)
    return image.crop((left, top, left + bucket.width, top + bucket.height))


def _bytes_chw(image: Image.Image) -> torch.Tensor:
    # A copy, because torch refuses to share Pillow's read-only bytes without a warning.
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def vit_size(height: int, width: int, patch: int, max_patches: int) -> tuple[int, int]:
    """The (height, width) to which SigLIP2 resizes: about the picture's ratio, whole patches, at most ``max_patches`` of them.

    The scale is found by bisection between 1e-6 and 100 to a width of 1e-5: these numbers are part of the definition, because
    the result is rounded up to whole patches. (Facts from transformers' ``get_image_size_for_max_num_patches``, Apache-2.0,
    which lies in another module in 5.x than in 4.57; the tests compare.)
    """

    def cells(scale: float) -> tuple[int, int]:
        return max(1, math.ceil(height * scale / patch)), max(1, math.ceil(width * scale / patch))

    low, high = 1e-5 / 10, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        rows, cols = cells(middle)
        if rows * cols <= max_patches:
            low = middle
        else:
            high = middle
    rows, cols = cells(low)
    return rows * patch, cols * patch


def resize_for_vit(image: Image.Image, patch: int, max_patches: int) -> torch.Tensor:
    """RGB image -> uint8 ``(3, h, w)`` of ``vit_size``, bilinear with antialias on the bytes, as SigLIP2's processor does."""
    size = vit_size(image.height, image.width, patch, max_patches)
    return torch.nn.functional.interpolate(
        _bytes_chw(image).contiguous().unsqueeze(0), size, mode="bilinear", antialias=True, align_corners=False)[0]


def _patches(resized_chw: torch.Tensor, patch: int, max_patches: int) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
    """uint8 ``(3, h, w)`` -> patches (P, patch²·3) in the order (row, col), inside (y, x, c); mask (P,); grid (rows, cols)."""
    c, height, width = resized_chw.shape
    rows, cols = height // patch, width // patch
    normal = (resized_chw.float() - 127.5) / 127.5
    real = normal.reshape(c, rows, patch, cols, patch).permute(1, 3, 2, 4, 0).reshape(rows * cols, -1)
    patches = real.new_zeros(max_patches, real.shape[1])
    patches[:rows * cols] = real
    mask = torch.zeros(max_patches, dtype=torch.int32)
    mask[:rows * cols] = 1
    return patches, mask, (rows, cols)


def restore_size(bucket: Bucket, originals_hw: Sequence[tuple[int, int]], buckets: Buckets) -> tuple[int, int]:
    """The (height, width) that an edit of size "auto" is resized to (LANCZOS) after decoding (spec section 10, "Post").

    The first source picture that fell into the output's bucket decides: if the bucket distorts its ratio by 0.01 or more, the
    output gets that ratio back at the area base_size²; in all other cases the bucket's own size is kept.
    """
    for height, width in originals_hw:
        if buckets.nearest(height, width).index == bucket.index:
            if abs(height / width - bucket.ratio) < 0.01:
                break
            scale = math.sqrt(buckets.base_size**2 / (width * height))
            return round(height * scale), round(width * scale)
    return bucket.height, bucket.width
