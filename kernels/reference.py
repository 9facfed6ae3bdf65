"""The specification of adapted projections, in plain torch: linears and routed experts with an un-merged LoRA.

Owns the arithmetic (spec sections 2 and 3); owns no weights and no routing decision. Runs on any device and dtype, is
differentiable, and is what every fused kernel is compared with. The law: ``W x + s · B (A x)``, never ``(W + s B A) x``.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F


class Adapter(NamedTuple):
    """The LoRA of one projection on the device of its weight.

    ``a``: (R, I) or (E, R, I); ``b``: (O, R) or (E, O, R); ``scale``: (R,) fp32, what multiplies each rank (alpha / rank ·
    strength; bf16 would round a strength of 0.3 by 0.3 %), None where ``b`` holds it already.
    Several LoRAs on one projection are one Adapter with their ranks side by side.
    In training every row of a batch has a LoRA of its own: then ``a`` is (B, R, I) or (B, E, R, I), ``b`` alike, and the
    functions whose names end in ``_rows`` apply it.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: torch.Tensor | None

    def folded(self) -> "Adapter":
        """The scale multiplied into b, in fp32 and rounded once: what the fused kernels take, contiguous."""
        return self if self.scale is None else Adapter(self.a, (self.b * self.scale).to(self.b.dtype).contiguous(), None)

    def to(self, device: torch.device) -> "Adapter":
        scale = None if self.scale is None else self.scale.to(device)
        return Adapter(self.a.to(device, non_blocking=True), self.b.to(device, non_blocking=True), scale)

    def pinned(self) -> "Adapter":
        """In pinned memory where there is a GPU that will copy it, again and again."""
        if not torch.cuda.is_available():
            return self
        return self._replace(a=self.a.contiguous().pin_memory(), b=self.b.contiguous().pin_memory())

    def scaled(self, u: torch.Tensor) -> torch.Tensor:
        """(..., R) products with a, times the scale in fp32, in their own dtype."""
        return u if self.scale is None else (u * self.scale).to(u.dtype)


def adapted_linear(x_TI: torch.Tensor, weight_OI: torch.Tensor, adapter: Adapter | None = None) -> torch.Tensor:
    """``x Wᵀ + (s · x Aᵀ) Bᵀ`` with a single rounding of the sum (addmm accumulates in fp32 for bf16 inputs).

    x_TI: (T, I), weight_OI: (O, I); returns (T, O) in the dtype of x.
    """
    y_TO = x_TI @ weight_OI.mT
    if adapter is None:
        return y_TO
    return torch.addmm(y_TO, adapter.scaled(x_TI @ adapter.a.mT), adapter.b.mT)


def adapted_linear_rows(x_BLI: torch.Tensor, weight_OI: torch.Tensor, adapter: Adapter) -> torch.Tensor:
    """``adapted_linear`` with one LoRA a row: a (B, R, I), b (B, O, R), or B = 1 for all; x_BLI to (B, L, O)."""
    y_BLO = x_BLI @ weight_OI.mT
    return y_BLO + adapter.scaled(x_BLI @ adapter.a.mT) @ adapter.b.mT


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """The first half of the last axis times the SiLU of the second: (..., 2F) to (..., F)."""
    up, gate = x.chunk(2, dim=-1)
    return up * F.silu(gate)


