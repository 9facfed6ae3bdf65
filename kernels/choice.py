"""Whether a device gets a kernel in Triton or its twin in torch.

Triton is imported here, on the first use on a GPU, and nowhere else: the node pack must load without it.
"""

import importlib
from collections.abc import Callable

import torch


def triton_or(
    twin: Callable, name: str, module: str, device: torch.device, dtype: torch.dtype, works: str = "works",
) -> tuple[Callable, str]:
    """``module``'s ``kernel`` where it works, else its ``twin``; with the name of what was chosen, for the log.

    module: a file beside this one with ``kernel`` and ``works(device, dtype)``, or another name for what tries it out.
    """
    if device.type != "cuda":
        return twin, name
    try:
        found = importlib.import_module(f".{module}", __package__)
    except ImportError:
        return twin, f"{name} (Triton is not installed: it is faster)"
    return (found.kernel, "Triton") if getattr(found, works)(device, dtype) else (twin, name)
