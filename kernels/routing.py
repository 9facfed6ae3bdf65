"""Tokens to experts and back, without leaving the device: no ``.item()``, no ``.tolist()``, no atomics.

Owns the order in which pairs of a token and one of its experts are worked on; whose weights they meet is ``experts.py``'s.
"""

import functools
from typing import NamedTuple

import torch


class Routes(NamedTuple):
    """P = T·K pairs of a token and one of its experts, sorted by expert and within an expert by token.

    token_P: each pair's token. pair_P: where each pair stood in the flattened (T, K) choice. ends_E: int32, behind each
    expert's last pair; an expert without tokens ends where it begins.
    """

    token_P: torch.Tensor
    pair_P: torch.Tensor
    ends_E: torch.Tensor


def route(expert_TK: torch.Tensor, experts: int) -> Routes:
    """Sort the chosen experts (T, K), int64."""
    expert_P, pair_P = torch.sort(expert_TK.reshape(-1), stable=True)
    ends_E = torch.searchsorted(expert_P, _numbers(experts, expert_P.device), right=True, out_int32=True)
    return Routes(pair_P // expert_TK.shape[1], pair_P, ends_E)


@functools.cache
def _numbers(experts: int, device: torch.device) -> torch.Tensor:
    """0 to E-1, made once and never written to."""
    with torch.inference_mode(False):
        return torch.arange(experts, device=device)


def combine(y_PD: torch.Tensor, routes: Routes, weight_TK: torch.Tensor) -> torch.Tensor:
    """Each token's weighted sum over its experts: (P, D) in the order of ``routes`` to (T, D), the same bits every time."""
    tokens, top_k = weight_TK.shape
    y_TKD = torch.empty_like(y_PD).index_copy_(0, routes.pair_P, y_PD).view(tokens, top_k, -1)
    return torch.bmm(weight_TK.to(y_PD.dtype).unsqueeze(1), y_TKD).squeeze(1)
