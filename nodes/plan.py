"""Planning inside ComfyUI: what would be free if its other models left, what to plan for, and how much room that takes.

Owns the devices as ComfyUI grants them, the request and the generator that a backbone is planned with, and the next smaller
plan. How a plan is found is ``hywu_core/placement``'s, loading by one and running under it ``memory.py``'s.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import comfy.model_management
import torch

from ..hywu_core.config import BackboneConfig, GeneratorConfig, torch_dtype
from ..hywu_core.errors import CheckpointError, PlacementError
from ..hywu_core.generator.sizes import generator_sizes
from ..hywu_core.placement.devices import Device, find_devices
from ..hywu_core.placement.plan import Peak, Plan, plan
from ..hywu_core.placement.request import Request, within_positions
from ..hywu_core.placement.sizes import GeneratorSizes, ModelSizes
from ..hywu_core.placement.wanted import request_for, sizes_for
from . import host

# The next smaller plan has so much of what the last one was to hold, or of what is free, whichever is less: the prediction is
# within 5 % of a replay, so an OOM says that something else was underrated, usually other programs on the card.
SMALLER = 0.85


@dataclass(frozen=True)
class Wanted:
    """What a backbone is planned for; kept, so that it can be planned again. format: as chosen in the node."""

    sizes: ModelSizes
    request: Request
    format: str
    generator: GeneratorSizes | None


def wanted(folder: Path, dtype: torch.dtype | None, format: str) -> Wanted:
    """A picture of the published size with guidance from one source, after thinking, and the largest generator that fits.

    The nodes that follow are not known when the loader runs; this is what most graphs ask for. Raises CheckpointError.
    """
    config = BackboneConfig.from_folder(folder)
    # Named, because sizes_for would choose float32 on a CPU with room for it, and 'checkpoint' means the checkpoint's.
    sizes = sizes_for(folder, devices(), dtype or torch_dtype(config.torch_dtype))
    defaults = Request()
    request = request_for(folder, config, size=defaults.size, pictures=defaults.pictures, steps=None, guidance=None,
                          thinking=defaults.thinking)
    return Wanted(sizes, within_positions(config, request), format, generator_to_come(config))


def generator_to_come(config: BackboneConfig) -> GeneratorSizes | None:
    """The largest generator in the model folders that was made for backbones of this shape: the plan keeps room for its turn.

    Which one the graph loads cannot be known here: its loader may run before or after the backbone's.
    """
    found = []
    for name in host.checkpoint_names(host.GENERATOR):
        try:
            candidate = GeneratorConfig.from_folder(host.checkpoint_folder(name))
        except CheckpointError:
            continue  # its own loader says what is wrong with it
        if (candidate.input_dim, candidate.num_base_model_layers) == (config.hidden_size, config.num_hidden_layers):
            found.append(generator_sizes(candidate))
    return max(found, key=lambda sizes: sizes.total, default=None)


def devices() -> tuple[Device, ...]:
    """This machine as it would be if every model in ComfyUI's list had left; without the cards that ComfyUI does not use.

    What ComfyUI reserves for others (--reserve-vram) is not given away.
    """
    management = comfy.model_management
    gc.collect()  # a model that a changed graph has dropped hangs in reference cycles until this
    *cards, memory = find_devices()
    kind = management.get_torch_device().type  # "cpu" under --cpu, whatever cards there are
    granted = []
    for card in cards:
        if card.kind == kind:
            leaving = sum(patcher.loaded_size() for patcher in management.loaded_models()
                          if patcher is not None and patcher.load_device == torch.device(card.name))
            free = min(card.total, card.free + leaving) - management.extra_reserved_memory()
            granted.append(replace(card, free=max(0, int(free))))
    return (*granted, memory)


def make_plan(wanted: Wanted) -> Plan:
    """Raises PlacementError if it does not fit, before a byte is read."""
    return _lent(plan(wanted.sizes, devices(), wanted.request, format=wanted.format, generator=wanted.generator))


def _lent(found: Plan) -> Plan:
    """With a generator that does not stay on a card, even where it could: ``memory.py`` says why."""
    if found.generator is None or found.generator.mode != "resident" or found.generator.device == "cpu":
        return found
    return replace(found, generator=replace(found.generator, mode="streamed", kept="ram"))


def need(peak: Peak) -> int:
    """The most that a card has to give, without room for a generator that does not stay there."""
    return peak.total - peak.items.get("generator", 0)


def smaller_plan(wanted: Wanted, before: Plan, pictures: int) -> Plan:
    """What to do after running out of memory under ``before`` with so many source pictures: less on every card.

    The format stays if that is possible. Raises PlacementError if nothing smaller fits.
    """
    held = {peak.device: peak.total for peak in before.peaks}
    lowered = tuple(device if device.kind == "cpu" else
                    replace(device, free=int(SMALLER * min(device.free, held.get(device.name, device.free))))
                    for device in devices())
    request = replace(before.request, pictures=max(pictures, before.request.pictures))
    request = within_positions(wanted.sizes.config, request)
    refusals = []
    for format in dict.fromkeys((before.format, wanted.format)):
        try:
            return _lent(plan(wanted.sizes, lowered, request, format=format, generator=wanted.generator))
        except PlacementError as refusal:
            refusals.append(str(refusal))
    raise PlacementError(refusals[-1])


def lacking(chosen: Plan, there: Callable[[torch.device], int]) -> dict[torch.device, int]:
    """Bytes that the plan needs on each card, beyond what the backbone holds ``there`` already."""
    cards = [(torch.device(peak.device), peak) for peak in chosen.peaks]
    return {device: max(0, need(peak) - there(device)) for device, peak in cards if device.type != "cpu"}
