"""The table of sizes that a picture can have: 33 buckets of about equal area and four wide-screen extras.

Owns the table, looking up the nearest bucket, and reading a size that a user typed. Touches no pictures. The generated size is
always a bucket, never the typed pixels (spec section 8).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..config import BackboneConfig
from ..errors import RequestError

# Pixels per latent cell; every side of the table is rounded down to a multiple of it.
ALIGN = 16
# height x width, appended with these very pixels whatever the base size is, as the published table has them.
EXTRAS = ((1024, 768), (1280, 720), (768, 1024), (720, 1280))

_PIXELS = re.compile(r"(\d{1,6})\s*[xX×]\s*(\d{1,6})")
_RATIO = re.compile(r"(\d{1,6})\s*:\s*(\d{1,6})")
_INDEX = re.compile(r"<img_ratio_(\d{1,6})>")


@dataclass(frozen=True)
class Bucket:
    """One size; ``index`` is the number of its ``<img_ratio_i>`` token."""

    index: int
    height: int
    width: int

    @property
    def ratio(self) -> float:
        return self.height / self.width

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, cols) of latent cells, which is also its number of tokens along each axis."""
        return self.height // ALIGN, self.width // ALIGN


class Buckets:
    """All buckets of one ``image_base_size``, in the order of the ratio tokens."""

    def __init__(self, base_size: int, extras: Sequence[tuple[int, int]] = EXTRAS):
        if base_size < 2 * ALIGN:
            raise RequestError(f"image_base_size {base_size} is too small for a bucket table, it must be at least {2 * ALIGN}")
        self.base_size = base_size
        self.entries = tuple(Bucket(index, *size) for index, size in enumerate(_table(base_size, extras)))

    @classmethod
    def of(cls, config: BackboneConfig) -> "Buckets":
        """The table of one backbone: its base size, and its own extra sizes where its configuration names any."""
        return cls(config.image_base_size, EXTRAS if config.image_extra_sizes is None else config.image_extra_sizes)

    def __len__(self) -> int:
        return len(self.entries)

    def at(self, index: int) -> Bucket:
        """The bucket of ``<img_ratio_index>``.

        Raises:
            RequestError: there is no such bucket.
        """
        if not 0 <= index < len(self.entries):
            raise RequestError(f"there is no size <img_ratio_{index}>: the table has 0 to {len(self.entries) - 1}")
        return self.entries[index]

    def nearest(self, height: int, width: int) -> Bucket:
        """The bucket whose height/width is nearest; of two equally near ones the first (spec section 8).

        Raises:
            RequestError: a side is not positive.
        """
        if height <= 0 or width <= 0:
            raise RequestError(f"a size of {height} x {width} (height x width) has no ratio: both sides must be at least 1")
        return min(self.entries, key=lambda bucket: abs(bucket.ratio - height / width))

    def parse(self, size: str) -> Bucket:
        """The bucket for "HEIGHTxWIDTH", "WIDTH:HEIGHT" or "<img_ratio_i>" (spec section 8).

        Raises:
            RequestError: ``size`` is none of these.
        """
        text = size.strip()
        if match := _INDEX.fullmatch(text):
            return self.at(int(match[1]))
        # The two notations have opposite orders, as in the published pipeline.
        if match := _PIXELS.fullmatch(text):
            height, width = int(match[1]), int(match[2])
        elif match := _RATIO.fullmatch(text):
            width, height = int(match[1]), int(match[2])
        else:
            raise RequestError(
                f"size {size[:40]!r} is not understood: write height x width in pixels ('1024x768'), "
                f"width:height ('16:9') or one of '<img_ratio_0>' to '<img_ratio_{len(self.entries) - 1}>'")
        return self.nearest(height, width)


def _table(base: int, extras: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Walk from the square to 2:0.5 both ways in sixteenths of the base, then add the extras that bring a new ratio."""
    step, longest, shortest = base // 16, base * 2, base // 2
    sizes = [(base, base)]
    long, short = base, base
    while long < longest or short > shortest:
        long, short = min(long + step, longest), max(short - step, shortest)
        sizes += [(long, short), (short, long)]
    # Sorted before rounding: rounding may swap nothing but could make two entries equal.
    sizes.sort(key=lambda size: size[0] / size[1])
    table = [(height // ALIGN * ALIGN, width // ALIGN * ALIGN) for height, width in sizes]
    # Cross-multiplied, so that "the same ratio" is exact.
    table += [extra for extra in extras if all(extra[0] * width != extra[1] * height for height, width in table)]
    return table
