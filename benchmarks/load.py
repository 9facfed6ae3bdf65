"""Loading against reading: how long load_weights takes, and how much memory, beside a plain readinto of the same bytes.

    python -m comfyui_hywu.benchmarks.load [--experts 28] [--rounds 5] [--cold] [--record]

Makes a checkpoint of one decoder layer in the published shapes (spec section 1) with some of its 64 experts, split into two
shards through the middle of the experts, under .cache/. Each arm runs in a fresh process, the arms take turns, and before each
run all files are in the page cache (or, with --cold, none). Arms:

    raw    open, readinto 8 MB at a time into new memory of the same size: what any loader must do
    load   open_shards and load_weights into a decoder layer built on meta
    clone  safetensors' safe_open and get_tensor(...).clone(): what most loaders do

Goals: load <= 1.25 x raw in time, and peak memory <= 1.1 x the bytes that stay. Wall times on a shared machine wander; the CPU
time beside them does not. Linux only. --record writes benchmarks/results/load.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

from ..hywu_core.backbone.layer import DecoderLayer
from ..hywu_core.checkpoint import load_weights, open_shards, slots
from ..hywu_core.config import BackboneConfig
from ..hywu_core.json_fields import read_json
from .record import record

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "tests" / "data" / "real-config" / "hunyuanimage3-instruct.config.json"
ARMS = ("raw", "load", "clone")
TIME_GOAL, MEMORY_GOAL = 1.25, 1.1
READ_BYTES = 8 << 20


def build_layer(experts: int) -> DecoderLayer:
    """One decoder layer of the published configuration on meta, in bf16, with ``experts`` of its 64 experts."""
    config = replace(BackboneConfig.from_dict(read_json(CONFIG)), num_experts=experts)
    with torch.device("meta"):
        layer = DecoderLayer(config, 0).to(torch.bfloat16)
    layer.mlp.gate.float()  # the router stays fp32: its 0.5 MB take the converting path
    return layer


def make_checkpoint(folder: Path, experts: int) -> None:
    """Write the layer's tensors, random bf16 values, as two shards and an index; a folder that is complete is kept."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {name: list(place.shape) for name, place in slots(build_layer(experts)).items()}
    names = list(shapes)
    half = names.index(f"mlp.experts.{experts // 2}.down_proj.weight")
    noise = (torch.randn(6144 * 4096, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16().view(torch.uint8).numpy()
    weight_map = {}
    for number, part in enumerate((names[:half], names[half:]), start=1):
        file, header, end = f"model-{number:05}-of-00002.safetensors", {}, 0
        for name in part:
            nbytes = 2 * torch.Size(shapes[name]).numel()
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [end, end + nbytes]}
            end += nbytes
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as handle:
            handle.write(len(text).to_bytes(8, "little") + text)
            for name in part:
                start, stop = header[name]["data_offsets"]
                handle.write(memoryview(noise)[:stop - start])
            os.fsync(handle.fileno())
        weight_map |= dict.fromkeys(part, file)
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def memory(key: str) -> int:
    """VmRSS or VmHWM (its highest value) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}: this benchmark needs Linux")


def run_arm(arm: str, folder: Path, experts: int) -> dict[str, float]:
    """One measurement in this process: seconds, CPU seconds, and the growth of peak memory per byte of weights."""
    layer = build_layer(experts)
    files = sorted(folder.glob("*.safetensors"))
    before = memory("VmRSS")
    start, start_cpu = time.perf_counter(), time.process_time()
    if arm == "raw":
        kept = [read_raw(file) for file in files]
    elif arm == "load":
        load_weights(layer, open_shards(folder))
        kept = list(layer.parameters())
    else:
        kept = []
        for file in files:
            with safe_open(file, framework="pt") as shard:
                kept += [shard.get_tensor(name).clone() for name in shard.keys()]
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    nbytes = sum(tensor.nbytes for tensor in kept)
    return {"seconds": seconds, "cpu": cpu, "memory": (memory("VmHWM") - before) / nbytes, "gigabytes": nbytes / 1e9}


def read_raw(file: Path) -> torch.Tensor:
    whole = torch.empty(file.stat().st_size, dtype=torch.uint8)
    view, done = memoryview(whole.numpy()), 0
    with open(file, "rb", buffering=0) as handle:
        while count := handle.readinto(view[done:done + READ_BYTES]):
            done += count
    return whole


def set_page_cache(folder: Path, cold: bool) -> None:
    """Bring every shard into the page cache, or drop it from there."""
    buffer = bytearray(READ_BYTES)
    for file in folder.glob("*.safetensors"):
        with open(file, "rb", buffering=0) as handle:
            if cold:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while handle.readinto(buffer):
                    pass


def measure(folder: Path, experts: int, rounds: int, cold: bool) -> dict[str, list[dict[str, float]]]:
    """All arms in turn, ``rounds`` times."""
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for number in range(rounds):
        for arm in ARMS[number % len(ARMS):] + ARMS[:number % len(ARMS)]:  # no arm always follows the same one
            set_page_cache(folder, cold)
            command = [sys.executable, "-m", __spec__.name, "--arm", arm, "--experts", str(experts)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[arm].append(json.loads(done.stdout))
    return found


def report(found: dict[str, list[dict[str, float]]], cold: bool) -> dict:
    """Print one line an arm and the two ratios; returns what --record writes."""
    size = found["load"][0]["gigabytes"]
    print(f"{size:.2f} GB, page cache {'cold' if cold else 'warm'}, {len(found['load'])} rounds")
    arms = {}
    for arm, runs in found.items():
        wall = [run["seconds"] for run in runs]
        arms[arm] = {"seconds_min": min(wall), "seconds_median": statistics.median(wall),
                     "cpu_seconds_min": min(run["cpu"] for run in runs), "peak_memory": max(run["memory"] for run in runs)}
        print(f"{arm:6} min {min(wall):6.2f} s  median {arms[arm]['seconds_median']:6.2f} s  "
              f"CPU {arms[arm]['cpu_seconds_min']:6.2f} s  {size / min(wall):5.2f} GB/s  "
              f"peak memory {arms[arm]['peak_memory']:.3f} x")
    ratios = {key: arms["load"][key] / arms["raw"][key] for key in ("seconds_min", "seconds_median", "cpu_seconds_min")}
    print(f"load / raw: {ratios['seconds_min']:.3f} (min)  {ratios['seconds_median']:.3f} (median)  "
          f"{ratios['cpu_seconds_min']:.3f} (CPU)  goal <= {TIME_GOAL}; peak memory goal <= {MEMORY_GOAL}")
    return {"gigabytes": size, "cold": cold, "arms": arms, "load_over_raw": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description="load_weights against readinto of the same bytes")
    parser.add_argument("--experts", type=int, default=28, help="experts in the layer, 75 MB each (default 28: 2.3 GB)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before each run")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/load.json")
    parser.add_argument("--arm", choices=ARMS, help="run one measurement in this process and print it as JSON")
    arguments = parser.parse_args()
    folder = ROOT / ".cache" / "benchmarks" / f"layer-{arguments.experts}-experts"
    if arguments.arm:
        print(json.dumps(run_arm(arguments.arm, folder, arguments.experts)))
        return
    make_checkpoint(folder, arguments.experts)
    figures = report(measure(folder, arguments.experts, arguments.rounds, arguments.cold), arguments.cold)
    if arguments.record:
        record(f"load{'-cold' if arguments.cold else ''}", figures)


if __name__ == "__main__":
    main()
