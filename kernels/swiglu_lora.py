"""What lies between the two big products of the routed experts: the B side of gate and up, SwiGLU, and the A side of down.

Owns the torch twin and the choice between it and ``swiglu_lora_triton.py``. The first product gives
``[up | gate | x A3 | x A1]`` for every pair of a token and an expert; the second one wants ``[h | h A2]`` side by side.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch.nn import functional as F

from .choice import triton_or
from .grouped_gemm import grouped_gemm
from .padding import aligned
from .reference import Adapter

log = logging.getLogger("hywu")
MOST_RANKS = 64  # more do not fit into the shared memory of consumer cards


def swiglu_lora(first_PG: torch.Tensor, up: Adapter, gate: Adapter, down: Adapter, ends_E: torch.Tensor) -> torch.Tensor:
    """(P, 2F + 2R) to (P, F + R), a view whose rows are aligned for ``grouped_gemm``.

    first_PG: columns ``[up | gate | x A3 | x A1]``; is written over. up, gate: only ``b`` (E, F, R) is used, with the scale in
    it; down: only ``a`` (E, R, F).
    """
    experts, rank, inner = down.a.shape
    out_PH = first_PG.new_empty(len(first_PG), aligned(inner + rank, first_PG.dtype))[:, : inner + rank]
    function = composed if rank > MOST_RANKS else chosen(first_PG.device, first_PG.dtype)
    return function(first_PG, up, gate, down, ends_E, out_PH)


def composed(
    first_PG: torch.Tensor, up: Adapter, gate: Adapter, down: Adapter, ends_E: torch.Tensor, out_PH: torch.Tensor
) -> torch.Tensor:
    """In plain torch, into ``out_PH``."""
    rank, inner = down.a.shape[1:]
    up_PF, gate_PF, u3_PR, u1_PR = first_PG.split((inner, inner, rank, rank), dim=1)
    up_PF += grouped_gemm(u3_PR, up.b, ends_E)
    gate_PF += grouped_gemm(u1_PR, gate.b, ends_E)
    torch.mul(up_PF, F.silu(gate_PF), out=out_PH[:, :inner])
    out_PH[:, inner:] = grouped_gemm(out_PH[:, :inner], down.a, ends_E)
    return out_PH


@functools.cache
def chosen(device: torch.device, dtype: torch.dtype) -> Callable[..., None]:
    """What this device does it with."""
    function, name = triton_or(composed, "torch", "swiglu_lora_triton", device, dtype)
    log.info("HY-WU: the experts' LoRA on %s in %s by %s", device, dtype, name)
    return function
