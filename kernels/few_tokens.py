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


def few_tokens(
    x_TD: torch.Tensor, gate_and_up_EFD: torch.Tensor, down_EDF: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor,
) -> torch.Tensor | None:
    """As ``reference.expert_mlp`` without a LoRA, (T, D); None where this device or so many tokens need another way."""
    if len(x_TD) > FEW or (function := chosen(x_TD.device, x_TD.dtype)) is None:
        return None
    return function(x_TD, gate_and_up_EFD, down_EDF, expert_TK, weight_TK)


@functools.cache
def chosen(device: torch.device, dtype: torch.dtype) -> Callable[..., torch.Tensor] | None:
    """The kernel of this device, if it has one."""
    function, name = triton_or(None, "the products for many", "few_tokens_triton", device, dtype)
    log.info("HY-WU: the experts of a single token on %s in %s by %s", device, dtype, name)
    return function
