"""How good a small checkpoint is: held-out photos x held-out phrasings, the model's own thinking, through inference itself.

Owns the cases, the measures (PSNR and SSIM against the true edit), and painting the variants that the paper compares. Photos
are the caller's; scikit-image (for SSIM) is imported when it is first needed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..condition import Condition, encode
from ..errors import RequestError
from ..generator.handle import GeneratorHandle, write_lora
from ..handle import ModelHandle
from ..lora.attach import inject
from ..lora.value import LoRA
from ..progress import Tick, silent
from ..sampling.denoise import sample
from ..think import think
from ..vision.buckets import Bucket, Buckets
from ..vision.pictures import load_picture
from . import language
from .edits import DAMAGES, EDITS, damaged, edited

DECODE_AT_ONCE = 8
ZOOM = 0.6  # the second view of every photo shows this much of each side


@dataclass(frozen=True)
class Case:
    """One request whose right answer is known: pictures uint8, ``wanted`` (h, w, 3) in 0..1."""

    photo: str
    edit: str
    instruction: str
    source: np.ndarray
    other: np.ndarray | None
    wanted: np.ndarray
    bucket: Bucket

    @property
    def pictures(self) -> list[Image.Image]:
        return [Image.fromarray(each) for each in (self.source, self.other) if each is not None]


@dataclass(frozen=True)
class Asked:
    """A case with what the model thought of it, and the condition that follows."""

    case: Case
    thinking: str
    condition: Condition


def views(paths: Sequence[Path], buckets: Buckets) -> list[tuple[str, np.ndarray, Bucket]]:
    """Two views of every photo, the whole and a closer one off the middle, cut to their buckets: (name, pixels, bucket)."""
    found = []
    for path in paths:
        photo = load_picture(path)
        for number, part in enumerate((1.0, ZOOM)):
            width, height = int(photo.width * part), int(photo.height * part)
            left, top = (photo.width - width) // 3, (photo.height - height) // 3
            view = photo.crop((left, top, left + width, top + height))
            bucket = buckets.nearest(view.height, view.width)
            scale = max(bucket.width / view.width, bucket.height / view.height)
            view = view.resize((max(bucket.width, round(view.width * scale)), max(bucket.height, round(view.height * scale))),
                               Image.Resampling.LANCZOS)
            left, top = (view.width - bucket.width) // 2, (view.height - bucket.height) // 2
            view = view.crop((left, top, left + bucket.width, top + bucket.height))
            found.append((f"{path.stem}-{number}", np.asarray(view), bucket))
    return found


def cases(paths: Sequence[Path], buckets: Buckets, edits: Iterable[str], seed: int = 0, every: int = 1) -> list[Case]:
    """Every view (or every second, ...) x every edit; phrasings go round, two English ones to a Chinese one.

    The same for the same seed.

    "expose" gets the views too dark and too bright in turn, "restore" gets them damaged, each damage in turn.
    """
    seen, made = views(paths, buckets)[::every], []
    for edit in edits:
        asked = {each: language.held_out(edit, each) for each in language.LANGUAGES}
        for number, (name, pixels, bucket) in enumerate(seen):
            spoken = asked["zh" if number % 3 == 2 else "en"]
            picture, other = pixels.astype(np.float32) / 255, None
            random = np.random.default_rng([seed, number])
            clean = picture
            if edit == "expose":
                picture = picture**1.3 * 0.45 if number % 2 else 1 - (1 - picture**0.7) * 0.75
            elif edit == "restore":
                picture = damaged(picture, DAMAGES[number % len(DAMAGES)], random)
            if EDITS[edit].pictures == 2:
                other = seen[(number + 3) % len(seen)][1]
            source = (picture * 255).round().astype(np.uint8)
            shown = source.astype(np.float32) / 255
            wanted = edited(clean if edit == "restore" else shown, edit, None if other is None else other / np.float32(255))
            made.append(Case(name, edit, spoken[number % len(spoken)], source, other, wanted, bucket))
    return made


def ask(model: ModelHandle, asked: Sequence[Case], on_tick: Tick = silent) -> list[Asked]:
    """Let the model think greedily about every case, and encode it."""
    made = []
    on_tick(0, len(asked), None)
    for number, case in enumerate(asked):
        thinking = think(model, case.pictures, case.instruction, temperature=0.0)
        made.append(Asked(case, thinking, encode(model, case.pictures, case.instruction, thinking)))
        on_tick(number + 1, len(asked), None)
    return made


def thinking_accuracy(asked: Iterable[Asked]) -> dict[str, float]:
    """edit -> share of the cases in which the thinking names it."""
    right: dict[str, list[bool]] = {}
    for each in asked:
        right.setdefault(each.case.edit, []).append(language.names_edit(each.thinking, each.case.edit))
    return {edit: sum(found) / len(found) for edit, found in right.items()}


def phrasing_accuracy(model: ModelHandle, picture: Image.Image, second: Image.Image, edits: Iterable[str]) -> dict[str, float]:
    """edit -> share of ALL held-out phrasings, both languages, whose thinking names it."""
    shares = {}
    for edit in edits:
        pictures = [picture, second][: EDITS[edit].pictures]
        texts = [text for each in language.LANGUAGES for text in language.held_out(edit, each)]
        right = [language.names_edit(think(model, pictures, text, temperature=0.0), edit) for text in texts]
        shares[edit] = sum(right) / len(right)
    return shares


def paint(
    model: ModelHandle, asked: Sequence[Asked], loras: Sequence[LoRA | None], *, steps: int | None = None,
    on_tick: Tick = silent,
) -> list[np.ndarray]:
    """Every case painted with its LoRA (None: the plain backbone), as uint8 pictures."""
    latents = []
    on_tick(0, len(asked), None)
    for number, (each, lora) in enumerate(zip(asked, loras, strict=True)):
        handle = model if lora is None else inject(model, lora)
        latents.append(sample(handle, each.condition, steps=steps, size=f"<img_ratio_{each.case.bucket.index}>"))
        on_tick(number + 1, len(asked), None)
    return decode_all(model, latents)


@torch.no_grad()
def decode_all(model: ModelHandle, latents: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """Latents (1, c, h, w) as pictures, several of one size at a time."""
    vae, pictures = model.backbone.vae, [None] * len(latents)
    shapes: dict[tuple[int, ...], list[int]] = {}
    for number, latent in enumerate(latents):
        shapes.setdefault(tuple(latent.shape), []).append(number)
    for numbers in shapes.values():
        for start in range(0, len(numbers), DECODE_AT_ONCE):
            part = numbers[start : start + DECODE_AT_ONCE]
            pixels = vae.decode(vae.unscale(torch.cat([latents[number] for number in part])))
            as_bytes = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
            for number, picture in zip(part, as_bytes, strict=True):
                pictures[number] = picture
    return pictures


@torch.no_grad()
def through_vae(model: ModelHandle, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Pictures in 0..1 encoded and decoded: what no variant can beat by much."""
    vae = model.backbone.vae
    return decode_all(model, [
        vae.scale(vae.encode(torch.from_numpy(picture * 2 - 1).permute(2, 0, 1)[None]).mean) for picture in pictures])


