"""Parts of the model that live in RAM or on disk and come to a device for the time of their use: towers, VAE, a generator.

Owns taking its tensors there and back. What stays behind is the one copy; leaving costs nothing.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ..checkpoint.load import materialise, read_tensors
from ..checkpoint.shards import Shards
from ..checkpoint.slots import slots


@contextmanager
def visiting(modules: tuple[nn.Module, ...], device: torch.device) -> Iterator[torch.device]:
    """While the block runs, all parameters and buffers of ``modules`` lie on ``device``, which is yielded.

    What lies there already (because ComfyUI moved it) stays. Raises torch.OutOfMemoryError before anything has moved for good.
    """
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    homes = [(tensor, tensor.data) for tensor in tensors if tensor.device != device]
    try:
        for tensor, home in homes:
            tensor.data = home.to(device, non_blocking=True)
        yield device
    finally:
        for tensor, home in homes:
            tensor.data = home


@contextmanager
def reading(modules: Mapping[str, nn.Module], shards: Shards, device: torch.device) -> Iterator[torch.device]:
    """While the block runs, ``modules``, which are on meta, are on ``device``, read from the files.

    modules: by their published paths, "" for a whole model.
    """
    before = absent(modules.values())
    try:
        if before:
            for path, module in modules.items():
                materialise(module, device)
                read_tensors(slots(module, path and path + "."), shards)
        yield device
    finally:
        put_back(before)


Absent = list[tuple[dict, str, torch.Tensor]]


def absent(modules: Iterable[nn.Module]) -> Absent:
    """Every parameter and buffer of ``modules`` that is on meta, and where it hangs."""
    return [(tensors, name, tensor) for module in modules for part in module.modules()
            for tensors in (part._parameters, part._buffers)
            for name, tensor in tensors.items() if tensor is not None and tensor.is_meta]


def put_back(before: Absent) -> None:
    """On meta again what was ``absent``; its memory goes."""
    for tensors, name, tensor in before:
        tensors[name] = tensor
