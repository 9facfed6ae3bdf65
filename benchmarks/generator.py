"""The weight generator in slices, all its tokens at once, and in the reference's own way: seconds, peak memory, the difference.

``python -m comfyui_hywu.benchmarks.generator [--record]``: narrow blocks with the published number of layers and proportions
of tokens, a slice an eighth of them as in the published sizes. ``straightforward`` is what a first implementation of spec
section 4 looks like: every step over all tokens, rotations out of place, intermediates kept until their function returns.

Each arm runs in a process of its own, because a peak is a process's. On a CPU two peaks above the weights are measured:
``live``, the bytes of all tensors alive at once (in a pass of its own), which depends on the code alone, and ``rss``, which
the process held in its first pass (and in all of them): the library's buffers and what malloc keeps as well, which differs
from run to run. On a GPU it is the allocator's.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import weakref
from datetime import date
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..hywu_core.config import GeneratorConfig
from ..hywu_core.generator import blocks
from ..hywu_core.generator.blocks import Attention
from ..hywu_core.generator.model import ParameterGenerator
from ..hywu_core.generator.rope import RotaryTable
from ..hywu_core.progress import Tick, silent
from ..hywu_core.training.recipe import GeneratorSizes, Sizes, generator_config
from .load import memory
from .record import record

SIZES = Sizes(hidden=256, layers=32, heads=8, kv_heads=4, head_dim=32, experts=16, top_k=8, expert_width=192, shared=1)
GENERATOR = GeneratorSizes(width=1024, head_dim=128, blocks=2, token_dim=256, accumulation=4, rank=16, alpha=16)
CONDITION = 300  # tokens
SLICES = {"slices": 8, "whole": 1, "straightforward": 1}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GOAL = 0.25
TURNS = 2  # how often each arm's process is run, in turn with the others'


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operators make while the block runs: those alive ``now``, and the ``peak``."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        given = {id(each.untyped_storage()) for each in tree_leaves((arguments, keywords)) if isinstance(each, torch.Tensor)}
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = id(storage)
                if key not in given and key not in self._known:
                    self._known.add(key)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, key, storage.nbytes()).atexit = False
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, key: int, count: int) -> None:
        self._known.discard(key)
        self.now -= count


def straightforward(generator: ParameterGenerator, condition_BSD: torch.Tensor, on_tick: Tick = silent) -> torch.Tensor:
    """``ParameterGenerator.forward`` as spec section 4 tells it, step after step over all tokens."""
    model = generator.model
    context_BSG = rms_norm(generator.hidden_in(condition_BSD), model.norm_input.weight)
    positions = model.positions(context_BSG.shape[1], context_BSG.device)
    x_BNWG = rms_norm(model.position_tokens().expand(len(context_BSG), -1, -1, -1), model.norm_tokens.weight)
    B, N, W, G = x_BNWG.shape
    for done, block in enumerate(model.blocks, start=1):
        columns = rms_norm(x_BNWG, block.norm1.weight).transpose(1, 2).reshape(B * W, N, G)
        columns = attention(block.self_attn_n, columns, columns, positions.layers, positions.layers)
        x_BNWG = x_BNWG + columns.view(B, W, N, G).transpose(1, 2)
        del columns
        rows = rms_norm(x_BNWG, block.norm2.weight).view(B * N, W, G)
        x_BNWG = x_BNWG + attention(block.self_attn_hw, rows, rows, positions.row, positions.row).view(B, N, W, G)
        rows = rms_norm(x_BNWG, block.norm3.weight).view(B, N * W, G)
        cross = attention(block.self_attn_cross, rows, context_BSG, positions.tokens, positions.condition)
        x_BNWG = x_BNWG + cross.view(B, N, W, G)
        del rows, cross
        x_BNWG = x_BNWG + feed_forward(block.feed_forward, rms_norm(x_BNWG, block.norm4.weight))
        on_tick(done, len(model.blocks), None)
    x_BNWG = rms_norm(x_BNWG, model.norm_final.weight)
    layout = generator.layout
    a, b = x_BNWG.view(B, N, layout.num_tokens, layout.rank, -1).split(
        [layout.num_a_tokens, layout.num_tokens - layout.num_a_tokens], dim=2)
    return torch.cat((model.proj_out_A(a), model.proj_out_B(b)), dim=2)


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + blocks.EPS)).to(x.dtype) * weight


def attention(module: Attention, x: torch.Tensor, source: torch.Tensor, here: RotaryTable, there: RotaryTable) -> torch.Tensor:
    """Queries, keys and values of all tokens at once; the scores themselves are never kept (the library's attention)."""
    q, k, v = (linear(of).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
               for linear, of in ((module.W_q, x), (module.W_k, source), (module.W_v, source)))
    q, k = turned(q, here), turned(k, there)
    return module.W_o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def turned(x_BHLQ: torch.Tensor, table: RotaryTable) -> torch.Tensor:
    """(cos x0 - sin x1, sin x0 + cos x1) of every feature pair, in fp32 and in new tensors."""
    x0, x1 = x_BHLQ.float().unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack((table.cos * x0 - table.sin * x1, table.sin * x0 + table.cos * x1), dim=-1)
    return pairs.flatten(-2).to(x_BHLQ.dtype)


def feed_forward(module: blocks.FeedForward, x: torch.Tensor) -> torch.Tensor:
    inner = module.fc1(x)
    return module.fc2(F.silu(inner))


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


def build(sizes: Sizes, generator: GeneratorSizes, device: torch.device, dtype: torch.dtype) -> ParameterGenerator:
    """A generator of random weights that keep activations near 1."""
    torch.manual_seed(0)
    model = ParameterGenerator(GeneratorConfig.from_dict(generator_config(sizes, generator))).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model.to(device, dtype)


@torch.no_grad()
def arm(name: str, dtype: str, out: Path, rounds: int) -> None:
    """Run one arm and write its tokens and figures: seconds and the process's peak, or, for no rounds, the live bytes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(SIZES, GENERATOR, device, DTYPES[dtype])
    tokens = SIZES.layers * model.layout.num_tokens * GENERATOR.rank // GENERATOR.accumulation
    blocks.TOKENS_AT_ONCE = tokens // SLICES[name]
    condition = torch.randn(1, CONDITION, SIZES.hidden).to(device, DTYPES[dtype])
    run = straightforward if name == "straightforward" else ParameterGenerator.forward
    if rounds:
        forget(device)
        before, taken, held = peak(device), [], []
        for _ in range(rounds):
            started = time.perf_counter()
            result = run(model, condition).cpu()  # waits for a GPU
            taken.append(time.perf_counter() - started)
            held.append((peak(device) - before) / 1e6)
        figures = {"tokens": tokens, "seconds": min(taken), "peak_mb": held[0], "peak_mb_later": held[-1]}
    else:
        with LiveBytes() as live:
            result = run(model, condition).cpu()
        figures = {"live_mb": live.peak / 1e6}
    save_file({"tokens": result.contiguous()}, out)
    print(json.dumps(figures))


def measure(name: str, dtype: str, rounds: int) -> tuple[dict, torch.Tensor]:
    """One arm in a process of its own: its figures and its tokens."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tokens.safetensors"
        said = subprocess.run(
            [sys.executable, "-m", __spec__.name, "--rounds", str(rounds), "--arm", name, dtype, str(out)],
            check=True, capture_output=True, text=True).stdout
        return json.loads(said.splitlines()[-1]), load_file(out)["tokens"]


def main() -> None:
    """Run all arms, print, and record if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="write the figures to benchmarks/results/")
    parser.add_argument("--arm", nargs=3, metavar=("NAME", "DTYPE", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        return arm(*options.arm[:2], Path(options.arm[2]), options.rounds)
    figures, results = {}, {}
    for name in SLICES:
        figures[name], results[name] = measure(name, "fp32", 0)
    for _ in range(TURNS):
        for name, value in figures.items():
            found, _ = measure(name, "fp32", options.rounds)
            figures[name] = value | {key: min(each, value.get(key, each)) for key, each in found.items()}
    ours, ratios = figures["slices"], {}
    for name, other in figures.items():
        size = results[name].abs().max()
        ratios[name] = {
            **{key: ours[f"{key}_mb"] / other[f"{key}_mb"] for key in ("live", "peak")},
            "peak_later": ours["peak_mb_later"] / other["peak_mb_later"],
            "speed": other["seconds"] / ours["seconds"],
            "relative_difference": float((results["slices"] - results[name]).abs().max() / size)}
    # The published dtype, where rotations in fp32 weigh twice; on a CPU without a word about its speed.
    narrow = {name: measure(name, "bf16", 0)[0]["live_mb"] for name in ("slices", "straightforward")}
    narrow_ratio = narrow["slices"] / narrow["straightforward"]
    print(f"{'':16s}{'s':>8s}{'live MB':>9s}{'rss MB':>13s}   slices take of it: live, rss;  times as fast;  difference")
    for name, value in figures.items():
        of = ratios[name]
        print(f"{name:16s}{value['seconds']:8.2f}{value['live_mb']:9.0f}{value['peak_mb']:7.0f}, {value['peak_mb_later']:4.0f}"
              f"   {of['live']:.3f}, {of['peak']:.3f} ({of['peak_later']:.3f}); {of['speed']:.2f} x; "
              f"{of['relative_difference']:.1e} of the largest")
    best = ratios["straightforward"]
    print(f"bf16, live: {narrow['slices']:.0f} of {narrow['straightforward']:.0f} MB = {narrow_ratio:.3f}")
    met = {key: "met" if best[key] <= GOAL else "missed" for key in ("live", "peak")}
    print(f"goal: {GOAL} of the straightforward way's memory: {met['live']} in live bytes ({best['live']:.3f}), "
          f"{met['peak']} in rss ({best['peak']:.3f}, {best['peak_later']:.3f} over all passes)")
    if not torch.cuda.is_available():
        print("on a GPU: not measured, there is none here")
    if options.record:
        record("generator", {
            "date": date.today().isoformat(), "arms": figures, "slices_over": ratios,
            "bf16_live_mb": narrow, "bf16_live_over_straightforward": narrow_ratio,
            "gpu": "measured" if torch.cuda.is_available() else "not measured"})


if __name__ == "__main__":
    main()
