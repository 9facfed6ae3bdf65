"""Memory: our models in ComfyUI's list of loaded models, brought back when they are needed, smaller after running out of it.

Owns loading by a plan and going on with a load that was cancelled, the entry that ComfyUI's unload buttons and its own
low-memory calls release the backbone through, and the one place where an out-of-memory error is caught. What is planned for is
``plan.py``'s, the VAE ``vae.py``'s; nothing of ``comfy.model_management`` is patched.

A generator has no entry: on a GPU it holds nothing between its turns. It waits in RAM or on disk and comes block by block while
others work, which takes less memory than any other way and, as a block works longer than the next one travels, hardly longer.
"""

import gc
import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import comfy.model_management
import comfy.model_patcher
import torch

from ..hywu_core.condition import Condition
from ..hywu_core.config import GeneratorConfig, torch_dtype
from ..hywu_core.errors import PlacementError
from ..hywu_core.generator.handle import GeneratorHandle, load_generator, write_lora
from ..hywu_core.generator.sizes import generator_sizes
from ..hywu_core.handle import ModelHandle, open_model
from ..hywu_core.lora.value import LoRA
from ..hywu_core.placement.activations import writing
from ..hywu_core.placement.build import Placed
from ..hywu_core.placement.memory import BLOCKS_AT_ONCE
from ..hywu_core.placement.plan import Plan
from ..hywu_core.placement.table import describe
from . import host, plan

# A generator that is loaded before any backbone waits in RAM only if so many times its size stays free: the published backbone
# is in 4 bits three times as large, and has to wait there on small cards.
LEFT_FOR_A_BACKBONE = 3
REMEDY = ("ask for a smaller size, fewer pictures or less thinking, choose the format int4 in the HY-WU Model Loader, or end "
          "other programs that use the card")
Result = TypeVar("Result")


class HYWUBackbone(torch.nn.Module):
    """What ComfyUI's list shows. It holds no tensors, so whatever ComfyUI does to modules cannot reach weights that a plan has
    placed."""


class PlacedPatcher(comfy.model_patcher.ModelPatcher):
    """A placed backbone as an entry of ComfyUI's list: there as a whole, as far as a cancelled load came, or released.

    It counts for ComfyUI's device, where the unload button looks; releasing gives back all other cards, too. The entry refers
    to the backbone weakly: it is the handles that keep it.
    """

    def __init__(self, model: ModelHandle, wanted: plan.Wanted):
        super().__init__(HYWUBackbone(), comfy.model_management.get_torch_device(), torch.device("cpu"))
        self._placed = weakref.ref(model.placed)
        self.fingerprint, self.wanted = model.fingerprint, wanted
        self.size = self.loaded_size()

    @property
    def placed(self) -> Placed | None:
        return self._placed()

    def model_size(self) -> int:
        """What it held when it was last loaded."""
        return self.size

    @property
    def there(self) -> bool:
        return self.placed is not None and (self.placed.loaded or self.placed.begun)

    def loaded_size(self) -> int:
        return self.placed.nbytes(self.load_device) if self.there else 0

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self.there else self.offload_device

    def partially_load(self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False) -> int:
        """Nothing yet: ``fill`` does it once the entry is in the list, where the unload buttons find what a cancel leaves."""
        return 0

    def fill(self) -> None:
        """Load by the plan, which alone says how much goes to the card."""
        if self.placed.loaded:
            return
        if self.placed.begun:
            logging.info("HY-WU: going on with the load that was cancelled")
        elif self.size:
            logging.info("HY-WU: loading the backbone again after it was unloaded")
        try:
            self.placed.load(host.ticker())
        finally:
            self.size = self.loaded_size() or self.size

    def partially_unload(self, device_to: torch.device, memory_to_free: float = 0, force_patch_weights: bool = False) -> int:
        """Nothing: layers lie where the plan put them or nowhere. ComfyUI then detaches."""
        return 0

    def detach(self, unpatch_all: bool = True) -> torch.nn.Module:
        """ComfyUI wants the memory (``unpatch_all``), or only changes its list."""
        if unpatch_all and self.there:
            self.placed.release()
            gc.collect()  # stages and what streams into them refer to each other
            logging.info("HY-WU: unloaded the backbone")
        return self.model


