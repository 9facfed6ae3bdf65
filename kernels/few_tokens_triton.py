"""The experts of a few tokens in Triton, as matrix-vector products: two kernels instead of sorting, two GEMMs and combining.

The first makes ``up * silu(gate)`` of every pair of a token and one of its experts, the second multiplies by the down
projection and sums a token's experts. Bound by reading the chosen experts' weights, once each; sums in fp32. Which experts
they are is read on the device. Its twin is ``reference.expert_mlp``.
"""

import torch
import triton
import triton.language as tl

from .tiles import attempt

BLOCK_ROWS, BLOCK_I = 8, 512  # rows of a weight that a program makes, and columns of it that it reads at once


def kernel(
    x_TD: torch.Tensor, gate_and_up_EFD: torch.Tensor, down_EDF: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """As ``few_tokens.few_tokens``; the last axis of x and of the weights has stride 1."""
    (tokens, top_k), (_, width, inner) = expert_TK.shape, down_EDF.shape
    h_PF, y_TD = x_TD.new_empty(tokens * top_k, inner), x_TD.new_empty(tokens, width)
    expert_TK, weight_TK = expert_TK.contiguous(), weight_TK.contiguous()
    if not tokens:
        return y_TD
    first, second = scales or (weight_TK, weight_TK)  # which are not read then
    with torch.cuda.device_of(x_TD):
        _up_and_gate[(tokens * top_k, triton.cdiv(inner, BLOCK_ROWS))](
            x_TD, gate_and_up_EFD, first, expert_TK, h_PF, width, inner, x_TD.stride(0), gate_and_up_EFD.stride(0),
            gate_and_up_EFD.stride(1), first.stride(0), SCALED=scales is not None, TOP_K=top_k, BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_I=BLOCK_I)
        _down[(tokens, triton.cdiv(width, BLOCK_ROWS))](
            h_PF, down_EDF, second, expert_TK, weight_TK, y_TD, width, inner, down_EDF.stride(0), down_EDF.stride(1),
            second.stride(0), SCALED=scales is not None, TOP_K=top_k, BLOCK_ROWS=BLOCK_ROWS, BLOCK_I=BLOCK_I)
    return y_TD


def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a small case compiles, runs and comes out right here."""
    return _tried(device, dtype, dtype, None)


def works_in_fp8(device: torch.device, dtype: torch.dtype) -> bool:
    """The same with weights in e4m3."""
    scales = torch.full((2, 16, 1), 0.5, device=device), torch.full((2, 16, 1), 4.0, device=device)
    return _tried(device, dtype, torch.float8_e4m3fn, scales)


def _tried(device: torch.device, dtype: torch.dtype, kind: torch.dtype, scales) -> bool:
    # Of expert 1: up 16, gate 32 (8 and 16 with the scales), which is large enough to be its own SiLU; the other's would be 0.
    first = torch.tensor([0.0] * 8 + [0.0] * 8 + [1.0] * 8 + [2.0] * 8, device=device).view(2, 16, 1).repeat(1, 1, 16)
    second = torch.tensor([0.0, 1.0], device=device).view(2, 1, 1).repeat(1, 16, 8)
    y = attempt(kernel, torch.ones(1, 16, device=device, dtype=dtype), first.to(kind), second.to(kind),
                torch.tensor([[1, 0]], device=device), torch.tensor([[0.5, 0.5]], device=device), scales)
    # Four times the products of the halved ones, so the same.
    return y is not None and bool(((y.float() / 2048 - 1).abs() < 0.01).all())


@triton.jit
def _up_and_gate(
    x, weight, scales, experts, h, width, inner, x_row, weight_expert, weight_row, scale_expert,
    SCALED: tl.constexpr, TOP_K: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_I: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    rows = (tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    wanted = rows < inner
    expert = tl.load(experts + pair).to(tl.int64)
    mine, scale, x_I = weight + expert * weight_expert, scales + expert * scale_expert, x + pair // TOP_K * x_row
    up = _products(mine, weight_row, scale, rows, wanted, x_I, width, SCALED, BLOCK_ROWS, BLOCK_I)
    gate = _products(
        mine + inner * weight_row, weight_row, scale + inner, rows, wanted, x_I, width, SCALED, BLOCK_ROWS, BLOCK_I)
    tl.store(h + pair * inner + rows, (up * gate * tl.sigmoid(gate)).to(h.dtype.element_ty), mask=wanted)


@triton.jit
def _down(
    h, weight, scales, experts, shares, y, width, inner, weight_expert, weight_row, scale_expert,
    SCALED: tl.constexpr, TOP_K: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_I: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    rows = (tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    wanted = rows < width
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    for choice in range(TOP_K):
        pair = token * TOP_K + choice
        expert = tl.load(experts + pair).to(tl.int64)
        total += tl.load(shares + pair).to(tl.float32) * _products(
            weight + expert * weight_expert, weight_row, scales + expert * scale_expert, rows, wanted, h + pair * inner, inner,
            SCALED, BLOCK_ROWS, BLOCK_I)
    tl.store(y + token * width + rows, total.to(y.dtype.element_ty), mask=wanted)


@triton.jit
def _products(
    matrix, stride, scales, rows, wanted, vector, length, SCALED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_I: tl.constexpr,
):
    """Of some rows of an expert's matrix with a vector, fp32."""
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    for begin in range(0, length, BLOCK_I):
        columns = begin + tl.arange(0, BLOCK_I)
        inside = columns < length
        values = tl.load(vector + columns, mask=inside, other=0.0).to(tl.float32)
        at = matrix + rows[:, None] * stride + columns[None]
        total += tl.sum(tl.load(at, mask=wanted[:, None] & inside[None], other=0.0).to(tl.float32) * values[None], 1)
    if SCALED:
        total *= tl.load(scales + rows, mask=wanted, other=0.0)
    return total
