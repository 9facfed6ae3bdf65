"""What can be done with a LoRA of full size, how long it takes and how much memory: 722,993,152 values, 1.45 GB in bf16.

    python -m comfyui_hywu.benchmarks.lora_objects [--only inspect compare] [--record]

Two synthetic LoRAs of the published configuration (random values, so nothing compresses well) are written to .cache/ once.
Every operation runs in a fresh process. Memory is the highest resident size above that of the imports, by the bytes of the
LoRAs that the operation holds; the goal is 1.5. Seconds include reading the files only in the row "load". Linux only.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..hywu_core.config import GeneratorConfig
from ..hywu_core.json_fields import read_json
from ..hywu_core.lora.algebra import Selection, blend, joined, masked, mean
from ..hywu_core.lora.compress import Compressed, compressed
from ..hywu_core.lora.files import load_lora, save_lora
from ..hywu_core.lora.peft import export_peft
from ..hywu_core.lora.pictures import experts_picture, norm_map, spectrum_plot
from ..hywu_core.lora.report import panel_data, report
from ..hywu_core.lora.sketch import sketch
from ..hywu_core.lora.spectrum import compare, spectra
from ..hywu_core.lora.stored import BFLOAT16, FP8
from ..hywu_core.lora.value import LoRA, Provenance
from .load import memory
from .record import RESULTS, record

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "tests" / "data" / "real-config" / "hy-wu.config.json"
MEMORY_GOAL, INSPECT_GOAL = 1.5, 10.0
SMALL_RANK = 16


def synthetic(seed: int) -> LoRA:
    """A LoRA of the published sizes with random values."""
    config = GeneratorConfig.from_dict(read_json(CONFIG))
    noise, tensors = torch.Generator().manual_seed(seed), {}
    for layer in range(config.num_base_model_layers):
        for target in config.targets:
            for side, shape in (("A", target.a_shape(config.rank)), ("B", target.b_shape(config.rank))):
                value = torch.empty(shape, dtype=torch.bfloat16)
                value.flatten().view(-1)[:] = torch.randn(value.numel(), generator=noise).mul_(0.01 * (1 + layer / 8))
                tensors[f"{config.prefix}{layer}.{target.name}.lora_{side}"] = value
    return LoRA.from_tensors(tensors, config.alpha, Provenance(instruction=f"number {seed}"))


def touch(lora: LoRA) -> None:
    """Make every matrix once, as the injector does: what a LoRA that is made on demand costs."""
    for key in lora.tensors:
        lora.tensors[key].amax()


def inspect(one: LoRA) -> None:
    found = spectra(one)
    norm_map(found), spectrum_plot(found), experts_picture(found)
    report(one, found), panel_data(one, found)


def saved(folder: Path, **how) -> Callable[[LoRA], str]:
    return lambda one: save_lora(one, folder / "saved.safetensors", **how).text


# Name -> on how many LoRAs, and what is done in a folder for what it writes; a text that it returns stands in the table.
OPERATIONS: dict[str, tuple[int, Callable[[Path], Callable]]] = {
    "inspect": (1, lambda folder: inspect),
    "sketch for the map": (1, lambda folder: sketch),
    "compare": (2, lambda folder: lambda one, two: f"cosine {compare(one, two).cosine:.4f}"),
    "blend, exact, every matrix": (2, lambda folder: lambda one, two: touch(blend([one, two], [0.5, 0.5]))),
    "blend to rank 16": (2, lambda folder: lambda one, two: compressed(joined([one, two], [0.5, 0.5]), SMALL_RANK)),
    "mean of matrices, every matrix": (2, lambda folder: lambda one, two: touch(mean([one, two]))),
    "mask, every matrix": (1, lambda folder: lambda one: touch(masked(one, Selection(range(8), ("experts",), range(32))))),
    "save bf16": (1, lambda folder: saved(folder, stored=BFLOAT16)),
    "save fp8": (1, lambda folder: saved(folder, stored=FP8)),
    "save bf16, 90 % of the experts' energy": (1, lambda folder: saved(folder, stored=BFLOAT16, keep=0.9)),
    "export to PEFT": (1, lambda folder: lambda one: export_peft(one, folder / "peft")),
}


def run_one(name: str, files: list[Path]) -> dict:
    """One operation in this process."""
    with tempfile.TemporaryDirectory(dir=files[0].parent) as folder:
        before = memory("VmRSS")
        start, loaded = time.perf_counter(), []
        if name == "load":
            count = 1
            loaded, said = [load_lora(files[0])], None
            seconds = time.perf_counter() - start
        else:
            count, make = OPERATIONS[name]
            loaded = [load_lora(file) for file in files[:count]]
            operation = make(Path(folder))
            start = time.perf_counter()
            said = operation(*loaded)
            seconds = time.perf_counter() - start
            if isinstance(said, Compressed):  # a LoRA with memory of its own
                loaded, said = [*loaded, said.lora], f"error {said.error:.2%}"
        held = sum(tensor.nbytes for lora in loaded for tensor in lora.tensors.values())
        return {"seconds": round(seconds, 2), "memory": round((memory("VmHWM") - before) / held, 3),
                "gigabytes": round(held / 1e9, 2), "said": said if isinstance(said, str) else None}


def main() -> None:
    """Every operation in a process of its own; a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=["load", *OPERATIONS], default=["load", *OPERATIONS])
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache" / "lora-objects")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    files = [options.folder / f"{seed}.safetensors" for seed in (0, 1)]
    if options.one:
        print(json.dumps(run_one(options.one, files)))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    for seed, file in enumerate(files):
        if not file.exists():
            save_lora(synthetic(seed), file)
    results = RESULTS / "lora_objects.json"
    found = json.loads(results.read_text())["operations"] if results.is_file() else {}  # with --only the rest stays
    print(f"{'operation':40} {'seconds':>8} {'x size':>7}")
    for name in options.only:
        runs = []
        for _ in range(options.rounds):
            done = subprocess.run([sys.executable, "-m", __spec__.name, "--one", name, "--folder", str(options.folder)],
                                  capture_output=True, text=True, check=True)
            runs.append(json.loads(done.stdout))
        found[name] = runs[0] | {"seconds": statistics.median(run["seconds"] for run in runs)}
        print(f"{name:40} {found[name]['seconds']:8.1f} {found[name]['memory']:7.2f}  {found[name]['said'] or ''}", flush=True)
    if options.record:
        record("lora_objects", {"goals": {"memory": MEMORY_GOAL, "inspect": INSPECT_GOAL}, "rounds": options.rounds,
                                "operations": found})


if __name__ == "__main__":
    main()
