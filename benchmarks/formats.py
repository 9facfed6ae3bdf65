"""What storing the backbone in fewer bits costs: error of the weights, of the condition and of pictures, and time.

``python -m comfyui_hywu.benchmarks.formats`` edits the test photo with the bundled checkpoint in every format, against fp32:
the same instructions, thinking, LoRA and noise, so that all differences are the format's. Picture errors are PSNR in dB (more
is nearer); times are ratios of medians, arms interleaved in this process.
"""

import argparse
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..hywu_core.checkpoint.formats import FORMATS, codec
from ..hywu_core.condition import encode
from ..hywu_core.config import BackboneConfig
from ..hywu_core.edit import decode
from ..hywu_core.generator.handle import load_generator, write_lora
from ..hywu_core.handle import ModelHandle, load_model
from ..hywu_core.lora.attach import inject
from ..hywu_core.placement.build import whole
from ..hywu_core.sampling.denoise import sample
from .record import record

ROOT = Path(__file__).resolve().parent.parent
EDITS = ("make it brighter", "make it warmer", "turn it into black and white", "blur the picture", "invert the colours",
         "make it look old")


def weight_errors(model: ModelHandle, form: str) -> list[float]:
    """Relative error of each projection that the format packs."""
    errors = []
    for _, module in model.backbone.adapted_modules():
        for name in module.ROOMS:
            weight = getattr(module, name).detach()
            if (found := codec(form, tuple(weight.shape))) is not None:
                unpacked = found.unpack(found.pack(weight.contiguous()), torch.empty_like(weight))
                errors.append(float((unpacked - weight).norm() / weight.norm()))
    return errors


def psnr(one: Image.Image, other: Image.Image) -> float:
    error = np.mean((np.asarray(one, dtype=float) - np.asarray(other, dtype=float)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "hywu-mini" / "backbone")
    parser.add_argument("--generator", type=Path, default=ROOT / "models" / "hywu-mini" / "generator")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="write the figures to benchmarks/results/")
    options = parser.parse_args()
    config = BackboneConfig.from_folder(options.model)
    plain = whole(config, torch.float32, "cpu")
    models = {form: load_model(options.model, plan=replace(plain, format=form)) for form in FORMATS}
    exact = models["bf16"]  # that is: as the files have it, in fp32
    generator = load_generator(options.generator, dtype=torch.float32)
    photo = Image.open(ROOT / "tests" / "data" / "photo.jpg")

    def condition_of(model: ModelHandle, instruction: str):
        return encode(model, [photo], instruction, f"<think></think><recaption>{instruction}</recaption>")

    figures = {}
    wanted = {edit: condition_of(exact, edit) for edit in EDITS}
    loras = {edit: write_lora(generator, condition) for edit, condition in wanted.items()}
    pictures = {edit: decode(exact, sample(inject(exact, loras[edit]), wanted[edit], size="1:1")) for edit in EDITS}
    seconds: dict[str, list[float]] = {form: [] for form in FORMATS}
    for _ in range(options.rounds):
        for form, model in models.items():
            adapted, begun = inject(model, loras[EDITS[0]]), time.perf_counter()
            sample(adapted, wanted[EDITS[0]], size="1:1")
            seconds[form].append(time.perf_counter() - begun)
    medians = {form: statistics.median(values) for form, values in seconds.items()}
    for form in FORMATS[1:]:
        model, weights = models[form], weight_errors(exact, form)
        hidden, same_lora, whole_edit = [], [], []
        for edit in EDITS:
            condition = condition_of(model, edit)
            error = condition.hidden_SD - wanted[edit].hidden_SD
            hidden.append(float(error.norm() / wanted[edit].hidden_SD.norm()))
            same_lora.append(psnr(pictures[edit], decode(model, sample(inject(model, loras[edit]), wanted[edit], size="1:1"))))
            own = inject(model, write_lora(generator, condition))
            whole_edit.append(psnr(pictures[edit], decode(model, sample(own, condition, size="1:1"))))
        figures[form] = {
            "weight_error_mean": statistics.mean(weights), "weight_error_worst": max(weights),
            "condition_error_mean": statistics.mean(hidden), "picture_dB_same_lora": dict(zip(EDITS, same_lora, strict=True)),
            "picture_dB_whole_edit": dict(zip(EDITS, whole_edit, strict=True)),
            "sample_time_over_plain": medians[form] / medians["bf16"]}
        print(f"{form}: weights {statistics.mean(weights):.2%} off (worst {max(weights):.2%}), condition "
              f"{statistics.mean(hidden):.2%}, pictures {min(same_lora):.1f} to {max(same_lora):.1f} dB from fp32's with its "
              f"LoRA, {min(whole_edit):.1f} to {max(whole_edit):.1f} with their own; sampling takes "
              f"{medians[form] / medians['bf16']:.2f} x")
    if options.record:
        record("formats-hywu-mini", figures)


if __name__ == "__main__":
    main()
