"""The norms of the backbone's own weights, target by target: what a LoRA's update is measured against.

Owns measuring, one layer at a time wherever its weights are kept, and remembering the result for as long as the backbone lives.
Packed weights are measured as they are computed with. Nothing is written, and at most one expert's matrix is in fp32 at once.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from ..backbone.adapted import AdaptedLinear, Experts
from ..backbone.model import Backbone
from ..backbone.stage import Stage
from ..progress import Tick, silent

Key = tuple[int, str]  # backbone layer, name of the target: (0, "mlp.experts.w1")


@dataclass(frozen=True)
class WeightNorms:
    """Frobenius norms by layer and target: () fp64, or (E,) for the routed experts' targets."""

    values: dict[Key, torch.Tensor]

    def whole(self, layer: int, target: str) -> float:
        """Of all experts of a target together."""
        return float(self.values[layer, target].norm())


_KNOWN: WeakKeyDictionary[Backbone, WeightNorms] = WeakKeyDictionary()


@torch.no_grad()
def weight_norms(backbone: Backbone, on_tick: Tick = silent) -> WeightNorms:
    """The norms of all adapted weights; measured once for a backbone. Ticks per layer, each a cancel point.

    A backbone that is loaded again in another format keeps its norms: packing changes them by less than a percent.

    Raises:
        RequestError: the backbone was unloaded.
        CheckpointError: a layer that stays on disk cannot be read any more.
    """
    if (known := _KNOWN.get(backbone)) is not None:
        return known
    values: dict[Key, torch.Tensor] = {}
    total = len(backbone.model.layers)
    with backbone.at_work():
        for stage in backbone.stages:
            for index in range(len(stage.layers)):
                values |= _layer(stage, index)
                on_tick(stage.first + index + 1, total, None)
    _KNOWN[backbone] = found = WeightNorms(values)
    return found


def _layer(stage: Stage, index: int) -> dict[Key, torch.Tensor]:
    """The norms of one layer; its weights come as for a long prompt, so that all experts do."""
    number, found = stage.first + index, {}
    with stage.present(index, 1 << 20):
        for path, module in stage.layers[index].named_modules():
            if isinstance(module, AdaptedLinear):
                found[number, path] = _norm(module.weight)
            elif isinstance(module, Experts):
                found |= {(number, f"{path}.{name}"): norms for name, norms in _experts(module).items()}
        # Inside the block: on a GPU the next layer may overwrite what is still being read.
        return {key: norms.cpu() for key, norms in found.items()}


def _experts(module: Experts) -> dict[str, torch.Tensor]:
    """w1 is the gate, the second half of the first stack's rows, and w3 the up projection, the first half."""
    inner = module.down_proj.shape[2]
    up_EFD, gate_EFD = module.gate_and_up_proj.split(inner, dim=1)
    return {"w1": _norms(gate_EFD), "w2": _norms(module.down_proj), "w3": _norms(up_EFD)}


def _norms(stack_EOI: torch.Tensor) -> torch.Tensor:
    return torch.stack([_norm(matrix_OI) for matrix_OI in stack_EOI])


def _norm(matrix_OI: torch.Tensor) -> torch.Tensor:
    """() fp64: rows in fp32, as one sum of millions of squares in it would lose digits, and their sum in fp64."""
    return torch.linalg.vector_norm(matrix_OI, dim=-1, dtype=torch.float32).double().norm()
