"""The weight generator in slices against all its tokens at once: seconds, peak memory above the weights, and the difference.

``python -m comfyui_hywu.benchmarks.generator [--record]``: narrow blocks with the published number of layers and proportions of
tokens, a slice an eighth of them as in the published sizes. Each arm runs in a process of its own, because a peak is a
process's; on a GPU it is the allocator's.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..hywu_core.config import GeneratorConfig
from ..hywu_core.generator import blocks
from ..hywu_core.generator.model import ParameterGenerator
from ..hywu_core.training.recipe import GeneratorSizes, Sizes, generator_config
from .load import memory
from .record import record

SIZES = Sizes(hidden=256, layers=32, heads=8, kv_heads=4, head_dim=32, experts=16, top_k=8, expert_width=192, shared=1)
GENERATOR = GeneratorSizes(width=1024, head_dim=128, blocks=2, token_dim=256, accumulation=4, rank=16, alpha=16)
CONDITION = 300  # tokens


def peak(device: torch.device) -> int:
    """Bytes at the highest point since ``forget``."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return memory("VmHWM")


def forget(device: torch.device) -> None:
    """Let the peak start again from what is held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


@torch.no_grad()
def arm(slices: int, out: Path, rounds: int) -> None:
    """Run one arm and write its tokens and figures."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = ParameterGenerator(GeneratorConfig.from_dict(generator_config(SIZES, GENERATOR))).to(device)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
    tokens = SIZES.layers * model.layout.num_tokens * GENERATOR.rank // GENERATOR.accumulation
    blocks.TOKENS_AT_ONCE = tokens // slices
    condition = torch.randn(1, CONDITION, SIZES.hidden, device=device)
    forget(device)
    before, taken = peak(device), []
    for _ in range(rounds):
        started = time.perf_counter()
        result = model(condition).cpu()  # waits for a GPU
        taken.append(time.perf_counter() - started)
    figures = {"tokens": tokens, "seconds": min(taken), "peak_mb": (peak(device) - before) / 1e6}
    save_file({"tokens": result.contiguous()}, out, metadata={"figures": json.dumps(figures)})
    print(json.dumps(figures))


def main() -> None:
    """Run both arms, print, and record if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="write the figures to benchmarks/results/")
    parser.add_argument("--arm", nargs=2, metavar=("SLICES", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        return arm(int(options.arm[0]), Path(options.arm[1]), options.rounds)
    figures, results = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, slices in (("whole", 1), ("slices", 8)):
            out = Path(folder) / f"{name}.safetensors"
            said = subprocess.run(
                [sys.executable, "-m", __spec__.name, "--rounds", str(options.rounds), "--arm", str(slices), str(out)],
                check=True, capture_output=True, text=True).stdout
            figures[name], results[name] = json.loads(said.splitlines()[-1]), load_file(out)["tokens"]
    error = float((results["slices"] - results["whole"]).abs().max() / results["whole"].abs().max())
    memory = figures["slices"]["peak_mb"] / figures["whole"]["peak_mb"]
    speed = figures["whole"]["seconds"] / figures["slices"]["seconds"]
    for name, value in figures.items():
        print(f"{name:8s} {value['seconds']:8.2f} s {value['peak_mb']:8.0f} MB above the weights")
    print(f"slices take {memory:.2f} of the memory and are {speed:.2f} x as fast; results differ by {error:.1e} of the largest")
    if not torch.cuda.is_available():
        print("on a GPU: not measured, there is none here")
    if options.record:
        record("generator", {
            "arms": figures, "memory_over_whole": memory, "speed_over_whole": speed, "relative_difference": error})


if __name__ == "__main__":
    main()
