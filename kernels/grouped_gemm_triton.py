"""The grouped GEMM in Triton, for GPUs and PyTorch versions whose own one loops on the host.

Tiles of rows never cross from one expert to the next: each program finds its expert from the ends, so nothing is padded and
nothing leaves the device. Accumulates in fp32. Its twin is ``grouped_gemm.looped``.
"""

import torch
import triton
import triton.language as tl

from .tiles import attempt, expert_of_tile

BLOCK_P, BLOCK_O, BLOCK_I = 64, 128, 32


def kernel(x_PI: torch.Tensor, weight_EOI: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """As ``grouped_gemm.grouped_gemm``; nothing has to be aligned."""
    pairs, inner = x_PI.shape
    experts, out_features, _ = weight_EOI.shape
    y_PO = x_PI.new_empty(pairs, out_features)
    if not pairs:
        return y_PO
    # Every expert with tokens may leave one tile that is not full.
    tiles = triton.cdiv(pairs, BLOCK_P) + min(experts, pairs)
    with torch.cuda.device_of(x_PI):
        _grouped_gemm[(triton.cdiv(out_features, BLOCK_O), tiles)](
            x_PI, weight_EOI, ends_E, y_PO, out_features, inner, x_PI.stride(0), weight_EOI.stride(0), weight_EOI.stride(1),
            y_PO.stride(0), EXPERTS=experts, EXPERTS_UP=triton.next_power_of_2(experts), BLOCK_P=BLOCK_P, BLOCK_O=BLOCK_O,
            BLOCK_I=BLOCK_I)
    return y_PO


def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a small case compiles, runs and comes out right here; what is missing may be a C compiler or shared memory."""
    x, weight = torch.ones(3, 16, device=device, dtype=dtype), torch.ones(2, 8, 16, device=device, dtype=dtype)
    y = attempt(kernel, x, weight, torch.tensor([1, 3], dtype=torch.int32, device=device))
    return y is not None and bool((y == 16).all())


@triton.jit
def _grouped_gemm(
    x, weight, ends, y, out_features, inner, x_row, weight_expert, weight_row, y_row,
    EXPERTS: tl.constexpr, EXPERTS_UP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):
    expert, first, end = expert_of_tile(ends, tl.program_id(1), EXPERTS, EXPERTS_UP, BLOCK_P)
    if expert < EXPERTS:
        rows = (first + tl.arange(0, BLOCK_P)).to(tl.int64)
        columns = (tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)
        alive, wanted = (rows < end)[:, None], (columns < out_features)[None]
        weight += expert.to(tl.int64) * weight_expert
        total = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
        for begin in range(0, inner, BLOCK_I):
            k = begin + tl.arange(0, BLOCK_I)
            left = tl.load(x + rows[:, None] * x_row + k[None], mask=alive & (k < inner)[None], other=0.0)
            right = tl.load(weight + columns[None] * weight_row + k[:, None], mask=wanted & (k < inner)[:, None], other=0.0)
            total = tl.dot(left, right, total, input_precision="ieee")
        tl.store(y + rows[:, None] * y_row + columns[None], total.to(y.dtype.element_ty), mask=alive & wanted)
