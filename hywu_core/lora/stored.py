"""How the matrices of a LoRA lie in a file: as they are, as bfloat16, as fp8, and without the experts that matter least.

Owns packing and unpacking one matrix, and which experts are kept. Writes and reads nothing (``files.py``).

    as it is   the LoRA's own dtype
    bfloat16   rounded
    fp8        e4m3 and one fp32 scale a row, as ``checkpoint/formats.py`` packs weights; a reader gets bfloat16
    pruned     any of these, the routed experts in front reduced to those that hold a share of the experts' energy

What was packed is unpacked each time it is asked for: a loaded LoRA takes no more memory than its file.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..checkpoint.formats import Float8
from ..errors import LoRAError, RequestError
from ..progress import Tick, silent
from .spectrum import pairs, squares
from .value import LoRA

AS_IT_IS, BFLOAT16, FP8 = "as it is", "bfloat16", "fp8"
STORED = (AS_IT_IS, BFLOAT16, FP8)  # what users choose
SCALE = "_scale"  # what the name of a matrix's scales ends in: "...lora_A_scale"
MAX_EXPERTS = 4096
Field = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class Form:
    """How a LoRA is stored. dtype: what a reader gets. kept: for each layer the experts that are there; None for all."""

    stored: str
    dtype: torch.dtype
    kept: tuple[tuple[int, ...], ...] | None = None

    def fields(self, key: str, layer: int, shape: tuple[int, ...]) -> dict[str, Field]:
        """Name in the file -> dtype and shape, for a matrix A (R, I) or (E, R, I), or B likewise; empty if nothing is kept."""
        if self.kept is not None and len(shape) == 3:
            if not self.kept[layer]:
                return {}
            shape = (len(self.kept[layer]), *shape[1:])
        if self.stored != FP8:
            return {key: (self.dtype, shape)}
        return {name: tuple(field) for name, field in zip((key, key + SCALE), Float8().fields(shape).values(), strict=True)}

    def pack(self, key: str, layer: int, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of ``fields``. Raises LoRAError for NaN or Inf where they would turn into something else."""
        if self.kept is not None and matrix.ndim == 3:
            if not self.kept[layer]:
                return {}
            matrix = matrix[torch.tensor(self.kept[layer])]
        if self.stored == AS_IT_IS:
            return {key: matrix}
        if not torch.isfinite(narrow := matrix.to(self.dtype)).all():
            wrong = int((~torch.isfinite(narrow)).sum())
            raise LoRAError(f"{key} holds NaN, Inf or values too large for {self.stored} in {wrong} of {matrix.numel()} "
                            f"values, expected none: save it {AS_IT_IS!r}, or generate the LoRA again")
        if self.stored == BFLOAT16:
            return {key: narrow}
        # Rows have their own scales, so a stack is packed as one tall matrix: an operation for each expert would take minutes.
        packed = Float8().pack(matrix.detach().cpu().flatten(0, -2))
        return {key: packed["weight"].view(matrix.shape), key + SCALE: packed["weight_scale"].view(*matrix.shape[:-1], 1)}

    def unpack(self, key: str, layer: int, shape: tuple[int, ...], parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The matrix of ``shape`` that a reader gets, dropped experts as zeros; a plain one is handed out as it is."""
        pruned = self.kept is not None and len(shape) == 3
        if pruned and not self.kept[layer]:
            return torch.zeros((), dtype=self.dtype).expand(shape)
        matrix = parts[key]
        if self.stored == FP8:
            packed = {"weight": matrix.flatten(0, -2), "weight_scale": parts[key + SCALE].flatten(0, -2)}
            matrix = Float8().unpack(packed, torch.empty(packed["weight"].shape, dtype=self.dtype)).view(matrix.shape)
        if not pruned:
            return matrix
        whole = torch.zeros(shape, dtype=self.dtype)
        whole[torch.tensor(self.kept[layer])] = matrix
        return whole

    @property
    def plain(self) -> bool:
        """Whether the file holds the matrices themselves, one a key."""
        return self.stored != FP8 and self.kept is None


def form_for(lora: LoRA, stored: str, keep: float, on_tick: Tick = silent) -> Form:
    """The form in which to store ``lora``. keep: share of the experts' energy, 1 for all experts; ticks if it is below 1.

    Raises:
        RequestError: there is no such format, or ``keep`` is not within 0 < keep <= 1.
    """
    if stored not in STORED:
        raise RequestError(f"a LoRA cannot be stored as {stored!r}: choose one of {', '.join(map(repr, STORED))}")
    if not 0 < keep <= 1:
        raise RequestError(f"{keep:g} of the experts' energy cannot be kept: choose a share above 0 and at most 1")
    dtype = lora.dtype if stored == AS_IT_IS else torch.bfloat16
    if keep == 1 or not any(target.experts for target in lora.targets):
        return Form(stored, dtype)
    return Form(stored, dtype, kept_experts(expert_energy(lora, on_tick), keep))


def expert_energy(lora: LoRA, on_tick: Tick = silent) -> torch.Tensor:
    """(N, E) fp64: squared norm of each routed expert's update, its projections together; ticks per target of each layer.

    ``Spectra.expert_energy`` without the singular values, which take many times as long.

    Raises:
        LoRAError: the grouped targets differ in their number of experts.
    """
    counts = {target.experts for target in lora.targets if target.experts}
    if len(counts) != 1:
        raise LoRAError(f"the LoRA's grouped projections have {sorted(counts)} experts, expected one number to rank them by")
    energy_NE = torch.zeros(lora.num_layers, counts.pop(), dtype=torch.float64)
    for pair in pairs(lora, on_tick):
        if pair.experts is not None:
            energy_NE[pair.layer, pair.experts] += squares(pair)
    return energy_NE


def kept_experts(energy_NE: torch.Tensor, share: float) -> tuple[tuple[int, ...], ...]:
    """The smallest set of experts, over all layers, that holds ``share`` of the energy: at least one expert.

    Of equal ones the first are kept, so that the same LoRA gives the same file.
    """
    values, order = energy_NE.flatten().sort(descending=True, stable=True)
    reached = values.cumsum(0)
    count = int((reached < share * reached[-1]).sum()) + 1
    chosen = torch.zeros(energy_NE.numel(), dtype=torch.bool)
    chosen[order[:min(count, len(order))]] = True
    return tuple(tuple(row.nonzero().flatten().tolist()) for row in chosen.view(energy_NE.shape))
