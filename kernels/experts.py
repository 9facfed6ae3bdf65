"""Routed experts with their LoRA in the padding: as many big products with it as without it.

Owns the order of the steps; same signature and same mathematics as ``reference.expert_mlp``. Meant for inference: gradients go
through the reference. Where the LoRA's A side lies behind the weights' rows (``padding.py``) the first product computes it on
the way, and where the down projection's B side lies behind its columns the second product adds it on the way.
"""

import torch

from .few_tokens import chosen as few_tokens_choice
from .few_tokens import few_tokens
from .grouped_gemm import chosen as grouped_gemm_choice
from .grouped_gemm import grouped_gemm
from .padding import beside
from .reference import Adapter, swiglu
from .routing import combine, route
from .swiglu_lora import chosen as swiglu_lora_choice
from .swiglu_lora import swiglu_lora
from .token_attention import chosen as token_attention_choice

# More tokens are done in pieces: at the published sizes a piece needs 2.7 GB on the way (its pairs and their first product),
# and reading the weights again for the next one is 6 % of its time; both are computed, for an H200. It changes no result.
TOKENS_AT_ONCE = 16_384


def expert_mlp(
    x_TD: torch.Tensor,
    gate_and_up_EFD: torch.Tensor,
    down_EDF: torch.Tensor,
    expert_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    up: Adapter | None = None,
    gate: Adapter | None = None,
    down: Adapter | None = None,
    at_once: int = TOKENS_AT_ONCE,
) -> torch.Tensor:
    """``sum_k weight_k · down_k(up_k(x) · silu(gate_k(x)))``, (T, D); arguments as in ``reference.expert_mlp``.

    A LoRA has all three adapters or none. More than ``at_once`` tokens are done in pieces.
    """
    if len(x_TD) > at_once:
        parts = zip(*(each.split(at_once) for each in (x_TD, expert_TK, weight_TK)), strict=True)
        return torch.cat([
            expert_mlp(x, gate_and_up_EFD, down_EDF, expert, weight, up, gate, down, at_once) for x, expert, weight in parts])
    if up is None and (few_TD := few_tokens(x_TD, gate_and_up_EFD, down_EDF, expert_TK, weight_TK)) is not None:
        return few_TD
    routes = route(expert_TK, len(down_EDF))
    ends_E, inner = routes.ends_E, down_EDF.shape[2]
    # No tensor of all pairs keeps a name for longer than it is needed.
    if up is None:
        hidden_PF = swiglu(grouped_gemm(x_TD[routes.token_P], gate_and_up_EFD, ends_E))
        return combine(grouped_gemm(hidden_PF, down_EDF, ends_E), routes, weight_TK)
    up, gate, down = up.folded(), gate.folded(), down.folded()
    hidden_PH = swiglu_lora(
        _columns(x_TD[routes.token_P], (gate_and_up_EFD, up.a, gate.a), ends_E), up, gate, down, ends_E)
    if (long_EDH := beside(down_EDF, down.b, dim=2)) is not None:
        y_PD = grouped_gemm(hidden_PH, long_EDH, ends_E)
    else:
        y_PD = grouped_gemm(hidden_PH[:, :inner], down_EDF, ends_E)
        y_PD += grouped_gemm(hidden_PH[:, inner:], down.b, ends_E)
    del hidden_PH
    return combine(y_PD, routes, weight_TK)


def choose(device: torch.device, dtype: torch.dtype) -> None:
    """Try out the kernels of a GPU now, while no other thread uses it: trying makes any wait for it an error for a moment."""
    if device.type == "cuda":
        for in_line in (True, False):
            grouped_gemm_choice(device, dtype, in_line)
        for choice in (swiglu_lora_choice, few_tokens_choice, token_attention_choice):
            choice(device, dtype)


def _columns(x_PD: torch.Tensor, weights: tuple[torch.Tensor, ...], ends_E: torch.Tensor) -> torch.Tensor:
    """The products with all ``weights`` (E, ., D) side by side: one product if they lie behind each other."""
    if (wide_EGD := beside(*weights, dim=1)) is not None:
        return grouped_gemm(x_PD, wide_EGD, ends_E)
    return torch.cat([grouped_gemm(x_PD, weight_EOD, ends_E) for weight_EOD in weights], dim=1)
