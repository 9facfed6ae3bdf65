"""The means to draw plots with Pillow alone: a sheet, fonts that have the characters, colour maps, scales and heat maps.

Owns how things look; what is shown is ``pictures.py``'s and ``map_picture.py``'s. Sheets are drawn twice as large and shrunk,
as Pillow draws jagged lines.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FINE = 2  # times larger while drawn
INK, FAINT, GRID, PAPER, NOTHING = "#1b1b1f", "#5f6068", "#d9dae0", "#ffffff", "#c9cad0"
# Okabe and Ito's colours, which people with any colour vision tell apart; their yellow is too pale on white.
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#1b1b1f", "#8c6bb1")
# Fonts with Chinese characters by the file names of Linux, Windows and macOS; Pillow looks for them where each keeps its fonts.
CJK_FONTS = (
    "NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf", "SourceHanSansSC-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf", "uming.ttc", "msyh.ttc", "simhei.ttf", "simsun.ttc", "PingFang.ttc", "Hiragino Sans GB.ttc",
    "STHeiti Light.ttc", "Arial Unicode.ttf")
# Nine of the colours of matplotlib's viridis (perceptually uniform, CC0), and ColorBrewer's RdBu, reversed.
_VIRIDIS = ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")
_BLUE_RED = ("2166ac", "4393c3", "92c5de", "d1e5f0", "f7f7f7", "fddbc7", "f4a582", "d6604d", "b2182b")
Colours = Callable[[np.ndarray], np.ndarray]


# ---- text


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


@functools.cache
def cjk_font(size: int) -> ImageFont.FreeTypeFont | None:
    """A font of the system with Chinese characters, or None."""
    for name in CJK_FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue  # not on this system
    return None


@functools.lru_cache(maxsize=4096)
def _has(letters: ImageFont.FreeTypeFont, character: str) -> bool:
    """Whether a font has a character; those that it has not are all drawn as the same box."""
    return character == " " or bytes(letters.getmask(character)) != bytes(letters.getmask("\uffff"))


def drawable(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont] | None:
    """A text in one line and a font that has its characters; None if most of it would be boxes.

    Single characters that no font has (emoji) are left out.
    """
    text = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    best = None
    for letters in (font(size), cjk_font(size)):
        if letters is None:
            continue
        kept = "".join(character for character in text if _has(letters, character))
        if best is None or len(kept) > len(best[0]):
            best = kept, letters
    if len(best[0].replace(" ", "")) < 0.7 * len(text.replace(" ", "")):
        return None
    return best


def short(value: float) -> str:
    """Three digits, or a whole number: 0.0123, 1807."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


# ---- colours and scales


def viridis(share: np.ndarray) -> np.ndarray:
    """0..1 -> RGB (..., 3) uint8, dark to light."""
    return _between(_VIRIDIS, share)


def blue_red(share: np.ndarray) -> np.ndarray:
    """0..1 -> RGB (..., 3) uint8, white in the middle."""
    return _between(_BLUE_RED, share)


