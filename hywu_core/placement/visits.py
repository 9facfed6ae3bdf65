"""Parts of the model that live in RAM or on disk and come to a device for the time of their use: towers, VAE, a generator.

Owns taking its tensors there and back. What stays behind is the one copy; leaving costs nothing.
"""

from collections.abc import Iterator, Mapping
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
    absent = [(part, name, parameter) for module in modules.values() for part in module.modules()
              for name, parameter in part._parameters.items() if parameter is not None and parameter.is_meta]
    try:
        if absent:
            for path, module in modules.items():
                materialise(module, device)
                read_tensors(slots(module, path and path + "."), shards)
        yield device
    finally:
        for part, name, parameter in absent:
            part._parameters[name] = parameter
