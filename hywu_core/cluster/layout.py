"""From a plan to parts: which process holds what, where it may run, and how much room requests have beside it.

Owns the shares of devices and the two kinds of plan, over the GPUs of all nodes and for nodes without any. Starts nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..config import BackboneConfig, GeneratorConfig
from ..errors import CheckpointError, PlacementError
from ..generator.sizes import generator_sizes
from ..placement.build import whole
from ..placement.devices import Device
from ..placement.plan import Plan, StagePlan, gb, plan
from ..placement.wanted import request_for, sizes_for
from .stage_actor import partial_plan

# Of a device, for Ray: a stage that has it with others, and each of the others (desk, towers, generator).
STAGE_SHARE, OTHER_SHARE = 0.7, 0.1
KEPT_FREE = 0.03  # as in the plan


@dataclass(frozen=True)
class PartPlan:
    """A process: kind ("stage", "tower", "writer", "desk"), the device (number of the bundle) that it shares, and what it
    holds."""

    kind: str
    name: str
    bundle: int
    share: float
    plan: Plan | None
    layers: range = range(0)


@dataclass(frozen=True)
class Layout:
    """bundles: for each device the node that it is on, None for any; gpu: whether a device is one. capacity: bytes for requests
    on each stage."""

    plan: Plan
    parts: tuple[PartPlan, ...]
    bundles: tuple[str | None, ...]
    gpu: bool
    capacity: tuple[int, ...]

    def of(self, kind: str) -> list[PartPlan]:
        return [part for part in self.parts if part.kind == kind]


def on_gpus(folder: Path, generator: Path | None, devices: Sequence[tuple[str, Device]], *, format: str, size: str,
            dtype: torch.dtype | None) -> Layout:
    """Spread over GPUs, (node, device) each, everything resident: a layer that streamed would make every user wait for it.

    Raises: PlacementError if they do not hold it, with what would fit.
    """
    cards = tuple(replace(device, name=f"cuda:{number}") for number, (_, device) in enumerate(devices))
    memory = Device("cpu", "cpu", 1 << 40, 1 << 40, 1e12, 80e9, 2.5e9, "memory of the nodes")
    sizes = sizes_for(folder, (*cards, memory), dtype)
    request = request_for(folder, sizes.config, size=size, pictures=1, steps=None, guidance=None, thinking=1000)
    writes = _generator(generator, sizes.config)
    own = None if writes is None else generator_sizes(writes)
    found = plan(sizes, (*cards, memory), request, format=format, generator=own, streaming="none")
    number = {card.name: index for index, card in enumerate(cards)}
    alike = len({(card.card, card.total) for card in cards}) == 1
    bundles = tuple(None if alike else node for node, _ in devices)
    room = []
    for stage in found.stages:
        peak = next(peak for peak in found.peaks if peak.device == stage.device)
        most = max(total - (peak.items.get("KV", 0) + peak.items.get("LoRA", 0) if phase == peak.phase else 0)
                   for phase, total in peak.phases.items())
        room.append(max(0, int(peak.free * (1 - KEPT_FREE)) - most))
    return _parts(found, [number[stage.device] for stage in found.stages], number[found.home],
                  None if found.generator is None else number.get(found.generator.device, number[found.home]),
                  bundles, True, tuple(room))


def on_cpus(folder: Path, generator: Path | None, nodes: int, stages: int, free: int, dtype: torch.dtype | None) -> Layout:
    """For nodes without a GPU: as many stages as asked for, layers spread evenly; half of what is free, in bytes on each node,
    is for requests."""
    config = BackboneConfig.from_folder(folder)
    layers = config.num_hidden_layers
    _generator(generator, config)
    if not 1 <= stages <= layers:
        raise PlacementError(f"{stages} stages asked for, this backbone has {layers} layers: choose 1 to {layers}")
    edges = [round(layers * number / stages) for number in range(stages + 1)]
    alone = whole(config, dtype or torch.float32, "cpu")
    cut = replace(alone, stages=tuple(
        StagePlan("cpu", first, last - first) for first, last in zip(edges, edges[1:], strict=False)))
    share = -(-stages // nodes)  # stages a node
    return _parts(cut, list(range(stages)), 0, None if generator is None else stages - 1, (None,) * stages, False,
                  (int(free / 2 / share),) * stages)


def _generator(folder: Path | None, backbone: BackboneConfig) -> GeneratorConfig | None:
    """Its configuration. Raises CheckpointError now for one that is missing or of another backbone, not after minutes."""
    if folder is None:
        return None
    found = GeneratorConfig.from_folder(folder)
    wanted, given = (backbone.hidden_size, backbone.num_hidden_layers), (found.input_dim, found.num_base_model_layers)
    if wanted != given:
        raise CheckpointError(f"{folder} writes for a backbone {given[0]} wide with {given[1]} layers, this one is {wanted[0]} "
                              f"wide with {wanted[1]}: give the generator that belongs to it")
    return found


def _parts(found: Plan, where: list[int], home: int, writer: int | None, bundles: tuple[str | None, ...], gpu: bool,
           capacity: tuple[int, ...]) -> Layout:
    def here(part: str) -> str:
        return "cpu" if found.places[part] == "cpu" or not gpu else "cuda:0"

    device = "cuda:0" if gpu else "cpu"
    others = [home, home] + ([] if writer is None else [writer])
    parts = [
        PartPlan("stage", f"stage {number} (layers {stage.first} to {stage.first + stage.layers - 1})", bundle,
                 STAGE_SHARE if bundle in others else 1.0,
                 partial_plan(found, stages=(replace(stage, device=device),), home=device, waves=False),
                 range(stage.first, stage.first + stage.layers))
        for number, (stage, bundle) in enumerate(zip(found.stages, where, strict=True))]
    visits = {part: device for part in found.visits if part in ("vae", "vision")}
    parts.append(PartPlan("tower", "the VAE and vision tower", home, OTHER_SHARE, partial_plan(
        found, home=device, waves=False, visits=visits, places={part: here(part) for part in ("vae", "vision")})))
    if writer is not None:
        parts.append(PartPlan("writer", "the weight generator", writer, OTHER_SHARE, None))
    parts.append(PartPlan("desk", "the desk", home, OTHER_SHARE, partial_plan(
        found, home=device, waves=False, places={part: here(part) for part in ("wte", "lm_head", "small")})))
    # Devices that the plan leaves empty are for others.
    used = sorted({part.bundle for part in parts})
    parts = [replace(part, bundle=used.index(part.bundle)) for part in parts]
    return Layout(found, tuple(parts), tuple(bundles[number] for number in used), gpu, capacity)


def describe(layout: Layout) -> str:
    """A line a part, and the room for requests."""
    nodes = [f" on node {node}" if node else "" for node in layout.bundles]
    lines = [f"{part.name}: device {part.bundle}{nodes[part.bundle]}" for part in layout.parts]
    return "\n".join([*lines, f"room for requests: {', '.join(map(gb, layout.capacity))} on the stages"])


def mode_of(layout: Layout) -> dict[str, Any]:
    """How the generator is loaded, for ``WriterActor``."""
    if not layout.gpu or layout.plan.generator is None:
        return {"device": "cpu", "mode": "resident", "kept": "ram"}
    return {"device": "cuda:0", "mode": layout.plan.generator.mode, "kept": layout.plan.generator.kept}
