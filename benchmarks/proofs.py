"""Four small experiments that show what generated weights are, on held-out photos with the bundled checkpoint; a minute each.

    python -m comfyui_hywu.benchmarks.proofs opposite     opposite edits need different weights, and what their mean paints
    python -m comfyui_hywu.benchmarks.proofs shuffled     the weights of another request do not do
    python -m comfyui_hywu.benchmarks.proofs strength     from pushing away over nothing to too much
    python -m comfyui_hywu.benchmarks.proofs blend        two LoRAs added: which pairs do both edits

Each writes its pictures to docs/proofs/, its figures to results/proofs.json, and the page docs/proofs.md again. The photos are
scikit-image's, the phrasings held out, the thinking is the model's own; PSNR in dB against the true edit. Nothing is chosen by
hand but the edits that are named here.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..hywu_core.cli import BUNDLED
from ..hywu_core.condition import encode
from ..hywu_core.generator.handle import load_generator, write_lora
from ..hywu_core.handle import ModelHandle, load_model
from ..hywu_core.lora.algebra import blend, mean, scaled
from ..hywu_core.lora.sketch import sketch
from ..hywu_core.lora.spectrum import compare
from ..hywu_core.lora.value import LoRA
from ..hywu_core.terminal import Terminal
from ..hywu_core.think import think
from ..hywu_core.training import evaluate, language
from ..hywu_core.training.edits import edited
from ..hywu_core.training.evaluate import Asked, Case
from ..hywu_core.vision.buckets import Buckets
from .ablation import STEPS, held_out_photos
from .contact_sheet import draw
from .record import RESULTS, machine

DOCS = Path(__file__).resolve().parent.parent / "docs"
OPPOSITE = (("blur", "sharpen"), ("brighten", "darken"), ("warm", "cool"), ("gray", "saturate"), ("green", "pink"))
SHUFFLED = ("brighten", "cool", "fade", "sepia", "invert", "pixelate")
SWEPT = ("darken", "warm", "green", "pixelate")
STRENGTHS = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
BLENDED = (("darken", "green"), ("warm", "fade"), ("sepia", "pixelate"), ("invert", "pixelate"))
SHOWN = 3  # photos in a picture; all of them are in the figures


class Studio:
    """The bundled checkpoint and the held-out photos."""

    def __init__(self):
        self.model: ModelHandle = load_model(BUNDLED / "backbone", dtype=torch.float32)
        self.generator = load_generator(BUNDLED / "generator", dtype=torch.float32)
        self.views = evaluate.views(held_out_photos(), Buckets.of(self.model.config))[::2]

    def ask(self, edit: str) -> list[Asked]:
        """The edit on every photo, in the first held-out English phrasing."""
        instruction, asked = language.held_out(edit, "en")[0], []
        for name, pixels, bucket in self.views:
            picture = Image.fromarray(pixels)
            thinking = think(self.model, [picture], instruction, temperature=0.0)
            wanted = edited(pixels.astype(np.float32) / 255, edit, None)
            asked.append(Asked(Case(name, edit, instruction, pixels, None, wanted, bucket), thinking,
                               encode(self.model, [picture], instruction, thinking)))
        return asked

    def write(self, asked: Sequence[Asked]) -> list[LoRA]:
        return [write_lora(self.generator, each.condition) for each in asked]

    def paint(self, asked: Sequence[Asked], loras: Sequence[LoRA | None]) -> list[np.ndarray]:
        return evaluate.paint(self.model, asked, loras, steps=STEPS)


def decibels(pictures: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float:
    """Mean PSNR."""
    return round(float(np.mean([evaluate.psnr(*pair) for pair in zip(pictures, wanted, strict=True)])), 2)


def wanted(asked: Sequence[Asked]) -> list[np.ndarray]:
    return [each.case.wanted for each in asked]


def as_bytes(pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [(picture * 255).round().astype(np.uint8) for picture in pictures]


def sources(asked: Sequence[Asked]) -> list[np.ndarray]:
    return [each.case.source for each in asked]


def opposite(studio: Studio) -> tuple[list[dict], list]:
    """Cosines between the LoRAs of opposite edits; what their mean paints when asked for either."""
    rows, strips, tick = [], [], Terminal("opposite")
    requests = {name: studio.ask(name) for names in OPPOSITE for name in names}
    written = {name: studio.write(asked) for name, asked in requests.items()}
    # What all these LoRAs have in common opens the base's skills; what is left is what each of them says.
    sketches = {name: torch.stack([sketch(lora) for lora in loras]) for name, loras in written.items()}
    common_D = torch.cat(list(sketches.values())).mean(0)
    for number, names in enumerate(OPPOSITE):
        tick(number, len(OPPOSITE))
        asked, loras = [requests[name] for name in names], [written[name] for name in names]
        between = [compare(one, two).cosine for one, two in zip(*loras, strict=True)]
        own = torch.nn.functional.cosine_similarity(*(sketches[name] - common_D for name in names))
        within = [compare(*pair).cosine for same in loras for pair in itertools.pairwise(same)]
        columns = [("the photo", sources(asked[0])[:SHOWN])]
        for name, each, own_loras in zip(names, asked, loras, strict=True):
            right = studio.paint(each, own_loras)
            both = studio.paint(each, [mean(pair) for pair in zip(*loras, strict=True)])
            rows.append({
                "edit": name, "cosine to the opposite": round(float(np.mean(between)), 2),
                "the same without what all have in common": round(float(own.mean()), 2),
                "cosine to itself on other photos": round(float(np.mean(within)), 2),
                "own LoRA": decibels(right, wanted(each)), "mean of both": decibels(both, wanted(each)),
                "photo unchanged": decibels(sources(each), wanted(each))})
            columns += [(f"{name}: its own LoRA", right[:SHOWN]), (f"{name}: the mean of both", both[:SHOWN])]
        strips.append(columns)
    tick(len(OPPOSITE), len(OPPOSITE))
    return rows, strips[:2]


def shuffled(studio: Studio) -> tuple[list[dict], list]:
    """Every request with its own LoRA, and with the LoRA of another edit on another photo."""
    tick, asked = Terminal("shuffled"), []
    for number, name in enumerate(SHUFFLED):
        tick(number, len(SHUFFLED) + 1)
        asked += studio.ask(name)
    loras = studio.write(asked)
    right, wrong = (studio.paint(asked, chosen) for chosen in (loras, evaluate.shuffled(asked, loras)))
    rows, columns = [], [("the photo", sources(asked[: len(studio.views)])[:SHOWN])]
    for name in SHUFFLED:
        of = [number for number, each in enumerate(asked) if each.case.edit == name]
        each = [asked[number] for number in of]
        made = [[pictures[number] for number in of] for pictures in (right, wrong)]
        rows.append({"edit": name, "own LoRA": decibels(made[0], wanted(each)),
                     "another request's": decibels(made[1], wanted(each)),
                     "photo unchanged": decibels(sources(each), wanted(each))})
        columns += [(f"{name}: its own", made[0][:SHOWN]), (f"{name}: another's", made[1][:SHOWN])]
    tick(len(SHUFFLED) + 1, len(SHUFFLED) + 1)
    return rows, [columns[:7], [columns[0], *columns[7:]]]


def strength(studio: Studio) -> tuple[list[dict], list]:
    """The same LoRA times -1 to 2."""
    rows, columns, tick = [], [], Terminal("strength")
    for number, name in enumerate(SWEPT):
        tick(number, len(SWEPT))
        asked = studio.ask(name)
        loras = studio.write(asked)
        painted = [studio.paint(asked, [scaled(lora, factor) for lora in loras]) for factor in STRENGTHS]
        rows.append({"edit": name} | {
            f"{factor:g}": decibels(pictures, wanted(asked)) for factor, pictures in zip(STRENGTHS, painted, strict=True)})
        columns.append([("the photo", sources(asked)[:1])] + [
            (f"{name} x {factor:g}", pictures[:1]) for factor, pictures in zip(STRENGTHS, painted, strict=True)])
    tick(len(SWEPT), len(SWEPT))
    return rows, columns


def blends(studio: Studio) -> tuple[list[dict], list]:
    """Two LoRAs added, asked for the first edit: against both edits done one after the other."""
    rows, strips, tick = [], [], Terminal("blend")
    requests = {name: studio.ask(name) for name in dict.fromkeys(itertools.chain(*BLENDED))}
    written = {name: studio.write(asked) for name, asked in requests.items()}
    by_photo = list(zip(*written.values(), strict=True))  # all edits of each photo
    for number, (first, second) in enumerate(BLENDED):
        tick(number, len(BLENDED))
        one, two = requests[first], requests[second]
        loras = list(zip(written[first], written[second], strict=True))
        both = [edited(each.case.wanted, second, None) for each in one]
        arms = {"first alone": [pair[0] for pair in loras], "second alone": [pair[1] for pair in loras],
                "half and half": [blend(pair, (0.5, 0.5)) for pair in loras],
                "sum": [blend(pair, (1.0, 1.0)) for pair in loras],
                "sum less the mean": [blend((*pair, *every), (1.0, 1.0, *[-1 / len(every)] * len(every)))
                                      for pair, every in zip(loras, by_photo, strict=True)]}
        painted = {name: studio.paint(two if name == "second alone" else one, chosen) for name, chosen in arms.items()}
        rows.append({"edits": f"{first} + {second}"} | {name: decibels(made, both) for name, made in painted.items()} | {
            "photo unchanged": decibels(sources(one), both)})
        strips.append([("the photo", sources(one)[:2])] + [
            ({"first alone": first, "second alone": second}.get(name, name), made[:2]) for name, made in painted.items()
        ] + [("both edits, true", as_bytes(both)[:2])])
    tick(len(BLENDED), len(BLENDED))
    return rows, strips


# Name -> the experiment, and what the page says above its table.
PROOFS = {
    "opposite": (opposite, "Opposite edits need different weights", (
        "Cosines of LoRAs written for opposite edits of one photo, as they are and less the mean of all in this table (from "
        "sketches, within 0.07), beside those of one edit on different photos; and what the mean of an opposite pair paints "
        "when it is asked for either (PSNR, dB). The base reads the instruction, too: where opposite LoRAs have most in common "
        "it tells the edits apart by itself, and their mean still does both. Sharpening stays below the untouched photo "
        "even with its own LoRA.")),
    "shuffled": (shuffled, "The weights of another request do not do", (
        "Every request painted with the LoRA that was written for it, and with one that was written for another edit of "
        "another photo (PSNR, dB).")),
    "strength": (strength, "Strength", (
        "One LoRA times -1 to 2: PSNR (dB) against the true edit, which strength 1 is to paint.")),
    "blend": (blends, "Blends", (
        "Two LoRAs of one photo blended, asked for the first edit in words: PSNR (dB) against both edits done one after the "
        "other. All LoRAs have much in common, which a plain sum counts twice; the last column takes the mean of this table's "
        "LoRAs away once. A blend that stays below the better single LoRA does not do both.")),
}


def table(rows: list[dict]) -> list[str]:
    names = list(rows[0])
    return ["| " + " | ".join(names) + " |", "| --- |" + " --- |" * (len(names) - 1),
            *("| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows)]


def page(found: dict) -> str:
    """docs/proofs.md from what has been measured."""
    lines = ["# What generated weights are", "",
             "Held-out photos and phrasings, the bundled `hywu-mini`, its own thinking. Each part is made by one command.", ""]
    for name, (_, title, text) in PROOFS.items():
        if name in found:
            lines += [f"## {title}", "", f"`python -m comfyui_hywu.benchmarks.proofs {name}`", "", text, "",
                      *table(found[name]), "", f"![{title}](proofs/{name}.jpg)", ""]
    return "\n".join(lines)


def main() -> None:
    """Run what is named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="|".join(PROOFS), help="default: all")
    options = parser.parse_args()
    if unknown := set(options.names) - set(PROOFS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(PROOFS)}")
    studio, results = Studio(), RESULTS / "proofs.json"
    (DOCS / "proofs").mkdir(exist_ok=True)
    found = json.loads(results.read_text()) if results.is_file() else {}
    for name in options.names or PROOFS:
        rows, strips = PROOFS[name][0](studio)
        found |= {"machine": machine(), name: rows}
        draw(strips).save(DOCS / "proofs" / f"{name}.jpg", quality=86)
        results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print("\n".join(table(rows)))
    (DOCS / "proofs.md").write_text(page(found), encoding="utf-8")
    print(DOCS / "proofs.md")


if __name__ == "__main__":
    main()