def _between(anchors: Sequence[str], share: np.ndarray) -> np.ndarray:
    table = np.array([[int(anchor[at : at + 2], 16) for at in (0, 2, 4)] for anchor in anchors], dtype=float)
    place = np.clip(share, 0, 1) * (len(anchors) - 1)
    channels = [np.interp(place, np.arange(len(anchors)), table[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


@dataclass(frozen=True)
class Scale:
    """From values to 0..1, in proportion or by their logarithm."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def of(cls, values: np.ndarray, log: bool | None = None) -> "Scale":
        """Over all finite values from 0; logarithmic where the largest is more than 30 times the smallest that is not 0."""
        found = values[np.isfinite(values) & (values > 0)]
        if not found.size:
            return cls(0.0, 1.0)
        high = float(found.max())
        low = max(float(found.min()), high * 1e-6)
        if log is None:
            log = high > 30 * low
        return cls(low, high, True) if log and high > low else cls(0.0, high)

    def share(self, values: np.ndarray) -> np.ndarray:
        if self.log:
            with np.errstate(divide="ignore"):
                return (np.log(values) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (values - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Five values, evenly spaced."""
        parts = [step / 4 for step in range(5)]
        if self.log:
            return [self.low * (self.high / self.low) ** part for part in parts]
        return [self.low + (self.high - self.low) * part for part in parts]


# ---- the sheet


class Sheet:
    """A white page; coordinates and sizes are those of the finished picture."""

    def __init__(self, width: int, height: int):
        self.width, self.height = int(width), int(height)
        self.image = Image.new("RGB", (self.width * FINE, self.height * FINE), PAPER)
        self._draw = ImageDraw.Draw(self.image, "RGBA")

    def text(
        self, x: float, y: float, text: str, size: int = 15, fill: str = INK, anchor: str = "la", width: float = 0,
    ) -> None:
        """One line, cut off behind ``width`` pixels if that is given; nothing if no font has its characters."""
        if width:
            text = text[: int(width) + 1]  # no character is narrower than a pixel; a file's instruction may be endless
        found = drawable(text, size * FINE)
        if found is None:
            return
        text, letters = found
        if width and letters.getlength(text) > width * FINE:
            while text and letters.getlength(text + "...") > width * FINE:
                text = text[:-1]
            text += "..."
        self._draw.text((x * FINE, y * FINE), text, font=letters, fill=fill, anchor=anchor)

    def rectangle(self, x: float, y: float, width: float, height: float, fill=None, outline=None) -> None:
        self._draw.rectangle([x * FINE, y * FINE, (x + width) * FINE - 1, (y + height) * FINE - 1], fill=fill, outline=outline,
                             width=FINE)

    def line(self, points: Sequence[tuple[float, float]], fill: str, width: float = 1) -> None:
        self._draw.line([(x * FINE, y * FINE) for x, y in points], fill=fill, width=round(width * FINE), joint="curve")

    def polygon(self, points: Sequence[tuple[float, float]], fill: str) -> None:
        self._draw.polygon([(x * FINE, y * FINE) for x, y in points], fill=fill)

    def dot(self, x: float, y: float, radius: float, fill: str, outline: str = PAPER) -> None:
        self._draw.ellipse([(x - radius) * FINE, (y - radius) * FINE, (x + radius) * FINE, (y + radius) * FINE], fill=fill,
                           outline=outline, width=FINE)

    def paste(self, picture: Image.Image, x: float, y: float, size: tuple[int, int]) -> None:
        resized = picture.convert("RGB").resize((size[0] * FINE, size[1] * FINE), Image.Resampling.LANCZOS)
        self.image.paste(resized, (round(x * FINE), round(y * FINE)))

    def done(self) -> Image.Image:
        return self.image.resize((self.width, self.height), Image.Resampling.LANCZOS)


# ---- heat maps


@dataclass(frozen=True)
class Panel:
    """One heat map. values (rows, columns), NaN where there is nothing; the bar beside it is labelled ``unit``."""

    title: str
    values: np.ndarray
    scale: Scale
    unit: str
    rows: Sequence[str]
    row_axis: str
    column_axis: str = "layer"
    colours: Colours = viridis


LEFT, RIGHT, TOP, BOTTOM = 270, 120, 62, 58  # around the cells of a panel


def heat_maps(title: str, panels: Sequence[Panel], lines: Sequence[str] = ()) -> Image.Image:
    """Panels one below the other, ``lines`` of text under them."""
    cells = [_cell_size(panel) for panel in panels]
    widths = [panel.values.shape[1] * cell[0] for panel, cell in zip(panels, cells, strict=True)]
    tops = [TOP if panel.title else TOP - 24 for panel in panels]
    heights = [top + panel.values.shape[0] * cell[1] + BOTTOM for top, panel, cell in zip(tops, panels, cells, strict=True)]
    sheet = Sheet(LEFT + max(640, *widths) + RIGHT, 56 + sum(heights) + 24 * len(lines) + 12 * bool(lines))
    sheet.text(24, 18, title, 22, width=sheet.width - 48)
    y = 56
    for panel, cell, top, height in zip(panels, cells, tops, heights, strict=True):
        _heat_map(sheet, panel, LEFT, y + top, cell)
        y += height
    for number, line in enumerate(lines):
        sheet.text(24, y + 24 * number, line, 15, FAINT, width=sheet.width - 48)
    return sheet.done()


def _cell_size(panel: Panel) -> tuple[int, int]:
    rows, columns = panel.values.shape
    return min(96, max(6, 960 // columns)), min(40, max(9, 560 // rows))


def _heat_map(sheet: Sheet, panel: Panel, x: int, y: int, cell: tuple[int, int]) -> None:
    rows, columns = panel.values.shape
    width, height = columns * cell[0], rows * cell[1]
    sheet.text(24, y - 34, panel.title, 17, width=sheet.width - 48)
    colours = panel.colours(np.nan_to_num(panel.scale.share(panel.values), nan=0.0, neginf=0.0))
    colours[~np.isfinite(panel.values)] = [int(NOTHING[at : at + 2], 16) for at in (1, 3, 5)]
    cells = Image.fromarray(colours).resize((width * FINE, height * FINE), Image.Resampling.NEAREST)
    sheet.image.paste(cells, (x * FINE, y * FINE))
    if cell[0] >= 44 and cell[1] >= 18:
        for row, column in np.ndindex(rows, columns):
            if np.isfinite(value := panel.values[row, column]):
                light = colours[row, column] @ np.array([0.299, 0.587, 0.114]) > 140
                at = x + (column + 0.5) * cell[0], y + (row + 0.5) * cell[1]
                sheet.text(*at, short(value), 13, INK if light else PAPER, "mm")
    every = max(1, math.ceil(15 / cell[1]))
    for row in range(0, rows, every):
        sheet.text(x - 10, y + (row + 0.5) * cell[1], panel.rows[row], 14, INK, "rm", width=LEFT - 20)
    every = max(1, math.ceil(26 / cell[0]))
    for column in range(0, columns, every):
        sheet.text(x + (column + 0.5) * cell[0], y + height + 6, str(column), 14, INK, "ma")
    sheet.text(x + width / 2, y + height + 26, panel.column_axis, 15, FAINT, "ma")
    sheet.text(24, y + height + 26, panel.row_axis, 15, FAINT)
    _bar(sheet, panel, x + width + 22, y, max(height, 110))


def _bar(sheet: Sheet, panel: Panel, x: int, y: int, height: int) -> None:
    """The colour bar, its numbers beside it and what they are above."""
    steps = panel.colours(np.linspace(1, 0, height * FINE))[:, None]
    sheet.image.paste(Image.fromarray(np.repeat(steps, 16 * FINE, axis=1)), (x * FINE, y * FINE))
    for number, value in enumerate(panel.scale.ticks()):
        at = y + height * (1 - number / 4)
        sheet.line([(x + 16, at), (x + 20, at)], FAINT)
        sheet.text(x + 24, at, short(value), 13, INK, "lm")
    sheet.text(x + 20, y - 12, panel.unit + (" (log)" if panel.scale.log else ""), 13, FAINT, "mb")
