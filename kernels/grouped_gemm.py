"""Products of groups of rows with their experts' weights: the library's grouped GEMM, our Triton one, or a loop.

Owns which of the three a device gets: they are tried once a device and dtype, the choice is logged in one line and kept.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch.nn import functional as F

from .choice import triton_or
from .padding import ALIGNMENT, aligned

log = logging.getLogger("hywu")
GroupedGemm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def grouped_gemm(x_PI: torch.Tensor, weight_EOI: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """``y[p] = W[e] x[p]`` for the rows p from ``ends_E[e-1]`` to ``ends_E[e]``: (P, I), (E, O, I), (E,) int32 to (P, O).

    The inner stride of both is 1; rows may be views of something wider.
    """
    both = _aligned(x_PI) and _aligned(weight_EOI)
    return chosen(x_PI.device, x_PI.dtype, both)(x_PI, weight_EOI, ends_E)


def _aligned(x: torch.Tensor) -> bool:
    return x.data_ptr() % ALIGNMENT == 0 and all(stride == aligned(stride, x.dtype) for stride in x.stride()[:-1])


def library(x_PI: torch.Tensor, weight_EOI: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """PyTorch's own (CUTLASS on SM90 and newer; torch 2.10 and newer)."""
    return F.grouped_mm(x_PI, weight_EOI.mT, offs=ends_E)


def looped(x_PI: torch.Tensor, weight_EOI: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """One product an expert; reads the ends on the host."""
    y_PO = x_PI.new_empty(len(x_PI), weight_EOI.shape[1])
    begin = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > begin:
            torch.mm(x_PI[begin:end], weight_EOI[expert].mT, out=y_PO[begin:end])
        begin = end
    return y_PO


@functools.cache
def chosen(device: torch.device, dtype: torch.dtype, in_line: bool) -> GroupedGemm:
    """What this device does grouped products with; ``in_line``: strides are multiples of 16 bytes."""
    if in_line and _library_works(device, dtype):
        function, name = library, "the library"
    else:
        function, name = triton_or(looped, "a loop", "grouped_gemm_triton", device, dtype)
    log.info("HY-WU: grouped products of %s rows on %s in %s by %s", "aligned" if in_line else "other", device, dtype, name)
    return function


def _library_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the library does a small case, on a GPU without waiting for it: its fallback reads the ends on the host."""
    if not hasattr(F, "grouped_mm"):
        return False
    x, weight = torch.ones(32, 16, device=device, dtype=dtype), torch.ones(2, 16, 16, device=device, dtype=dtype)
    ends = torch.tensor([16, 32], dtype=torch.int32, device=device)
    before = 0
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # what others have queued fails as theirs, not as ours
        before = torch.cuda.get_sync_debug_mode()
    try:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        library(x, weight, ends)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # no kernel for this device or dtype, or it waits
        return False
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode(before)
    return True
