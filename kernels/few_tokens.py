"""Routed experts of one token or a few: the chosen experts' weights are read where they lie, and no others.

Owns the choice of ``few_tokens_triton.py``; elsewhere ``experts.py`` does them like many tokens, which on a CPU is as fast
(docs/log.md, 2026-11-27). Without a LoRA, as thinking is.
"""

import functools
import logging
from collections.abc import Callable

import torch

from .choice import triton_or

log = logging.getLogger("hywu")
# Every pair of a token and an expert reads its expert again.
FEW = 2
Scales = tuple[torch.Tensor, torch.Tensor]


def few_tokens(
    x_TD: torch.Tensor, gate_and_up_EFD: torch.Tensor, down_EDF: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor,
    scales: Scales | None = None,
) -> torch.Tensor | None:
    """As ``reference.expert_mlp`` without a LoRA, (T, D); None where this device or so many tokens need another way.

    scales: of weights in e4m3, what multiplies each of their rows, (E, 2F, 1) and (E, D, 1) fp32.
    """
    device, dtype = x_TD.device, x_TD.dtype
    if len(x_TD) > FEW or (function := chosen(device, dtype)) is None or (scales is not None and not reads_fp8(device, dtype)):
        return None
    return function(x_TD, gate_and_up_EFD, down_EDF, expert_TK, weight_TK, scales)


@functools.cache
def chosen(device: torch.device, dtype: torch.dtype) -> Callable[..., torch.Tensor] | None:
    """The kernel of this device, if it has one."""
    function, name = triton_or(None, "the products for many", "few_tokens_triton", device, dtype)
    log.info("HY-WU: the experts of a single token on %s in %s by %s", device, dtype, name)
    return function


@functools.cache
def reads_fp8(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel of this device takes weights in e4m3 (SM89 and newer)."""
    function, _ = triton_or(None, "", "few_tokens_triton", device, dtype, works="works_in_fp8")
    log.info("HY-WU: fp8 experts of a single token on %s %s", device, "are read as they are" if function else "are unpacked")
    return function is not None
