"""A layer's adapted weights side by side in one block of memory, its *slab*: what is kept, streamed and unpacked as one piece.

Owns where in the block each tensor lies, in the form that is computed with (room for a LoRA behind every weight) and in the
form that is stored (packed by a codec of ``checkpoint/formats.py``, or the same as computed with). Pure arithmetic on a layer
that was built on ``meta``. Who moves slabs is ``ring.py``'s.

What every token needs comes first, the routed experts last, so the dense part of a slab is its begin.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ...kernels.padding import aligned
from ..backbone.adapted import Adapted, Experts
from ..checkpoint.formats import Codec, codec

ALIGNMENT = 256  # bytes; what CUDA's own allocator gives, so that no kernel meets a stranger address here
Views = dict[str, dict[str, torch.Tensor]]  # module, relative to the layer -> name of weight or packed field -> tensor


@dataclass(frozen=True)
class Part:
    """One tensor of a slab. ``name``: the weight's (``down_proj``); packed, the codec's field behind it
    (``down_proj.weight_scale``). ``stride`` in elements, ``offset`` in bytes."""

    module: str
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class SlabLayout:
    """What lies where. ``dense_nbytes``: how far the part reaches that every token needs.

    codecs: how each packed weight is unpacked, by (module, weight); weights that are kept as they are computed with have none.
    """

    parts: tuple[Part, ...]
    nbytes: int
    dense_nbytes: int
    codecs: Mapping[tuple[str, str], Codec]

    @property
    def packed(self) -> bool:
        return bool(self.codecs)

    def views(self, slab: torch.Tensor) -> Views:
        """The tensors in ``slab`` (uint8, at least the dense part of it), without copying; none that reach beyond its end."""
        found: Views = {}
        for part in self.parts:
            if part.offset + part.nbytes <= slab.numel():
                flat = slab[part.offset : part.offset + part.nbytes].view(part.dtype)
                found.setdefault(part.module, {})[part.name] = flat.as_strided(part.shape, part.stride)
        return found


def compute_layout(layer: nn.Module, dtype: torch.dtype, rank: int) -> SlabLayout:
    """The weights in ``dtype``, each with room for a LoRA of ``rank``; a part's shape counts the room."""
    place, parts = _Places(), []
    for path, module in adapted_modules(layer):
        for name, room in module.ROOMS.items():
            shape = list(getattr(module, name).shape)
            shape[room.dim] += room.sides * rank
            if room.dim == len(shape) - 1:
                shape[-1] = aligned(shape[-1], dtype)  # as in ``with_room``
            parts.append(place.part(path, name, dtype, tuple(shape), dense=not isinstance(module, Experts)))
    return SlabLayout(tuple(parts), place.end, place.dense, {})


def stored_layout(layer: nn.Module, dtype: torch.dtype, rank: int, form: str) -> SlabLayout:
    """The weights as they are kept in ``form`` ("bf16", "fp8", ...): that of ``compute_layout`` where nothing is packed.

    A weight that the format cannot hold (an axis too short for its groups) is kept in ``dtype``.
    """
    codecs = {(path, name): found for path, module in adapted_modules(layer) for name in module.ROOMS
              if (found := codec(form, tuple(getattr(module, name).shape))) is not None}
    if not codecs:
        return compute_layout(layer, dtype, rank)
    return packed_layout(layer, dtype, codecs)


def plain_layout(module: nn.Module) -> SlabLayout:
    """All parameters of any module, as they are: for what no LoRA reaches."""
    place = _Places()
    parts = [place.part(path, name, parameter.dtype, tuple(parameter.shape), dense=True)
             for path, part in module.named_modules() for name, parameter in part._parameters.items() if parameter is not None]
    return SlabLayout(tuple(parts), place.end, place.dense, {})


def packed_layout(layer: nn.Module, dtype: torch.dtype, codecs: Mapping[tuple[str, str], Codec]) -> SlabLayout:
    """The weights packed by their codecs, (module, weight) -> codec; those without one in ``dtype``, without room."""
    place, parts = _Places(), []
    for path, module in adapted_modules(layer):
        for name in module.ROOMS:
            shape, dense = tuple(getattr(module, name).shape), not isinstance(module, Experts)
            if (path, name) not in codecs:
                parts.append(place.part(path, name, dtype, shape, dense))
                continue
            for field, (kept, size) in codecs[path, name].fields(shape).items():
                parts.append(place.part(path, f"{name}.{field}", kept, size, dense))
    return SlabLayout(tuple(parts), place.end, place.dense, dict(codecs))


def unpack(stored: SlabLayout, slab: torch.Tensor, layer: nn.Module, compute: Views, experts: bool) -> None:
    """The stored weights of ``slab`` into ``compute``, the views of a slab in ``compute_layout``; their room is left alone.

    experts: the routed experts too, or only what every token needs.
    """
    views = stored.views(slab)
    for path, module in adapted_modules(layer):
        if isinstance(module, Experts) and not experts:
            continue
        for name, room in module.ROOMS.items():
            target = compute[path][name].narrow(room.dim, 0, getattr(module, name).shape[room.dim])
            unpack_weight(stored, views[path], path, name, target)


def unpack_weight(stored: SlabLayout, views: Mapping[str, torch.Tensor], path: str, name: str, out: torch.Tensor) -> None:
    """One weight of a module's stored ``views``, or the experts of it that these hold, into ``out``."""
    found = stored.codecs.get((path, name))
    if found is None:
        out.copy_(views[name][tuple(slice(size) for size in out.shape)])
        return
    found.unpack({key.removeprefix(name + "."): value for key, value in views.items() if key.startswith(name + ".")}, out)


def adapted_modules(layer: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """The modules of a layer whose weights lie in its slab, with their paths in it, routed experts last."""
    found = [(path, module) for path, module in layer.named_modules() if isinstance(module, Adapted)]
    yield from sorted(found, key=lambda item: isinstance(item[1], Experts))


class _Places:
    """Hands out places in a slab, one behind the other."""

    def __init__(self):
        self.end = self.dense = 0

    def part(self, module: str, name: str, dtype: torch.dtype, shape: tuple[int, ...], dense: bool) -> Part:
        stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        part = Part(module, name, dtype, shape, stride, self.end)
        self.end += -(-part.nbytes // ALIGNMENT) * ALIGNMENT
        if dense:
            self.dense = self.end
        return part
