"""Projections that can carry a LoRA: the linear and the stack of routed experts.

Owns the weights, the slot for the adapter and the names under which both are published; the arithmetic is ``kernels``'. Nothing
here decides which LoRA is attached (``lora/attach.py``) or where weights lie while they are not needed (``placement/``).
Gradients and autocast go through the reference, all else through the fused kernels.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import nn

from ...kernels import experts as experts_kernel
from ...kernels import linear, reference
from ...kernels.padding import with_room
from ...kernels.reference import Adapter
from ..config import LoRATarget


def _plain_inference(x: torch.Tensor) -> bool:
    return not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)


class Room(NamedTuple):
    """Where a weight has room for a LoRA: behind its end along ``dim``, for ``sides`` A or B sides of the rank each."""

    dim: int
    sides: int


class Adapted(nn.Module):
    """A module with weights that have room for a LoRA behind them, see ``kernels/padding.py``.

    Weights get their room from whoever places them in a buffer (``place``); those that nobody placed when the first LoRA comes.
    A side of a LoRA that does not fit into the room stays beside the weight. A module that is *absent* has its weights on meta
    and gets them for the time of a forward pass only: ``place`` before it, ``leave`` after it. The adapters that it is given
    meanwhile wait where they are.
    """

    ROOMS: ClassVar[dict[str, Room]]

    def __init__(self):
        super().__init__()
        self.adapters: dict[str, Adapter] = {}
        self._waiting: dict[str, Adapter] = {}
        # weight -> (address, shape with the room): recognises a weight that was moved or copied since, and has none any more.
        self._rooms: dict[str, tuple[int, torch.Size]] = {}
        self._placed = False
        self._absent: dict[str, nn.Parameter] = {}

    def targets(self) -> list[LoRATarget]:
        raise NotImplementedError

    def published(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Published tensor names, relative to this module, to (views of) ``weights``, which are named as in ``ROOMS``."""
        raise NotImplementedError

    # ---- weights

    @property
    def adapter_device(self) -> torch.device:
        """Where adapters are taken from: the weights' device, or the CPU while there is none."""
        return torch.device("cpu") if self._absent else next(self.parameters()).device

    def place(self, buffers: Mapping[str, torch.Tensor], *, for_good: bool = False) -> None:
        """Take the weights from buffers with room behind them; adapters that wait are copied there."""
        if for_good:
            self._absent = {}
        for name, buffer in buffers.items():
            weight, dim = getattr(self, name), self.ROOMS[name].dim
            weight = nn.Parameter(buffer.narrow(dim, 0, weight.shape[dim]), requires_grad=False)
            setattr(self, name, weight)
            self._rooms[name] = (weight.data_ptr(), buffer.shape)
        self._placed = True
        for name, adapter in self._waiting.items():
            self.adapters[name] = self._land(name, adapter)

    def leave(self) -> None:
        """Let go of the weights: the module is absent from now on. Its adapters wait for the next ``place``."""
        if not self._absent:
            self._absent = {name: nn.Parameter(getattr(self, name).to("meta"), requires_grad=False) for name in self.ROOMS}
        for name, parameter in self._absent.items():
            setattr(self, name, parameter)
        self.adapters.clear()

    # ---- adapters

    def attach(self, name: str, adapter: Adapter | None) -> None:
        """Hang an adapter onto a target, or take it off. The side of it that has room behind a weight is copied there."""
        if adapter is None:
            self.adapters.pop(name, None)
            self._waiting.pop(name, None)
        elif self._one_a_row(adapter):
            self.adapters[name] = adapter
        elif self._absent:
            self._waiting[name] = adapter.folded().pinned()
        else:
            self.adapters[name] = self._land(name, adapter.folded())

    def attached(self) -> list[str]:
        return sorted({**self.adapters, **self._waiting})

    def _one_a_row(self, adapter: Adapter) -> bool:
        """Whether each row of a batch has a LoRA of its own: training."""
        raise NotImplementedError

    def _land(self, name: str, adapter: Adapter) -> Adapter:
        """The folded adapter on the weights' device, with the side in the room that has one."""
        raise NotImplementedError

    def _into_room(self, name: str, part: torch.Tensor, sides_before: int = 0) -> torch.Tensor:
        """``part`` behind the weight ``name``, or ``part`` as it is if whoever placed the weight left too little room."""
        room, weight = self.ROOMS[name], getattr(self, name)
        rank = part.shape[room.dim]
        buffer = self._with_room(name, room.sides * rank)
        if buffer is None:
            return part
        return buffer.narrow(room.dim, weight.shape[room.dim] + sides_before * rank, rank).copy_(part)

    def _with_room(self, name: str, room: int) -> torch.Tensor | None:
        """A weight with the room behind it; one that nobody placed is copied to where there is enough."""
        weight, dim = getattr(self, name), self.ROOMS[name].dim
        address, shape = self._rooms.get(name, (0, weight.shape))
        if address != weight.data_ptr() or shape[dim] < weight.shape[dim] + room:
            if self._placed:
                return None
            # Outside of inference mode, or what is made inside it could not be written to outside.
            with torch.inference_mode(False), torch.no_grad():
                buffer = with_room(weight.detach(), dim, room)
                weight = nn.Parameter(buffer.narrow(dim, 0, weight.shape[dim]), requires_grad=weight.requires_grad)
            setattr(self, name, weight)
            shape = buffer.shape
            self._rooms[name] = (weight.data_ptr(), shape)
        return weight.detach().as_strided(shape, weight.stride())


