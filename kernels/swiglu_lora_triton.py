"""``swiglu_lora`` as one Triton kernel: every tile of pairs is read and written once; twin of ``swiglu_lora.composed``."""

import torch
import triton
import triton.language as tl

from .reference import Adapter
from .tiles import SIDES, attempt, expert_of_tile


def kernel(
    first_PG: torch.Tensor, up: Adapter, gate: Adapter, down: Adapter, ends_E: torch.Tensor, out_PH: torch.Tensor
) -> torch.Tensor:
    """As ``swiglu_lora.composed``, for ranks up to 64; leaves ``first_PG`` as it was. The last axis of a and b has stride 1."""
    pairs, (experts, rank, inner) = len(first_PG), down.a.shape
    if not pairs:
        return out_PH
    # tl.dot wants at least 16 along every side.
    ranks, block = max(16, triton.next_power_of_2(rank)), SIDES[first_PG.itemsize]
    with torch.cuda.device_of(first_PG):
        _swiglu_lora[(triton.cdiv(pairs, block) + min(experts, pairs),)](
            first_PG, up.b, gate.b, down.a, ends_E, out_PH, inner, rank, first_PG.stride(0), out_PH.stride(0), up.b.stride(0),
            up.b.stride(1), gate.b.stride(0), gate.b.stride(1), down.a.stride(0), down.a.stride(1), EXPERTS=experts,
            EXPERTS_UP=triton.next_power_of_2(experts), RANKS=ranks, BLOCK_P=block, BLOCK_F=block)
    return out_PH


def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a small case compiles, runs and comes out right here."""
    ones = Adapter(torch.ones(1, 16, 32, device=device, dtype=dtype), torch.ones(1, 32, 16, device=device, dtype=dtype), None)
    # Two rows: up 1 + 16, gate 32 + 0, which is large enough to be its own SiLU.
    first = torch.tensor([1] * 32 + [32] * 32 + [1] * 16 + [0] * 16, device=device, dtype=dtype).repeat(2, 1)
    ends = torch.tensor([2], dtype=torch.int32, device=device)
    out = attempt(kernel, first, ones, ones, ones, ends, first.new_empty(2, 48))
    return out is not None and bool((out[:, :32] == 17 * 32).all() and (out[:, 32:] == 17 * 32 * 32).all())


@triton.jit
def _swiglu_lora(
    first, up_b, gate_b, down_a, ends, out, inner, rank, first_row, out_row,
    up_expert, up_row, gate_expert, gate_row, down_expert, down_row,
    EXPERTS: tl.constexpr, EXPERTS_UP: tl.constexpr, RANKS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_F: tl.constexpr,
):
    expert, begin, end = expert_of_tile(ends, tl.program_id(0), EXPERTS, EXPERTS_UP, BLOCK_P)
    if expert < EXPERTS:
        rows, ranks = (begin + tl.arange(0, BLOCK_P)).to(tl.int64), tl.arange(0, RANKS)
        alive, ranked = (rows < end)[:, None], ranks < rank
        both = alive & ranked[None]
        kind = out.dtype.element_ty
        number = expert.to(tl.int64)
        u_at = first + rows[:, None] * first_row + 2 * inner + ranks[None]
        u3 = tl.load(u_at, mask=both, other=0.0)
        u1 = tl.load(u_at + rank, mask=both, other=0.0)
        u2 = tl.zeros((BLOCK_P, RANKS), tl.float32)
        for start in range(0, inner, BLOCK_F):
            columns = start + tl.arange(0, BLOCK_F)
            inside = columns < inner
            filled = alive & inside[None]
            b_mask = ranked[:, None] & inside[None]
            b3 = tl.load(up_b + number * up_expert + columns[None] * up_row + ranks[:, None], mask=b_mask, other=0.0)
            b1 = tl.load(gate_b + number * gate_expert + columns[None] * gate_row + ranks[:, None], mask=b_mask, other=0.0)
            a2 = tl.load(down_a + number * down_expert + ranks[None] * down_row + columns[:, None],
                         mask=ranked[None] & inside[:, None], other=0.0)
            at = first + rows[:, None] * first_row + columns[None]
            up = tl.load(at, mask=filled, other=0.0).to(tl.float32)
            gate = tl.load(at + inner, mask=filled, other=0.0).to(tl.float32)
            up = tl.dot(u3, b3, up, input_precision="ieee")
            gate = tl.dot(u1, b1, gate, input_precision="ieee")
            h = (up * gate * tl.sigmoid(gate)).to(kind)
            tl.store(out + rows[:, None] * out_row + columns[None], h, mask=filled)
            u2 = tl.dot(h, a2, u2, input_precision="ieee")
        tl.store(out + rows[:, None] * out_row + inner + ranks[None], u2.to(kind), mask=both)
