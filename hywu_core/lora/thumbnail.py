"""The small picture that a LoRA file may carry: made of any picture, and read from a text that nobody vouches for."""

import base64
import binascii
import io
import re
import struct

from PIL import Image

SIDE = 256  # pixels, the longest
LIMIT = 64 << 10  # characters of base64 in a file's metadata
QUALITIES = (85, 70, 50, 30, 10)
FORMATS = ("JPEG", "WEBP")
_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")


def thumbnail_text(picture: Image.Image) -> str:
    """A picture as base64 of a small JPEG, transparent parts on white; noise of this size fits the limit, too."""
    small = picture.copy()
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    if small.mode not in ("RGB", "L"):
        white = Image.new("RGBA", small.size, "white")
        white.alpha_composite(small.convert("RGBA"))
        small = white.convert("RGB")
    for quality in QUALITIES:
        data = io.BytesIO()
        small.save(data, "JPEG", quality=quality)
        text = base64.b64encode(data.getvalue()).decode()
        if len(text) <= LIMIT:
            break
    return text


def thumbnail_bytes(text: str | None) -> bytes | None:
    """The JPEG or WebP of a file's metadata; None if there is none, or what is there is no picture of that kind and size."""
    if not text or len(text) > LIMIT or not _BASE64.fullmatch(text):
        return None
    try:
        data = base64.b64decode(text, validate=True)
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            # The size stands in the header: what would unfold to gigabytes is put aside before it does.
            if max(picture.size) > SIDE or getattr(picture, "n_frames", 1) > 1:
                return None
            picture.load()
    # What Pillow raises for damaged JPEG and WebP data.
    except (binascii.Error, OSError, ValueError, SyntaxError, EOFError, struct.error, IndexError, KeyError,
            Image.DecompressionBombError):
        return None
    return data
