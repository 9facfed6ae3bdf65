"""Projections that can carry a LoRA: the linear and the stack of routed experts.

Owns the weights, the slot for the adapter and the names under which both are published; the arithmetic is ``kernels``'. Nothing
here decides which LoRA is attached: see ``lora/attach.py``.
"""

import torch
from torch import nn

from ...kernels import reference
from ...kernels.reference import Adapter
from ..config import LoRATarget


class AdaptedLinear(nn.Module):
    """A linear without bias, ``weight`` (O, I), plus the LoRA in ``adapter`` when one is attached."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.adapter: Adapter | None = None

    def targets(self) -> list[LoRATarget]:
        out_features, in_features = self.weight.shape
        return [LoRATarget("", in_features, out_features)]

    def attach(self, name: str, adapter: Adapter | None) -> None:
        self.adapter = adapter

    def attached(self) -> list[str]:
        return [""] if self.adapter is not None else []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., I) -> (..., O)."""
        if self.adapter is not None and self.adapter.a.ndim == 3:  # one LoRA a row: training
            return reference.adapted_linear_rows(x, self.weight, self.adapter)
        y_TO = reference.adapted_linear(x.reshape(-1, x.shape[-1]), self.weight, self.adapter)
        return y_TO.view(*x.shape[:-1], -1)


class Experts(nn.Module):
    """All routed experts of a layer, stacked; a checkpoint holds them one by one (``{e}.gate_and_up_proj.weight``).

    gate_and_up_proj (E, 2F, D), its first F rows *up*; down_proj (E, D, F). A LoRA names the three projections w1 (gate), w2
    (down) and w3 (up).
    """

    def __init__(self, experts: int, width: int, expert_width: int):
        super().__init__()
        self.gate_and_up_proj = nn.Parameter(torch.empty(experts, 2 * expert_width, width), requires_grad=False)
        self.down_proj = nn.Parameter(torch.empty(experts, width, expert_width), requires_grad=False)
        self.adapters: dict[str, Adapter] = {}

    def checkpoint_slots(self) -> dict[str, torch.Tensor]:
        """Published tensor names, relative to this module, to views of the stacked parameters."""
        slots = {}
        for expert in range(self.down_proj.shape[0]):
            slots[f"{expert}.gate_and_up_proj.weight"] = self.gate_and_up_proj[expert]
            slots[f"{expert}.down_proj.weight"] = self.down_proj[expert]
        return slots

    def targets(self) -> list[LoRATarget]:
        experts, width, expert_width = self.down_proj.shape
        return [
            LoRATarget("w1", width, expert_width, experts),
            LoRATarget("w2", expert_width, width, experts),
            LoRATarget("w3", width, expert_width, experts),
        ]

    def attach(self, name: str, adapter: Adapter | None) -> None:
        if adapter is None:
            self.adapters.pop(name, None)
        else:
            self.adapters[name] = adapter

    def attached(self) -> list[str]:
        return sorted(self.adapters)

    def forward(self, x_BLD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the chosen experts, (B, L, D); T = B * L."""
        rows, length, width = x_BLD.shape
        if "w3" in self.adapters and self.adapters["w3"].a.ndim == 4:  # one LoRA a row: training
            return reference.expert_mlp_rows(
                x_BLD, self.gate_and_up_proj, self.down_proj, expert_TK.view(rows, length, -1),
                weight_TK.view(rows, length, -1), up=self.adapters["w3"], gate=self.adapters["w1"], down=self.adapters["w2"])
        x_TD = x_BLD.reshape(-1, width)
        y_TD = reference.expert_mlp(
            x_TD, self.gate_and_up_proj, self.down_proj, expert_TK, weight_TK,
            up=self.adapters.get("w3"), gate=self.adapters.get("w1"), down=self.adapters.get("w2"))
        return y_TD.view(x_BLD.shape)