class AdaptedLinear(Adapted):
    """A linear without bias, ``weight`` (O, I), plus the LoRA in ``adapter`` when one is attached."""

    ROOMS: ClassVar[dict[str, Room]] = {"weight": Room(0, 1)}

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)

    @property
    def adapter(self) -> Adapter | None:
        return self.adapters.get("")

    def targets(self) -> list[LoRATarget]:
        out_features, in_features = self.weight.shape
        return [LoRATarget("", in_features, out_features)]

    def published(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., I) -> (..., O)."""
        if self.adapter is not None and self._one_a_row(self.adapter):
            return reference.adapted_linear_rows(x, self.weight, self.adapter)
        adapted_linear = linear.adapted_linear if _plain_inference(x) else reference.adapted_linear
        y_TO = adapted_linear(x.reshape(-1, x.shape[-1]), self.weight, self.adapter)
        return y_TO.view(*x.shape[:-1], -1)

    def _one_a_row(self, adapter: Adapter) -> bool:
        return adapter.a.ndim == 3

    def _land(self, name: str, adapter: Adapter) -> Adapter:
        adapter = adapter.to(self.weight.device)
        return adapter._replace(a=self._into_room("weight", adapter.a))


class Experts(Adapted):
    """All routed experts of a layer, stacked; a checkpoint holds them one by one (``{e}.gate_and_up_proj.weight``).

    gate_and_up_proj (E, 2F, D), its first F rows *up*; down_proj (E, D, F). A LoRA names the three projections w1 (gate), w2
    (down) and w3 (up).

    ``elsewhere`` does the work of ``forward`` for a few tokens while the weights are absent: whoever keeps them sets it.
    """

    ROOMS: ClassVar[dict[str, Room]] = {"gate_and_up_proj": Room(1, 2), "down_proj": Room(2, 1)}

    def __init__(self, experts: int, width: int, expert_width: int):
        super().__init__()
        self.gate_and_up_proj = nn.Parameter(torch.empty(experts, 2 * expert_width, width), requires_grad=False)
        self.down_proj = nn.Parameter(torch.empty(experts, width, expert_width), requires_grad=False)
        self.tokens_at_once = experts_kernel.TOKENS_AT_ONCE
        self.elsewhere: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    def published(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {f"{expert}.{name}.weight": weight_EOI[expert]
                for expert in range(self.down_proj.shape[0]) for name, weight_EOI in weights.items()}

    def checkpoint_slots(self) -> dict[str, torch.Tensor]:
        """Published tensor names, relative to this module, to views of the stacked parameters."""
        return self.published({name: getattr(self, name) for name in self.ROOMS})

    def targets(self) -> list[LoRATarget]:
        experts, width, expert_width = self.down_proj.shape
        return [
            LoRATarget("w1", width, expert_width, experts),
            LoRATarget("w2", expert_width, width, experts),
            LoRATarget("w3", width, expert_width, experts),
        ]

    def forward(self, x_BLD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the chosen experts, (B, L, D); T = B * L."""
        rows, length, width = x_BLD.shape
        if "w3" in self.adapters and self._one_a_row(self.adapters["w3"]):
            return reference.expert_mlp_rows(
                x_BLD, self.gate_and_up_proj, self.down_proj, expert_TK.view(rows, length, -1),
                weight_TK.view(rows, length, -1), up=self.adapters["w3"], gate=self.adapters["w1"], down=self.adapters["w2"])
        x_TD = x_BLD.reshape(-1, width)
        if self.gate_and_up_proj.is_meta and self.elsewhere is not None:
            return self.elsewhere(x_TD, expert_TK, weight_TK).view(x_BLD.shape)
        expert_mlp = reference.expert_mlp
        if _plain_inference(x_BLD):
            expert_mlp = partial(experts_kernel.expert_mlp, at_once=self.tokens_at_once)
        y_TD = expert_mlp(
            x_TD, self.gate_and_up_proj, self.down_proj, expert_TK, weight_TK,
            up=self.adapters.get("w3"), gate=self.adapters.get("w1"), down=self.adapters.get("w2"))
        return y_TD.view(x_BLD.shape)

    def _one_a_row(self, adapter: Adapter) -> bool:
        return adapter.a.ndim == 4

    def _land(self, name: str, adapter: Adapter) -> Adapter:
        adapter = adapter.to(self.down_proj.device)
        if name == "w2":
            return adapter._replace(a=adapter.a.contiguous(), b=self._into_room("down_proj", adapter.b))
        return adapter._replace(a=self._into_room("gate_and_up_proj", adapter.a, sides_before=1 if name == "w1" else 0))