_PATCHERS: weakref.WeakKeyDictionary[Placed, PlacedPatcher] = weakref.WeakKeyDictionary()
# The backbone whose load is under way or was cancelled, by what was asked for; at most one.
_BEGUN: dict[tuple, ModelHandle] = {}


# ---- backbones


def load(folder: Path, dtype: torch.dtype | None, format: str) -> ModelHandle:
    """Plan for this machine, show the plan in the node, ask other models to leave as far as it needs, and load.

    A load that was cancelled goes on if the same is asked for again; it gives its memory back if anything else is.
    Raises PlacementError if it does not fit, before a byte is read.
    """
    asked = (folder, host.files_fingerprint(folder), dtype, format)
    model = _BEGUN.pop(asked, None)
    give_up()
    if model is None or not model.placed.begun:  # or it was unloaded since, and there may be a better plan by now
        wanted = plan.wanted(folder, dtype, format)
        model = open_model(folder, plan=plan.make_plan(wanted))
        _PATCHERS[model.placed] = PlacedPatcher(model, wanted)
    host.say(describe(model.placed.plan))
    _BEGUN[asked] = model
    try:
        at_work(model, 0, lambda: None)
    finally:
        if not model.placed.begun:
            del _BEGUN[asked]
    return model


def give_up() -> None:
    """A load that was cancelled is not gone on with."""
    while _BEGUN:
        _BEGUN.popitem()[1].placed.release()


def ready(model: ModelHandle) -> None:
    """Load the backbone if it is not there, and ask others to leave the room that an edit needs beside its weights.

    Handles with different LoRAs share one backbone and one entry.
    """
    patcher = _PATCHERS.get(model.placed)
    if patcher is None:
        return  # loaded by somebody else than our node, who then sees to it
    management, needed = comfy.model_management, 0
    for device, nbytes in plan.lacking(model.placed.plan, model.placed.nbytes if patcher.there else lambda _: 0).items():
        if device == patcher.load_device:
            # Weights that come back are what ComfyUI asks the entry for; this is the rest.
            needed = nbytes if patcher.there else max(0, nbytes - patcher.model_size())
        else:
            management.free_memory(nbytes + management.extra_reserved_memory(), device)
    management.load_models_gpu([patcher], memory_required=needed)
    patcher.fill()


def at_work(model: ModelHandle, pictures: int, stage: Callable[[], Result]) -> Result:
    """Run a stage of an edit with so many source pictures, its backbone loaded; once more, smaller, if memory ran out.

    Raises PlacementError when it runs out again, or if there is no smaller plan.
    """
    if model.elsewhere is not None:
        return stage()  # nothing of it is in this machine's memory
    patcher = _PATCHERS.get(model.placed)

    def attempt() -> Result:
        ready(model)
        return stage()

    def smaller(said: str) -> None:
        _unload_everything()
        if patcher is not None:
            patcher.detach()  # it may have left ComfyUI's list without being released
            model.placed.plan = _smaller(patcher.wanted, model.placed.plan, pictures, said)
            host.say(f"ran out of memory ({said}); once more with a smaller plan:\n{describe(model.placed.plan)}")

    return _twice(attempt, smaller, lambda: model.placed.plan)


def _smaller(wanted: plan.Wanted, before: Plan, pictures: int, said: str) -> Plan:
    try:
        return plan.smaller_plan(wanted, before, pictures)
    except PlacementError as refusal:
        raise PlacementError(f"ran out of memory ({said}), and no smaller plan fits: {refusal}") from None