def expert_mlp(
    x_TD: torch.Tensor,
    gate_and_up_EFD: torch.Tensor,
    down_EDF: torch.Tensor,
    expert_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    up: Adapter | None = None,
    gate: Adapter | None = None,
    down: Adapter | None = None,
) -> torch.Tensor:
    """Routed experts with a LoRA on each projection: ``sum_k weight_k · down_k(up_k(x) · silu(gate_k(x)))``.

    Args:
        x_TD: (T, D) tokens.
        gate_and_up_EFD: (E, 2F, D); the first F rows are *up* (multiplied), the last F rows *gate* (SiLU), spec section 2.
        down_EDF: (E, D, F).
        expert_TK, weight_TK: (T, K) chosen experts (int64) and their weights, which multiply after the down projection.
        up, gate, down: the LoRA's w3, w1 and w2, stacked over experts.

    Returns: (T, D) in the dtype of x. Tokens of one expert are contiguous while it works; experts without tokens cost nothing.
    """
    tokens, top_k = expert_TK.shape
    order_P = torch.argsort(expert_TK.reshape(-1), stable=True)  # P = T·K pairs of a token and one of its experts
    counts = torch.bincount(expert_TK.reshape(-1), minlength=gate_and_up_EFD.shape[0]).tolist()
    x_PD = x_TD[order_P // top_k]
    parts = []
    for expert, x_pD in enumerate(x_PD.split(counts)):
        if not len(x_pD):
            continue
        up_pF, gate_pF = (x_pD @ gate_and_up_EFD[expert].mT).chunk(2, dim=-1)
        if up is not None:
            up_pF = _add_lora(up_pF, x_pD, up, expert)
        if gate is not None:
            gate_pF = _add_lora(gate_pF, x_pD, gate, expert)
        hidden_pF = up_pF * F.silu(gate_pF)
        y_pD = hidden_pF @ down_EDF[expert].mT
        if down is not None:
            y_pD = _add_lora(y_pD, hidden_pF, down, expert)
        parts.append(y_pD)
    y_PD = torch.cat(parts)
    # Back to the order of the tokens, then one sum over each token's experts: no atomics, the same bits every time.
    place_P = torch.empty_like(order_P)
    place_P[order_P] = torch.arange(len(order_P), device=order_P.device)
    y_TKD = y_PD[place_P].view(tokens, top_k, -1)
    return (y_TKD * weight_TK.to(x_TD.dtype).unsqueeze(-1)).sum(dim=1)


def _add_lora(y_pO: torch.Tensor, x_pI: torch.Tensor, adapter: Adapter, expert: int) -> torch.Tensor:
    return torch.addmm(y_pO, adapter.scaled(x_pI @ adapter.a[expert].mT), adapter.b[expert].mT)


def expert_mlp_rows(
    x_BLD: torch.Tensor,
    gate_and_up_EFD: torch.Tensor,
    down_EDF: torch.Tensor,
    expert_BLK: torch.Tensor,
    weight_BLK: torch.Tensor,
    up: Adapter,
    gate: Adapter,
    down: Adapter,
) -> torch.Tensor:
    """``expert_mlp`` with one LoRA a row of the batch: a (B, E, R, I), b (B, E, O, R), or B = 1 for all.

    Every expert sees every token and those not chosen get the weight zero: E / K times the arithmetic, but no sorting by both
    row and expert. Meant for training small models.

    Returns: (B, L, D) in the dtype of x.
    """
    experts, width, inner = down_EDF.shape
    share_BLE = x_BLD.new_zeros(*x_BLD.shape[:2], experts).scatter(-1, expert_BLK, weight_BLK.to(x_BLD.dtype))
    base_BLEF = (x_BLD @ gate_and_up_EFD.flatten(0, 1).mT).unflatten(-1, (experts, 2 * inner))
    up_BELF, gate_BELF = base_BLEF.transpose(1, 2).chunk(2, dim=-1)
    up_BELF = up_BELF + _lora_rows(x_BLD.unsqueeze(1), up)
    gate_BELF = gate_BELF + _lora_rows(x_BLD.unsqueeze(1), gate)
    hidden_BELF = up_BELF * F.silu(gate_BELF) * share_BLE.transpose(1, 2).unsqueeze(-1)
    base_BLD = hidden_BELF.transpose(1, 2).flatten(2) @ down_EDF.transpose(1, 2).flatten(0, 1)
    return base_BLD + _lora_rows(hidden_BELF, down).sum(dim=1)


def _lora_rows(x_BELI: torch.Tensor, adapter: Adapter) -> torch.Tensor:
    """(B, E or 1, L, I) through each row's and expert's own A and B: (B, E, L, O)."""
    return adapter.scaled(x_BELI @ adapter.a.mT) @ adapter.b.mT
