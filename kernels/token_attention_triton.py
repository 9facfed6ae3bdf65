"""Attention of one token in Triton: the keys are cut into parts that are seen at the same time, and the parts are put together.

Flash-decoding (Dao and others, 2023) with the number of keys read on the device. A program takes all heads of a group, so keys
and values are read once. Sums in fp32. Its twin is ``token_attention.composed``.
"""

import torch
import triton
import triton.language as tl

from .tiles import SIDES, attempt

PARTS = 16  # of the keys of a head: 8 heads of keys in 16 parts are a program for each core of a large GPU


def kernel(q_BHLQ: torch.Tensor, k_BHCQ: torch.Tensor, v_BHCQ: torch.Tensor, last_L: torch.Tensor) -> torch.Tensor:
    """As ``token_attention.token_attention``; the last axis of all has stride 1."""
    (rows, heads, _, head_dim), kv_heads = q_BHLQ.shape, k_BHCQ.shape[1]
    group, out = heads // kv_heads, q_BHLQ.new_empty(rows, heads, 1, head_dim)
    # Of every head and part: the weighted values, the largest score, the sum of the weights.
    value_NPQ = q_BHLQ.new_empty(rows * heads, PARTS, head_dim, dtype=torch.float32)
    most_NP, sum_NP = (q_BHLQ.new_empty(rows * heads, PARTS, dtype=torch.float32) for _ in range(2))
    width = max(16, triton.next_power_of_2(head_dim))  # tl.dot wants at least 16 along every side
    with torch.cuda.device_of(q_BHLQ):
        _part[(rows * kv_heads, PARTS)](
            q_BHLQ, k_BHCQ, v_BHCQ, last_L, value_NPQ, most_NP, sum_NP, kv_heads, group, head_dim, head_dim**-0.5,
            q_BHLQ.stride(0), q_BHLQ.stride(1), k_BHCQ.stride(0), k_BHCQ.stride(1), k_BHCQ.stride(2), v_BHCQ.stride(0),
            v_BHCQ.stride(1), v_BHCQ.stride(2), GROUP=max(16, triton.next_power_of_2(group)), WIDTH=width,
            BLOCK_C=SIDES[k_BHCQ.itemsize], PARTS=PARTS)
        _whole[(rows * heads,)](value_NPQ, most_NP, sum_NP, out, head_dim, WIDTH=width, PARTS=PARTS)
    return out


def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a small case compiles, runs and comes out right here."""
    q, keys = torch.ones(1, 4, 1, 16, device=device, dtype=dtype), torch.ones(1, 2, 200, 16, device=device, dtype=dtype)
    values = torch.full_like(keys, float("nan"))
    values[:, :, :150] = 3.0
    out = attempt(kernel, q, keys, values, torch.tensor([149], device=device))
    return out is not None and bool(((out - 3.0).abs() < 0.02).all())


@triton.jit
def _part(
    q, k, v, last, value, most, total, kv_heads, group, head_dim, scale, q_batch, q_head, k_batch, k_head, k_slot, v_batch,
    v_head, v_slot, GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, PARTS: tl.constexpr,
):
    number, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = number // kv_heads, number % kv_heads
    seen = tl.load(last) + 1
    length = (seen + PARTS * BLOCK_C - 1) // (PARTS * BLOCK_C) * BLOCK_C  # slots of a part
    begin = part * length
    end = tl.minimum(begin + length, seen)
    members, columns = tl.arange(0, GROUP), tl.arange(0, WIDTH)
    real, inside = members < group, columns < head_dim
    q_GQ = tl.load(q + batch * q_batch + (head * group + members)[:, None] * q_head + columns[None],
                   mask=real[:, None] & inside[None], other=0.0)
    best = tl.full((GROUP,), -float("inf"), tl.float32)
    weights = tl.zeros((GROUP,), tl.float32)
    sums_GQ = tl.zeros((GROUP, WIDTH), tl.float32)
    for start in range(begin, end, BLOCK_C):
        slots = start + tl.arange(0, BLOCK_C).to(tl.int64)
        alive = slots < end
        there = alive[:, None] & inside[None]
        k_CQ = tl.load(k + batch * k_batch + head * k_head + slots[:, None] * k_slot + columns[None], mask=there, other=0.0)
        score = tl.dot(q_GQ, tl.trans(k_CQ), input_precision="ieee") * scale
        score = tl.where(alive[None], score, -float("inf"))
        # A block begins before the end, so it has a finite score.
        higher = tl.maximum(best, tl.max(score, 1))
        share = tl.exp(score - higher[:, None])
        kept = tl.exp(best - higher)
        v_CQ = tl.load(v + batch * v_batch + head * v_head + slots[:, None] * v_slot + columns[None], mask=there, other=0.0)
        sums_GQ = tl.dot(share.to(v_CQ.dtype), v_CQ, sums_GQ * kept[:, None], input_precision="ieee")
        weights = weights * kept + tl.sum(share, 1)
        best = higher
    at = (number * group + members) * PARTS + part
    tl.store(value + at[:, None] * head_dim + columns[None], sums_GQ, mask=real[:, None] & inside[None])
    tl.store(most + at, best, mask=real)
    tl.store(total + at, weights, mask=real)


@triton.jit
def _whole(value, most, total, out, head_dim, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    number = tl.program_id(0).to(tl.int64)
    parts, columns = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    inside = columns < head_dim
    most_P = tl.load(most + number * PARTS + parts)  # -inf of a part without keys; the first has some
    share_P = tl.exp(most_P - tl.max(most_P, 0))
    value_PQ = tl.load(value + (number * PARTS + parts)[:, None] * head_dim + columns[None], mask=inside[None], other=0.0)
    sum_Q = tl.sum(value_PQ * share_P[:, None], 0) / tl.sum(tl.load(total + number * PARTS + parts) * share_P, 0)
    tl.store(out + number * head_dim + columns, sum_Q.to(out.dtype.element_ty), mask=inside)
