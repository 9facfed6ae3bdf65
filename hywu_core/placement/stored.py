"""Where the stored form of a layer is kept: in memory, on the stage's device or beside it, or only in the checkpoint's files.

Owns giving the begin of a slab, or single experts of it, to a device. The layout is ``slab.py``'s, when what is needed
``streaming.py``'s.
"""

import functools
import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from ..checkpoint.load import read_tensors
from ..checkpoint.shards import Shards
from .slab import SlabLayout, Views

log = logging.getLogger("hywu")


def new_slab(nbytes: int, device: torch.device, copied_to: torch.device) -> torch.Tensor:
    """Memory for a slab (uint8): pinned if it lies in RAM and a GPU will copy it.

    Not by torch's pinned allocator, which rounds every block up to a power of two: 8 GiB for a layer of 5. Memory that cannot
    be pinned (a limit of the system) is used as it is, which costs speed; the log says so once.
    """
    with torch.inference_mode(False):
        slab = torch.empty(nbytes, dtype=torch.uint8, device=device)
    if device.type == "cpu" and copied_to.type == "cuda" and nbytes:
        runtime = torch.cuda.cudart()
        code = int(runtime.cudaHostRegister(slab.data_ptr(), nbytes, 0))
        if code == 0:
            weakref.finalize(slab, runtime.cudaHostUnregister, slab.data_ptr())
        else:
            _discard_error(copied_to)
            _say_unpinned(code)
    return slab


def _discard_error(device: torch.device) -> None:
    """CUDA keeps the error of a refused registration and hands it to the next kernel: let it be one that nobody needs."""
    try:
        torch.zeros(1, device=device).add_(1)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        log.debug("HY-WU: discarded the error of a memory registration")


@functools.cache
def _say_unpinned(code: int) -> None:
    log.warning("HY-WU: memory could not be pinned (CUDA error %d): streaming will be slower. WSL, containers and the limit of "
                "locked memory are the usual causes", code)


class Stored(Protocol):
    """The stored form of one layer."""

    layout: SlabLayout

    def fill(self, buffer: torch.Tensor) -> None:
        """The first ``len(buffer)`` bytes of the slab into ``buffer`` (uint8), on the current stream."""

    def experts(self, path: str, numbers: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
        """The stored tensors of some routed experts, one behind the other: name -> (n, ...) on ``device``."""


class InMemory:
    """A layer whose slab lies in memory; pinned memory is what a GPU copies from at full speed."""

    def __init__(self, layout: SlabLayout, slab: torch.Tensor):
        self.layout, self.slab = layout, slab
        self.views = layout.views(slab)

    def fill(self, buffer: torch.Tensor) -> None:
        buffer.copy_(self.slab[: len(buffer)], non_blocking=True)

    def experts(self, path: str, numbers: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
        found = {}
        for name, stack in self.views[path].items():
            found[name] = torch.empty((len(numbers), *stack.shape[1:]), dtype=stack.dtype, device=device)
            for place, number in zip(found[name], numbers, strict=True):
                place.copy_(stack[number], non_blocking=True)
        return found


    def picked(self, path: str, number_N: torch.Tensor) -> dict[str, torch.Tensor]:
        """As ``experts``, where only the slab's device knows the numbers: name -> (N, ...) there."""
        # As bytes, where a value is one: torch does not pick from a tensor of every such type.
        return {name: stack.index_select(0, number_N) if stack.itemsize > 1
                else stack.view(torch.uint8).index_select(0, number_N).view(stack.dtype)
                for name, stack in self.views[path].items()}


class OnDisk:
    """A layer that is read from the checkpoint's files whenever it is needed; the operating system keeps what it can.

    sources: (module, name of the stored tensor) -> the published names of what lies there: of one tensor, or of one an expert.
    """

    def __init__(self, layout: SlabLayout, shards: Shards, sources: Mapping[tuple[str, str], Sequence[str]]):
        self.layout, self._shards, self._sources = layout, shards, sources

    def fill(self, buffer: torch.Tensor) -> None:
        self.read(self.layout.views(buffer))

    def read(self, views: Views) -> None:
        """Everything that ``views`` has a place for."""
        places = {}
        for path, found in views.items():
            for name, view in found.items():
                sources = self._sources[path, name]
                if len(self._shards.entries[sources[0]].shape) == view.ndim:
                    places[sources[0]] = self._without_room(view, sources[0])
                else:
                    places |= {source: self._without_room(view[number], source) for number, source in enumerate(sources)}
        read_tensors(places, self._shards)

    def experts(self, path: str, numbers: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
        found, places, rows = {}, {}, {}
        for part in self.layout.parts:
            if part.module != path:
                continue
            sources = self._sources[path, part.name]
            found[part.name] = torch.empty((len(numbers), *part.shape[1:]), dtype=part.dtype, device=device)
            for place, number in zip(found[part.name], numbers, strict=True):
                whole = self._shards.entries[sources[0]]
                if len(whole.shape) < len(part.shape):  # each expert by itself
                    name = sources[number]
                    rows[name] = self._shards.entries[name]
                    places[name] = self._without_room(place, name)
                else:
                    name, nbytes = f"{sources[0]}[{number}]", whole.nbytes // whole.shape[0]
                    rows[name] = replace(whole, shape=whole.shape[1:], offset=whole.offset + number * nbytes, nbytes=nbytes)
                    places[name] = place
        read_tensors(places, replace(self._shards, entries=rows))
        return found

    def _without_room(self, view: torch.Tensor, source: str) -> torch.Tensor:
        return view[tuple(slice(size) for size in self._shards.entries[source].shape)]
