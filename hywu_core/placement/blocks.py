"""A row of equal blocks that passes a device block by block: the weight generator's where it does not fit.

Owns the blocks' slabs and their turns; the ring is ``ring.py``'s. A decoder layer is more than that (room for a LoRA, packed
weights, chosen experts) and has ``streaming.py``.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..checkpoint.shards import Shards
from .ring import Ring
from .slab import Views, plain_layout
from .stored import InMemory, OnDisk, new_slab

BUFFERS = 2  # a block that works and one that arrives: a block's work is long


class StreamedBlocks:
    """Blocks on meta that get their weights for their turn on ``device``, from RAM or from the files below ``path``.

    While they rest, ``device`` may be set to another one.

    In RAM their memory is made here; ``places`` says where to read what: published name -> tensor.
    """

    def __init__(self, blocks: Sequence[nn.Module], path: str, shards: Shards, device: torch.device, kept: str):
        self._blocks, self.device = list(blocks), device
        self._ring: Ring | None = None
        self.places: dict[str, torch.Tensor] = {}
        self._stored: list[InMemory | OnDisk] = []
        for index, block in enumerate(self._blocks):
            layout = plain_layout(block)
            names = {(part.module, part.name): ".".join(filter(None, (path, str(index), part.module, part.name)))
                     for part in layout.parts}
            if kept == "disk":
                self._stored.append(OnDisk(layout, shards, {key: [name] for key, name in names.items()}))
                continue
            stored = InMemory(layout, new_slab(layout.nbytes, torch.device("cpu"), copied_to=device))
            self.places |= {name: stored.views[module][parameter] for (module, parameter), name in names.items()}
            self._stored.append(stored)

    @contextmanager
    def present(self, index: int) -> Iterator[None]:
        """Around the turn of block ``index``."""
        if self._ring is None:
            sizes = {number: (stored.layout.nbytes, stored.layout.nbytes) for number, stored in enumerate(self._stored)}
            self._ring = Ring(self.device, BUFFERS, sizes, lambda number, buffer: self._stored[number].fill(buffer))
        with self._ring.arrived(index) as slab:
            absent = _take(self._blocks[index], self._stored[index].layout.views(slab))
            try:
                yield
            finally:
                for part, name, parameter in absent:
                    part._parameters[name] = parameter

    def rest(self) -> None:
        """No block will be needed for a while: the ring's memory is given back."""
        ring, self._ring = self._ring, None
        if ring is not None:
            ring.close()


def _take(block: nn.Module, views: Views) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Give a block the weights in ``views``; returns what it had instead."""
    before = []
    for path, found in views.items():
        part = block.get_submodule(path)
        for name, view in found.items():
            before.append((part, name, part._parameters[name]))
            part._parameters[name] = nn.Parameter(view, requires_grad=False)
    return before
