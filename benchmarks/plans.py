"""The table of docs/placement.md: what the plan says for machines that people have. Needs no weights and no GPU.

``python -m comfyui_hywu.benchmarks.plans`` prints it; ``--write`` puts it between the markers of docs/placement.md.
"""

import argparse
import json
from pathlib import Path

import torch

from ..hywu_core.config import BackboneConfig, GeneratorConfig
from ..hywu_core.errors import PlacementError
from ..hywu_core.generator.sizes import generator_sizes
from ..hywu_core.placement.devices import parse_devices
from ..hywu_core.placement.plan import plan
from ..hywu_core.placement.request import Request
from ..hywu_core.placement.sizes import model_sizes
from ..hywu_core.placement.table import row
from .record import between

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "placement.md"
MACHINES = (
    ("8x40", "auto"), ("4x80", "auto"), ("2x141", "auto"), ("1x141", "fp8"), ("1x96", "int4"), ("2x48", "auto"),
    ("2x48", "int4"), ("1x32+128ram", "auto"), ("1x24+64ram", "auto"), ("2x24+192ram", "int4"), ("24,48+96ram", "auto"),
    ("48:24+64ram", "auto"), ("1x16+64ram", "auto"), ("1x12+64ram", "auto"), ("cpu+24ram", "auto"), ("cpu+192ram", "auto"))
HEAD = ("machine | asked | format | layers here+streamed, by stage | generator | fullest device, GB (phase) | RAM, GB | "
        "s a step | s thinking | s an edit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into docs/placement.md")
    table = _table()
    print(table)
    if parser.parse_args().write:
        PAGE.write_text(between(PAGE.read_text(), "plans", table))


def _table() -> str:
    data = ROOT / "tests" / "data" / "real-config"
    sizes = model_sizes(BackboneConfig.from_dict(json.loads((data / "hunyuanimage3-instruct.config.json").read_text())),
                        torch.bfloat16)
    generator = generator_sizes(GeneratorConfig.from_dict(json.loads((data / "hy-wu.config.json").read_text())))
    lines = [f"| {HEAD} |", "|" + " --- |" * (HEAD.count("|") + 1)]
    for machine, form in MACHINES:
        try:
            cells = row(plan(sizes, parse_devices(machine), Request(), format=form, generator=generator))
        except PlacementError as error:
            cells = f"does not fit: {str(error).split('does not fit: ')[1]}" + " |" * (HEAD.count("|") - 2)
        lines.append(f"| {machine} | {form} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
