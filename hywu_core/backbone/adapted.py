"""Projections that can carry a LoRA: the linear and the stack of routed experts.

Owns the weights, the slot for the adapter and the names under which both are published; the arithmetic is ``kernels``'. Nothing
here decides which LoRA is attached: see ``lora/attach.py``. Gradients and autocast go through the reference, all else through
the fused kernels.
"""

import torch
from torch import nn

from ...kernels import experts, linear, reference
from ...kernels.padding import with_room
from ...kernels.reference import Adapter
from ..config import LoRATarget


def _plain_inference(x: torch.Tensor) -> bool:
    return not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)


class WithRoom(nn.Module):
    """A module whose weights get room for a LoRA behind them when the first one comes, see ``kernels/padding.py``."""

    def __init__(self):
        super().__init__()
        # weight -> (address, shape with the room): recognises a weight that was moved or copied since, and has none any more.
        self._rooms: dict[str, tuple[int, torch.Size]] = {}

    def _room(self, name: str, dim: int, room: int) -> torch.Tensor:
        """A weight with the room behind it, which is made larger first where it is too small; the weight is copied then."""
        weight = getattr(self, name)
        address, shape = self._rooms.get(name, (0, weight.shape))
        if address != weight.data_ptr() or shape[dim] < weight.shape[dim] + room:
            # Outside of inference mode, or what is made inside it could not be written to outside.
            with torch.inference_mode(False), torch.no_grad():
                buffer = with_room(weight.detach(), dim, room)
                weight = nn.Parameter(buffer.narrow(dim, 0, weight.shape[dim]), requires_grad=weight.requires_grad)
            setattr(self, name, weight)
            shape = buffer.shape
            self._rooms[name] = (weight.data_ptr(), shape)
        return weight.detach().as_strided(shape, weight.stride())


class AdaptedLinear(WithRoom):
    """A linear without bias, ``weight`` (O, I), plus the LoRA in ``adapter`` when one is attached."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.adapter: Adapter | None = None

    def targets(self) -> list[LoRATarget]:
        out_features, in_features = self.weight.shape
        return [LoRATarget("", in_features, out_features)]

    def attach(self, name: str, adapter: Adapter | None) -> None:
        """Hang an adapter onto the linear, or take it off. Its a is copied behind the weight's rows."""
        if adapter is not None and adapter.a.ndim == 2:
            adapter, rank = adapter.folded(), len(adapter.a)
            adapter = adapter._replace(a=self._room("weight", 0, rank).narrow(0, len(self.weight), rank).copy_(adapter.a))
        self.adapter = adapter

    def attached(self) -> list[str]:
        return [""] if self.adapter is not None else []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., I) -> (..., O)."""
        if self.adapter is not None and self.adapter.a.ndim == 3:  # one LoRA a row: training
            return reference.adapted_linear_rows(x, self.weight, self.adapter)
        adapted_linear = linear.adapted_linear if _plain_inference(x) else reference.adapted_linear
        y_TO = adapted_linear(x.reshape(-1, x.shape[-1]), self.weight, self.adapter)
        return y_TO.view(*x.shape[:-1], -1)


class Experts(WithRoom):
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
        """Hang an adapter onto w1, w2 or w3, or take it off. Its a (w1, w3) or b (w2) is copied behind the weights."""
        if adapter is None:
            self.adapters.pop(name, None)
        elif adapter.a.ndim == 4:  # one LoRA a row: training
            self.adapters[name] = adapter
        else:
            self.adapters[name] = self._in_the_room(name, adapter)

    def _in_the_room(self, name: str, adapter: Adapter) -> Adapter:
        adapter, rank = adapter.folded(), adapter.a.shape[1]
        if name == "w2":
            begin = self.down_proj.shape[2]
            place = self._room("down_proj", 2, rank).narrow(2, begin, rank)
            return adapter._replace(a=adapter.a.contiguous(), b=place.copy_(adapter.b))
        begin = self.gate_and_up_proj.shape[1] + (rank if name == "w1" else 0)
        place = self._room("gate_and_up_proj", 1, 2 * rank).narrow(1, begin, rank)
        return adapter._replace(a=place.copy_(adapter.a))

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
        expert_mlp = experts.expert_mlp if _plain_inference(x_BLD) else reference.expert_mlp
        y_TD = expert_mlp(
            x_TD, self.gate_and_up_proj, self.down_proj, expert_TK, weight_TK,
            up=self.adapters.get("w3"), gate=self.adapters.get("w1"), down=self.adapters.get("w2"))
        return y_TD.view(x_BLD.shape)
