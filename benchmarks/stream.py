"""Streaming layers through a ring: how near a pass comes to the slower of its two floors, the link's and the computation's.

``python -m comfyui_hywu.benchmarks.stream`` runs a random backbone on the CPU whose layers come over a fake link: so many
bytes a second that the way of a layer takes ``--balance`` times as long as its work; a timeline of one pass is printed. One
core is left to the link: a GPU's copies cost its arithmetic nothing, the fake link's are the CPU's, and with all cores at work
they took 15 to 25 % from it (and another share in each pass).
``--device cuda`` streams real layers from pinned memory, beside accelerate's CPU offload. All arms are interleaved in one
process; a share is the median of the rounds' shares, each of a floor that was measured in the same round.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from ..hywu_core.backbone.model import Backbone, build_backbone
from ..hywu_core.backbone.stage import Stage
from ..hywu_core.config import BackboneConfig
from ..hywu_core.placement.sizes import RANK
from ..hywu_core.placement.slab import adapted_modules, compute_layout
from ..hywu_core.placement.stored import InMemory, new_slab
from ..hywu_core.placement.streaming import Streamed, Streaming
from .record import record

REAL = Path(__file__).resolve().parents[1] / "tests" / "data" / "real-config" / "hunyuanimage3-instruct.config.json"
# A layer of some 30 MB whose work takes about 0.1 s on two cores: long enough that a thread's turn does not count.
SMALL = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "attention_head_dim": 64, "num_experts": 8,
         "moe_topk": 2, "moe_intermediate_size": 512, "intermediate_size": 512, "num_shared_expert": 1, "vocab_size": 32}


class Link:
    """A stored layer behind a link of so many bytes a second; writes down when each fetch began and ended."""

    def __init__(self, stored: InMemory, number: int, rate: float, log: list):
        self.layout, self._stored, self._number, self._rate, self._log = stored.layout, stored, number, rate, log
        self.experts = stored.experts

    def fill(self, buffer: torch.Tensor) -> None:
        begun = time.perf_counter()
        self._stored.fill(buffer)
        time.sleep(max(0.0, begun + len(buffer) / self._rate - time.perf_counter()))
        self._log.append(("fetch", self._number, begun, time.perf_counter()))


def backbone_of(layers: int, device: torch.device) -> tuple[Backbone, list[InMemory], torch.dtype]:
    """Random decoder layers with their slabs in (pinned) RAM; nothing else of the backbone has memory."""
    raw = json.loads(REAL.read_text())
    raw |= {"num_hidden_layers": layers} | (SMALL if device.type == "cpu" else {})
    raw |= {key: [raw[key][0]] * layers for key in ("moe_topk", "moe_intermediate_size", "num_shared_expert")
            if isinstance(raw[key], list)}
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    backbone, kept = build_backbone(BackboneConfig.from_dict(raw), dtype), []
    for layer in backbone.model.layers:
        layout = compute_layout(layer, dtype, RANK)
        stored = InMemory(layout, new_slab(layout.nbytes, torch.device("cpu"), copied_to=device))
        for path, module in adapted_modules(layer):
            for name in module.ROOMS:
                stored.views[path][name].normal_(std=0.02)
        for module in layer.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and not any(module is adapted for _, adapted in adapted_modules(layer)):
                    value = torch.randn(parameter.shape, device=device, dtype=parameter.dtype) * 0.02 + (parameter.ndim == 1)
                    module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
        kept.append(stored)
    return backbone, kept, dtype


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--balance", type=float, nargs="+", default=[0.5, 1.0, 2.0],
                        help="the way of a layer over its work (fake link only)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--record", action="store_true", help="write the figures to benchmarks/results/")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    backbone, kept, dtype = backbone_of(options.layers, device)
    layers, width, head = backbone.model.layers, backbone.config.hidden_size, backbone.config.attention_head_dim
    hidden = torch.randn(2, options.tokens // 2, width, device=device, dtype=dtype)
    rope = (torch.ones(options.tokens // 2, head, device=device), torch.zeros(options.tokens // 2, head, device=device))

    def seconds(stage: Stage, log: list | None = None) -> float:
        marks = [time.perf_counter()]
        stage.run(hidden, rope, None, None, None, lambda layer: marks.append(time.perf_counter()))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if log is not None:
            log += [("work", number, begun, ended) for number, (begun, ended) in enumerate(zip(marks, marks[1:], strict=False))]
        return time.perf_counter() - marks[0]

    def resident() -> Stage:
        stage = Stage(layers, 0)
        for layer, stored in zip(layers, kept, strict=True):
            here = stored if device.type == "cpu" else InMemory(stored.layout, stored.slab.to(device))
            for path, module in adapted_modules(layer):
                module.place(here.views[path], for_good=True)
        return stage

    def streamed(buffers: int, rate: float | None, log: list) -> Stage:
        stage = Stage(layers, 0)
        absent = {}
        for number, (layer, stored) in enumerate(zip(layers, kept, strict=True)):
            source = stored if rate is None else Link(stored, number, rate, log)
            absent[number] = Streamed(layer, source, stored.layout)
        streaming = Streaming(stage, absent, buffers)
        stage.present, stage.rest = streaming.present, streaming.rest
        return stage

    seconds(resident())
    nbytes = sum(stored.layout.nbytes for stored in kept)
    figures = {"device": str(device), "layers": options.layers, "tokens": options.tokens, "bytes_a_layer": nbytes // len(kept),
               "arms": []}
    balances = options.balance if device.type == "cpu" else [None]
    for balance in balances:
        way = None if balance else link_seconds(kept, device)
        rounds: dict[int, list[tuple[float, float]]] = {0: [], 1: [], 2: [], 3: []}  # buffers -> (seconds, the floor's)
        for _ in range(options.rounds):
            # A fake link's speed and the floor follow the machine, which has other minutes and other rates.
            before = seconds(resident())
            now = before * balance if balance else way
            for buffers in (1, 2, 3):
                log: list = []
                stage = streamed(buffers, nbytes / now if balance else None, log)
                seconds(stage)  # the first pass has nobody before it to fetch ahead
                rounds[buffers].append((seconds(stage, log), now))
                stage.rest()
            rounds[0].append(((before + seconds(resident())) / 2, now))
        work = statistics.median(value for value, _ in rounds[0])
        shares = {buffers: [max(own, now) / value for (value, now), (own, _) in zip(rounds[buffers], rounds[0], strict=True)]
                  for buffers in (1, 2, 3)}
        medians = {buffers: statistics.median(values) for buffers, values in shares.items()}
        ratio = balance or way / work
        figures["arms"].append({
            "way_over_work": ratio, "resident_seconds": work,
            "share_of_floor": {str(buffers): value for buffers, value in medians.items()},
            "share_of_floor_by_round": {str(buffers): values for buffers, values in shares.items()}})
        print(f"way {ratio:4.2f} of the work: " + ", ".join(
            f"{buffers} buffer{'s' * (buffers > 1)} {value:6.1%} of the floor" for buffers, value in medians.items()))
    if device.type == "cpu":
        print("timeline of the last pass, three buffers (ms since its begin):")
        start = min(begun for kind, _, begun, _ in log if kind == "work")
        for kind, number, begun, ended in sorted(log, key=lambda row: row[2]):
            if ended > start:
                print(f"  {kind:5s} layer {number}  {1e3 * (begun - start):7.0f} to {1e3 * (ended - start):7.0f}")
    else:
        ours = statistics.median(value for value, _ in rounds[2])
        figures["accelerate_over_ours"] = offloaded(backbone, kept, device, seconds) / ours
        print(f"accelerate's CPU offload takes {figures['accelerate_over_ours']:.2f} x the time of two buffers")
    if options.record:
        record(f"stream-{device.type}", figures)


def link_seconds(kept: list[InMemory], device: torch.device) -> float:
    """How long the layers take from pinned memory with nothing else to do."""
    buffer = torch.empty(kept[0].layout.nbytes, dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)
    begun = time.perf_counter()
    for stored in kept:
        buffer.copy_(stored.slab, non_blocking=True)
    torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def offloaded(backbone: Backbone, kept: list[InMemory], device: torch.device, seconds) -> float:
    """The same layers under accelerate's cpu_offload: seconds of a pass."""
    from accelerate import cpu_offload

    for layer, stored in zip(backbone.model.layers, kept, strict=True):
        for path, module in adapted_modules(layer):
            module.place(stored.views[path], for_good=True)
        cpu_offload(layer.to("cpu"), execution_device=device)
    stage = Stage(backbone.model.layers, 0)
    seconds(stage)
    return statistics.median(seconds(stage) for _ in range(3))


if __name__ == "__main__":
    main()