def _twice(attempt: Callable[[], Result], smaller: Callable[[str], None], chosen: Callable[[], Plan | None]) -> Result:
    """The one place where an out-of-memory error is caught: try, make it smaller, try again."""
    try:
        return attempt()
    except torch.OutOfMemoryError as error:
        first = _line(error)
    # Only here, behind the except block, are the tensors of the failed run gone.
    logging.warning("HY-WU: ran out of memory: %s", first)
    smaller(first)
    try:
        return attempt()
    except torch.OutOfMemoryError as error:
        second = _line(error)
    peaks = chosen().peaks if chosen() is not None else ()
    planned = "".join(f"; {peak.device}: {peak.total / 1e9:.1f} GB planned of {peak.free / 1e9:.1f} GB free" for peak in peaks)
    _unload_everything()
    raise PlacementError(f"ran out of memory twice, first: {first}; then, with everything else unloaded: {second}{planned}. "
                         f"What helps: {REMEDY}.")


def _line(error: torch.OutOfMemoryError) -> str:
    """Torch's numbers without its advice about its own settings."""
    return str(error).splitlines()[0].split(" If reserved but unallocated")[0].strip()


def _unload_everything() -> None:
    """All models in ComfyUI's list, on every card, ours too."""
    management = comfy.model_management
    for device in {patcher.load_device for patcher in management.loaded_models() if patcher is not None}:
        management.free_memory(1e30, device)
    gc.collect()
    management.soft_empty_cache()


# ---- generators


def load_writer(folder: Path, dtype: torch.dtype | None) -> GeneratorHandle:
    """Load a generator: resident on a machine without a GPU, else to where it waits for its turns."""
    *cards, memory = plan.devices()
    if not cards:
        return load_generator(folder, dtype=dtype, on_tick=host.ticker())
    config = GeneratorConfig.from_folder(folder)
    need = generator_sizes(config, dtype or torch_dtype(config.torch_dtype)).total
    plans = [found.generator for placed in _PATCHERS if (found := placed.plan).generator is not None]
    if plans:
        in_ram = all(found.kept == "ram" for found in plans) and memory.free > need
    else:
        in_ram = memory.free > (1 + LEFT_FOR_A_BACKBONE) * need
    kept = "ram" if in_ram else "disk"
    logging.info("HY-WU: the generator (%.1f GB) waits %s; %.1f GB of RAM are free", need / 1e9,
                 "in RAM" if in_ram else "on disk", memory.free / 1e9)
    return load_generator(folder, device=comfy.model_management.get_torch_device(), dtype=dtype, mode="streamed", kept=kept,
                          on_tick=host.ticker())


def write(generator: GeneratorHandle, condition: Condition) -> LoRA:
    """Write a LoRA where the plan of the condition's backbone keeps room for it, else on ComfyUI's device.

    Decided now and not at loading: by now there is a plan, whichever loader ran first.
    """
    if generator.elsewhere is not None:
        return write_lora(generator, condition, host.ticker())
    return _twice(lambda: write_lora(_with_room(generator, condition), condition, host.ticker()),
                  lambda said: _unload_everything(), lambda: None)


def _with_room(generator: GeneratorHandle, condition: Condition) -> GeneratorHandle:
    if generator.present is None:
        return generator
    management, device = comfy.model_management, comfy.model_management.get_torch_device()
    for placed, patcher in _PATCHERS.items():
        if patcher.fingerprint == condition.backbone_fingerprint and placed.plan.generator is not None:
            device = torch.device(placed.plan.generator.device)
    sizes = generator_sizes(generator.config, generator.model.hidden_in.weight.dtype)
    need = sizes.rest + BLOCKS_AT_ONCE * sizes.block + writing(sizes, len(condition.hidden_SD))
    # Backbones are not asked to leave: their plans have this room, and coming back takes far longer than writing.
    ours = [loaded for loaded in management.current_loaded_models if isinstance(loaded.model, PlacedPatcher)]
    management.free_memory(need + management.extra_reserved_memory(), device, keep_loaded=ours)
    return replace(generator, device=device)
