"""docs/gallery.md: what the nodes that look into LoRAs show, from real runs of the bundled checkpoint.

``python -m comfyui_hywu.benchmarks.gallery``; held-out photos, the model's own thinking. Takes a few minutes.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..hywu_core.lora.algebra import Selection, masked
from ..hywu_core.lora.files import save_lora
from ..hywu_core.lora.map import lora_map, map_report, points_of_files
from ..hywu_core.lora.map_picture import map_picture
from ..hywu_core.lora.pictures import comparison_picture, experts_picture, norm_map, spectrum_plot
from ..hywu_core.lora.report import report
from ..hywu_core.lora.routing import recording
from ..hywu_core.lora.sketch import sketch, sketch_text
from ..hywu_core.lora.spectrum import compare, spectra
from ..hywu_core.lora.value import LoRA
from ..hywu_core.lora.weight_norms import weight_norms
from ..hywu_core.terminal import Terminal
from .contact_sheet import draw
from .proofs import DOCS, Studio, sources

LOOKED_INTO, OPPOSITE = "invert", "sharpen"
MAPPED = ("brighten", "darken", "warm", "cool", "gray", "sepia", "invert", "pixelate")
PARTS = {"attention only": ("attention",), "shared MLP only": ("shared",), "experts only": ("experts",)}
FOLDER = DOCS / "gallery"


def look_into(studio: Studio) -> list[str]:
    """The pictures and the report of Inspect, and those of Compare."""
    asked = studio.ask(LOOKED_INTO)
    lora = studio.write(asked)[0]
    found, weights = spectra(lora), weight_norms(studio.model.backbone)
    with recording(studio.model.backbone) as routing:
        studio.paint(asked[:1], [lora])
    pictures = {"norms": norm_map(found, weights), "spectrum": spectrum_plot(found),
                "experts": experts_picture(found, routing.counts())}
    for name, picture in pictures.items():
        picture.save(FOLDER / f"{name}.png", optimize=True)
    two = studio.write(studio.ask(OPPOSITE))[0]
    compared = compare(lora, two)
    comparison_picture([target.name for target in lora.targets], compared).save(FOLDER / "comparison.png", optimize=True)
    return [
        "## Inspect", "", f"The LoRA that was written for “{lora.provenance.instruction}” and one photo.", "",
        "![norm of the update by layer and projection](gallery/norms.png)", "",
        "![singular values and effective ranks](gallery/spectrum.png)", "",
        "![norms of the routed experts, and how many tokens came to them](gallery/experts.png)", "",
        "```", report(lora, found, weights, routing.counts()).strip(), "```", "",
        "## Compare", "", f"The same LoRA and one for “{two.provenance.instruction}”: cosine {compared.cosine:.2f}.", "",
        "![cosines and angles](gallery/comparison.png)", ""]


def mask(studio: Studio) -> list[str]:
    """One edit with parts of its LoRA."""
    asked, columns = studio.ask(LOOKED_INTO)[:3], []
    loras = studio.write(asked)
    arms: dict[str, list[LoRA]] = {"the whole LoRA": loras}
    arms |= {name: [masked(lora, Selection(groups=groups)) for lora in loras] for name, groups in PARTS.items()}
    half = loras[0].num_layers // 2
    arms |= {"first half of the layers": [masked(lora, Selection(range(half))) for lora in loras],
             "second half": [masked(lora, Selection(range(half), inverted=True)) for lora in loras]}
    columns = [("the photo", sources(asked))] + [(name, studio.paint(asked, chosen)) for name, chosen in arms.items()]
    draw([columns]).save(FOLDER / "mask.jpg", quality=86)
    return ["## Mask", "", f"“{loras[0].provenance.instruction}” with parts of the LoRA switched off.", "",
            "![parts of a LoRA](gallery/mask.jpg)", ""]


def many(studio: Studio) -> list[str]:
    """Eight edits of every photo, saved with their pictures and drawn as a map."""
    tick = Terminal("map")
    with tempfile.TemporaryDirectory() as name:
        folder, files = Path(name), {}
        for number, edit in enumerate(MAPPED):
            tick(number, len(MAPPED))
            asked = studio.ask(edit)
            loras = studio.write(asked)
            for each, lora, picture in zip(asked, loras, studio.paint(asked, loras), strict=True):
                path = folder / f"{edit}-{each.case.photo}.safetensors"
                save_lora(lora, path, picture=Image.fromarray(np.asarray(picture)), sketch=sketch_text(sketch(lora)))
                files[path.stem] = path
        points, left_out = points_of_files(files)
    tick(len(MAPPED), len(MAPPED))
    found = lora_map(points)
    map_picture(found).save(FOLDER / "map.jpg", quality=88)
    return ["## Map", "", f"{len(points)} saved LoRAs: {len(MAPPED)} edits of {len(studio.views)} photos, near each other "
            "where their updates are alike.", "", "![map of LoRAs](gallery/map.jpg)", "",
            "```", "\n".join(map_report(found, left_out).splitlines()[:9]), "...", "```", ""]


def main() -> None:
    """Make all pictures and the page."""
    torch.manual_seed(0)
    FOLDER.mkdir(exist_ok=True)
    studio = Studio()
    lines = ["# What can be seen in a generated LoRA", "",
             "Made by `python -m comfyui_hywu.benchmarks.gallery` with the bundled `hywu-mini` on photos that it never saw. "
             "The same pictures come out of the nodes **Inspect**, **Compare**, **Mask** and **Map**, and of `hywu map`.", ""]
    for part in (look_into, mask, many):
        lines += part(studio)
    (DOCS / "gallery.md").write_text("\n".join(lines), encoding="utf-8")
    print(DOCS / "gallery.md")


if __name__ == "__main__":
    main()
