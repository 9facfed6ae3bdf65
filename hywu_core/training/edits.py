"""What each edit does to pixels: the ground truth of training and of every number that is reported.

Owns the edits, the damage that "restore" undoes, and the words for what a picture looks like. Pictures are float32 arrays
(h, w, 3) in 0..1. Knows no language (``language.py``) and no tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
DAMAGES = ("blur", "noise", "fade", "cast")
MIDDLE = 0.47  # the mean luma that "expose" brings a picture to


@dataclass(frozen=True)
class Edit:
    """One thing to ask for. ``apply(picture, other)`` makes the wanted picture; ``other`` is the second picture of two.

    word: names the edit in the thinking. by_photo: the right change depends on the photo. pictures: how many sources it takes.
    """

    name: str
    word: str
    apply: Callable[[np.ndarray, np.ndarray | None], np.ndarray] = field(repr=False)
    by_photo: bool = False
    pictures: int = 1


def luma(picture: np.ndarray) -> np.ndarray:
    """(h, w, 1)."""
    return (picture @ LUMA)[..., None]


def _affine(gain: tuple[float, ...], offset: tuple[float, ...]) -> Callable:
    return lambda picture, other: picture * np.array(gain, np.float32) + np.array(offset, np.float32)


def _gray(picture, other):
    return np.broadcast_to(luma(picture), picture.shape)


def _saturate(picture, other):
    return luma(picture) + 1.9 * (picture - luma(picture))


def _sepia(picture, other):
    return luma(picture) * np.array([1.08, 0.87, 0.62], np.float32) + np.array([0.06, 0.03, 0.0], np.float32)


def smooth(picture: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur with reflected borders."""
    radius = int(np.ceil(3 * sigma))
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2).astype(np.float32)
    taps /= taps.sum()
    for axis in (0, 1):
        pad = [(0, 0)] * 3
        pad[axis] = (radius, radius)
        padded = np.pad(picture, pad, mode="reflect")
        length = picture.shape[axis]
        picture = sum(tap * padded.take(range(start, start + length), axis) for start, tap in enumerate(taps))
    return picture


def _blur(picture, other):
    return smooth(picture, 3.0)


def _sharpen(picture, other):
    return picture + 1.3 * (picture - smooth(picture, 2.0))


def _pixelate(picture, other):
    """Blocks of 8 x 8 pixels; what does not fill a block at the border joins its neighbour."""
    h, w, _ = picture.shape
    blocks = picture[: h // 8 * 8, : w // 8 * 8].reshape(h // 8, 8, w // 8, 8, 3).mean((1, 3))
    rows, cols = np.minimum(np.arange(h) // 8, h // 8 - 1), np.minimum(np.arange(w) // 8, w // 8 - 1)
    return blocks[rows][:, cols]


def _expose(picture, other):
    """Gain to a fixed mean luma: dark pictures become brighter, bright ones darker."""
    return picture * np.clip(MIDDLE / max(float(luma(picture).mean()), 0.02), 0.5, 3.0)


def _old(picture, other):
    """Brown tones in a fixed, faded range, whatever the range of the photo was."""
    light = luma(picture)
    light = 0.56 + 0.16 * (light - light.mean()) / max(float(light.std()), 0.03)
    return light * np.array([1.05, 0.9, 0.7], np.float32) + np.array([0.04, 0.03, 0.02], np.float32)


def _match(picture, other):
    """Mean and spread of every colour of the other picture (Reinhard et al. 2001, in RGB)."""
    mean, spread = picture.mean((0, 1)), np.maximum(picture.std((0, 1)), 0.04)
    gain = np.clip(other.std((0, 1)) / spread, 0.4, 2.5)
    return (picture - mean) * gain + other.mean((0, 1))


EDITS: dict[str, Edit] = {
    edit.name: edit
    for edit in (
        Edit("brighten", "brighter", _affine((0.80,) * 3, (0.30,) * 3)),
        Edit("darken", "darker", _affine((0.45,) * 3, (0.0,) * 3)),
        Edit("warm", "warmer", _affine((1.15, 0.97, 0.62), (0.06, 0.02, 0.0))),
        Edit("cool", "cooler", _affine((0.62, 0.95, 1.15), (0.0, 0.02, 0.08))),
        Edit("gray", "gray", _gray),
        Edit("saturate", "colorful", _saturate),
        Edit("blur", "blurry", _blur),
        Edit("sharpen", "sharp", _sharpen),
        Edit("contrast", "contrasty", _affine((1.6,) * 3, (-0.27,) * 3)),
        Edit("fade", "faded", _affine((0.45,) * 3, (0.36,) * 3)),
        Edit("green", "greener", _affine((0.78, 1.05, 0.75), (0.0, 0.07, 0.0))),
        Edit("pink", "pinker", _affine((1.05, 0.72, 0.95), (0.08, 0.0, 0.08))),
        Edit("sepia", "sepia", _sepia),
        Edit("invert", "inverted", _affine((-1.0,) * 3, (1.0,) * 3)),
        Edit("pixelate", "pixelated", _pixelate),
        Edit("expose", "balanced", _expose, by_photo=True),
        Edit("restore", "restored", lambda picture, other: picture, by_photo=True),  # the source is damaged instead
        Edit("old", "old", _old, by_photo=True),
        Edit("match", "matched", _match, by_photo=True, pictures=2),
    )
}


def edited(picture: np.ndarray, name: str, other: np.ndarray | None = None) -> np.ndarray:
    """What an edit makes of a picture. For "restore" hand in the undamaged picture: it is what is wanted."""
    return np.clip(EDITS[name].apply(picture, other), 0, 1).astype(np.float32)


def damaged(picture: np.ndarray, damage: str, random: np.random.Generator) -> np.ndarray:
    """A picture as "restore" finds it; how strong the damage is, and the colour of a cast, is drawn."""
    if damage == "blur":
        out = smooth(picture, random.uniform(2.0, 3.5))
    elif damage == "noise":
        out = picture + random.normal(0, random.uniform(0.12, 0.2), picture.shape)
    elif damage == "fade":
        keep = random.uniform(0.3, 0.5)
        out = keep * (0.3 * luma(picture) + 0.7 * picture) + (0.95 - keep) * random.uniform(0.6, 0.9)
    elif damage == "cast":
        gain = np.array([(1.15, 0.95, 0.45), (0.5, 0.9, 1.2), (0.6, 1.15, 0.6), (1.1, 0.55, 1.0)], np.float32)
        out = picture * (gain[random.integers(len(gain))] * random.uniform(0.9, 1.05, 3))
    else:
        raise ValueError(f"damage {damage!r} is none of {DAMAGES}")
    return np.clip(out, 0, 1).astype(np.float32)


def describe(picture: np.ndarray) -> tuple[str, str]:
    """(brightness, hue) of a picture, as the thinking words them."""
    mean = picture.reshape(-1, 3).mean(0)
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
