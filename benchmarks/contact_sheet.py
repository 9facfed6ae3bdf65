"""The contact sheet of the bundled checkpoint: held-out photos x instructions, painted through inference with its own thinking.

``python -m comfyui_hywu.benchmarks.contact_sheet [--checkpoint DIR] [--out FILE]``; scikit-image's photos, never trained on.
First block: every edit that does the same to any photo. Second: those that depend on the photo, beside what they were given.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..hywu_core.cli import BUNDLED
from ..hywu_core.edit import edit
from ..hywu_core.generator.handle import load_generator
from ..hywu_core.handle import load_model
from ..hywu_core.terminal import Terminal
from ..hywu_core.training import language
from ..hywu_core.training.edits import EDITS, damaged
from ..hywu_core.training.evaluate import views
from ..hywu_core.vision.buckets import Buckets
from .ablation import held_out_photos

SIDE, GAP, LABEL = 128, 4, 30
DOCS = Path(__file__).resolve().parent.parent / "docs"


def main() -> None:
    """Paint the sheet and save it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=BUNDLED)
    parser.add_argument("--out", type=Path, default=DOCS / "contact-sheet.jpg")
    options = parser.parse_args()
    model = load_model(options.checkpoint / "backbone", dtype=torch.float32)
    generator = load_generator(options.checkpoint / "generator", dtype=torch.float32)
    seen = [pixels for _, pixels, _ in views(held_out_photos(), Buckets.of(model.config))][:8:2]
    tick, done = Terminal("sheet"), 0
    same = [name for name in EDITS if not EDITS[name].by_photo]
    total = len(seen) * (len(same) + 8)

    def painted(pictures: list[np.ndarray], instruction: str) -> np.ndarray:
        nonlocal done
        done += 1
        tick(done, total)
        return np.asarray(edit(model, generator, [Image.fromarray(each) for each in pictures], instruction).picture)

    strips = []
    for part in (same[: (len(same) + 1) // 2], same[(len(same) + 1) // 2 :]):
        asked = {name: language.held_out(name, "en")[1] for name in part}
        columns = [("the photo", seen)]
        columns += [(asked[name], [painted([picture], asked[name]) for picture in seen]) for name in part]
        strips.append(columns)
    strips.append(by_photo(seen, painted))
    sheet = draw(strips)
    options.out.parent.mkdir(exist_ok=True)
    sheet.save(options.out, quality=88)
    print(options.out)


def by_photo(seen: list[np.ndarray], painted) -> list[tuple[str, list[np.ndarray]]]:
    """Given and made, in turn: exposure both ways, three damages, old, and the colours of the next photo."""
    def changed(change) -> list[np.ndarray]:
        return [(change(picture.astype(np.float32) / 255) * 255).round().clip(0, 255).astype(np.uint8) for picture in seen]

    expose, restore, old, match = (language.held_out(name, "en")[1] for name in ("expose", "restore", "old", "match"))
    columns = []
    for name, given, asked in (
        ("too dark", changed(lambda picture: picture**1.3 * 0.45), expose),
        ("too bright", changed(lambda picture: 1 - (1 - picture**0.7) * 0.75), expose),
        ("faded", changed(lambda picture: damaged(picture, "fade", np.random.default_rng(1))), restore),
        ("tinted", changed(lambda picture: damaged(picture, "cast", np.random.default_rng(3))), restore),
    ):
        columns += [(name, given), (asked, [painted([picture], asked) for picture in given])]
    columns.append((old, [painted([picture], old) for picture in seen]))
    others = [*seen[1:], seen[0]]
    columns.append((f"{match} (picture 2: the next row)", [
        painted([picture, other], match) for picture, other in zip(seen, others, strict=True)]))
    return columns


def draw(strips: list[list[tuple[str, list[np.ndarray]]]]) -> Image.Image:
    """Strips of labelled columns below each other."""
    rows = len(strips[0][0][1])
    height = LABEL + rows * (SIDE + GAP)
    sheet = Image.new("RGB", (max(map(len, strips)) * (SIDE + GAP), len(strips) * (height + GAP)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, columns in enumerate(strips):
        top = number * (height + GAP)
        for x, (label, pictures) in enumerate(columns):
            pen.multiline_text((x * (SIDE + GAP) + 2, top + 2), wrapped(label, font, pen), fill="black", font=font, spacing=1)
            for y, picture in enumerate(pictures):
                small = Image.fromarray(picture)
                small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
                sheet.paste(small, (x * (SIDE + GAP), top + LABEL + y * (SIDE + GAP)))
    return sheet


def wrapped(text: str, font, pen: ImageDraw.ImageDraw) -> str:
    """Two lines at most, each as wide as a column."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer, font=font) > SIDE - 4 and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines[:2])


if __name__ == "__main__":
    main()
