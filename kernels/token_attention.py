"""Attention of one token to the slots of a cache in use, where only the device knows how many these are.

A captured graph is replayed for every token, so nothing in it may have another shape than before. Owns the torch twin and the
choice between it and ``token_attention_triton.py``.
"""

import functools
import logging
from collections.abc import Callable

import torch

from .choice import triton_or

log = logging.getLogger("hywu")


def token_attention(
    q_BHLQ: torch.Tensor, k_BHCQ: torch.Tensor, v_BHCQ: torch.Tensor, last_L: torch.Tensor
) -> torch.Tensor:
    """(B, H, 1, Q) queries to (B, H, 1, Q); keys and values (B, H_kv, C, Q), of which the slots 0 to ``last_L`` (1,) int64 are
    seen. What lies behind may be anything."""
    return chosen(q_BHLQ.device, q_BHLQ.dtype)(q_BHLQ, k_BHCQ, v_BHCQ, last_L)


def composed(q_BHLQ: torch.Tensor, k_BHCQ: torch.Tensor, v_BHCQ: torch.Tensor, last_L: torch.Tensor) -> torch.Tensor:
    """In plain torch."""
    rows, kv_heads, capacity, head_dim = k_BHCQ.shape
    behind_C = torch.arange(capacity, device=k_BHCQ.device) > last_L
    # A group's heads see the same, so they are as many queries of one head.
    score_BHGC = q_BHLQ.reshape(rows, kv_heads, -1, head_dim) @ k_BHCQ.mT * head_dim**-0.5
    share_BHGC = score_BHGC.float().masked_fill(behind_C, -torch.inf).softmax(-1).to(v_BHCQ.dtype)
    return (share_BHGC @ v_BHCQ.masked_fill(behind_C[:, None], 0.0)).view(q_BHLQ.shape)


@functools.cache
def chosen(device: torch.device, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """What this device does it with."""
    function, name = triton_or(composed, "torch", "token_attention_triton", device, dtype)
    log.info("HY-WU: attention of a single token on %s in %s by %s", device, dtype, name)
    return function
