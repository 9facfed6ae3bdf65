"""One whole edit, stage by stage, with and without its LoRA: seconds, and what the LoRA costs as a ratio.

``python -m comfyui_hywu.benchmarks.edit [--model DIR --generator DIR --picture FILE]`` measures the bundled checkpoint and the
test photo, or a golden case, given its ``base`` and ``pg`` folders. Arms are interleaved in this process; each figure is the
smallest of the rounds.
"""

import argparse
import time
from pathlib import Path

import torch
from PIL import Image

from ..hywu_core.condition import encode
from ..hywu_core.edit import decode
from ..hywu_core.generator.handle import load_generator, write_lora
from ..hywu_core.handle import load_model
from ..hywu_core.lora.attach import inject
from ..hywu_core.sampling.denoise import sample
from .record import record

ROOT = Path(__file__).resolve().parent.parent
THINKING = "<think>look at the light</think><recaption>a brighter picture</recaption>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "hywu-mini" / "backbone")
    parser.add_argument("--generator", type=Path, default=ROOT / "models" / "hywu-mini" / "generator")
    parser.add_argument("--picture", type=Path, default=ROOT / "tests" / "data" / "photo.jpg")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="write the figures to benchmarks/results/")
    options = parser.parse_args()

    model = load_model(options.model, dtype=torch.float32)
    generator = load_generator(options.generator, dtype=torch.float32)
    picture = Image.open(options.picture)
    seconds: dict[str, list[float]] = {}

    def timed(name, run):
        started = time.perf_counter()
        result = run()
        seconds.setdefault(name, []).append(time.perf_counter() - started)
        return result

    arguments = {"steps": options.steps, "size": "1:1"}
    for _ in range(options.rounds):
        condition = timed("encode", lambda: encode(model, [picture], "make it brighter", THINKING))
        lora = timed("generate", lambda condition=condition: write_lora(generator, condition))
        adapted = inject(model, lora)
        latent = timed("sample", lambda c=condition, m=adapted: sample(m, c, **arguments))
        timed("sample, no LoRA", lambda c=condition: sample(model, c, **arguments))
        timed("decode", lambda x=latent: decode(model, x))
    best = {name: min(values) for name, values in seconds.items()}
    total = sum(value for name, value in best.items() if name != "sample, no LoRA")
    for name, value in best.items():
        print(f"{name:16s} {value:8.3f} s")
    ratio = best["sample"] / best["sample, no LoRA"]
    print(f"{'edit':16s} {total:8.3f} s (thinking not counted); sampling with the LoRA takes {ratio:.3f} x without")
    if options.record:
        record(f"edit-{options.model.parent.name}", {
            "steps": options.steps or model.generation.diff_infer_steps, "seconds": best, "edit": total,
            "sample_with_over_without_lora": ratio})


if __name__ == "__main__":
    main()