def written(generator: GeneratorHandle, asked: Sequence[Asked]) -> list[LoRA]:
    """The LoRA of every case."""
    return [write_lora(generator, each.condition) for each in asked]


def shuffled(asked: Sequence[Asked], loras: Sequence[LoRA]) -> list[LoRA]:
    """Every case with the LoRA that was written for another edit of another photo; all other edits get their turn.

    Raises:
        RequestError: there is only one edit or one photo.
    """
    edits, chosen = list(dict.fromkeys(each.case.edit for each in asked)), []
    for number, each in enumerate(asked):
        others = [edit for edit in edits if edit != each.case.edit]
        if not others:
            raise RequestError(f"the cases have {len(edits)} edit, at least 2 are needed to take a LoRA of another one")
        chosen.append(loras[_elsewhere(asked, number, others[number % len(others)])])
    return chosen


def of_another_photo(asked: Sequence[Asked], loras: Sequence[LoRA]) -> list[LoRA]:
    """Every case with the LoRA that was written for the same edit of another photo. Raises RequestError for one photo."""
    return [loras[_elsewhere(asked, number, each.case.edit)] for number, each in enumerate(asked)]


def _elsewhere(asked: Sequence[Asked], number: int, edit: str) -> int:
    """The case of ``edit`` on another photo than case ``number``, an odd number of views on: the other exposure."""
    def photo(index: int) -> str:
        return asked[index].case.photo.rsplit("-", 1)[0]

    rows = [index for index, each in enumerate(asked) if each.case.edit == edit]
    place = number % len(rows)
    for step in (*range(3, len(rows), 2), *range(1, len(rows))):
        found = rows[(place + step) % len(rows)]
        if photo(found) != photo(number):
            return found
    raise RequestError("the cases show 1 photo, at least 2 are needed to take a LoRA of another one")


def psnr(picture: np.ndarray, wanted: np.ndarray) -> float:
    """dB between a uint8 picture and one in 0..1."""
    error = np.square(picture.astype(np.float32) / 255 - wanted).mean()
    return float(-10 * np.log10(max(error, 1e-9)))


def ssim(picture: np.ndarray, wanted: np.ndarray) -> float:
    """Structural similarity (scikit-image's, Gaussian window, over the three channels)."""
    from skimage.metrics import structural_similarity

    return float(structural_similarity(picture.astype(np.float32) / 255, wanted, data_range=1.0, channel_axis=2,
                                       gaussian_weights=True, sigma=1.5, use_sample_covariance=False))


def scores(asked: Sequence[Asked], pictures: Sequence[np.ndarray]) -> dict[str, dict[str, list[float]]]:
    """edit -> {"psnr": [...], "ssim": [...]}, one entry a case."""
    table: dict[str, dict[str, list[float]]] = {}
    for each, picture in zip(asked, pictures, strict=True):
        row = table.setdefault(each.case.edit, {"psnr": [], "ssim": []})
        row["psnr"].append(psnr(picture, each.case.wanted))
        row["ssim"].append(ssim(picture, each.case.wanted))
    return table
