"""The LoRA between two checkpoints: of every adapted projection the best approximation of the difference (Eckart & Young 1936).

Owns the difference and its decomposition, a tensor at a time. Small matrices are decomposed exactly; of large ones the leading
singular vectors are found by subspace iteration on a random start (Halko, Martinsson & Tropp 2011), as a full decomposition of
the published model's 4,224 matrices would take days. The error is measured with what is kept, so it tells what that costs.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoint import Shards, backbone_fingerprint, open_shards
from ..checkpoint.load import read_tensors, refuse_foreign_formats, usable_device
from ..config import BackboneConfig, LoRATarget, torch_dtype
from ..errors import LoRAError, RequestError
from ..progress import Tick, silent
from .algebra import RANK_LIMIT
from .peft import DOWN, GATE, GATE_UP, LAST, UP
from .targets import GROUP, PREFIX, Adapted, adapted
from .value import LoRA, Provenance

OVERSAMPLED, ITERATIONS = 16, 4
EXACT_BELOW = 512  # the smaller side of a matrix
LISTED = 5


@dataclass(frozen=True)
class Extracted:
    """error: ‖D - ΔW‖ / ‖D‖ of all adapted projections together, as stored. others: tensors that differ, too, and that no LoRA
    of HY-WU adapts (norms, routers, embeddings): the LoRA does not hold these differences."""

    lora: LoRA
    error: float
    others: tuple[str, ...]


def extract_lora(
    base: Path, tuned: Path, rank: int = 16, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu",
    on_tick: Tick = silent,
) -> Extracted:
    """A LoRA of ``rank`` that makes ``tuned`` of ``base``, as well as that rank can. Ticks per tensor of the checkpoints.

    dtype: of the LoRA; default is config.json's. device: where is computed.

    Raises:
        RequestError: the rank is not within 1 .. RANK_LIMIT, or there is no such device.
        LoRAError: the folders hold different architectures, or do not differ in any adapted projection.
        CheckpointError: a folder is damaged, or its weights are packed.
    """
    if not 1 <= rank <= RANK_LIMIT:
        raise RequestError(f"a LoRA of rank {rank} was asked for, expected 1 to {RANK_LIMIT}")
    device = usable_device(device)
    configs = [BackboneConfig.from_folder(folder) for folder in (base, tuned)]
    sizes, other_sizes = (adapted(config) for config in configs)
    if sizes != other_sizes:
        raise LoRAError(f"{base} has {_told(sizes)}, {tuned} has {_told(other_sizes)}, expected the same: take two checkpoints "
                        "of one architecture")
    before, after = open_shards(base), open_shards(tuned)
    for shards in (before, after):
        refuse_foreign_formats(shards)
    names = _names(sizes)
    _check_there(names, before, after)
    shared = sorted(set(before.entries) & set(after.entries) - set(names))
    dtype = dtype or torch_dtype(configs[0].torch_dtype)
    work = _Work(rank, dtype)
    for done, (name, weight) in enumerate(names.items(), start=1):
        old, new = (_read(name, shards, torch.float32).to(device) for shards in (before, after))
        work.add(new - old, weight)
        on_tick(done, len(names) + len(shared), None)
    others = []
    for done, name in enumerate(shared, start=len(names) + 1):
        entries = [shards.entries[name] for shards in (before, after)]
        wide = torch.promote_types(*(entry.dtype for entry in entries))
        if entries[0].shape != entries[1].shape or not torch.equal(*(_read(name, shards, wide) for shards in (before, after))):
            others.append(name)
        on_tick(done, len(names) + len(shared), None)
    if not work.whole:
        raise LoRAError(f"{base} and {tuned} differ in 0 of {len(names)} adapted projections (and in {len(others)} other "
                        "tensors): there is nothing to make a LoRA of")
    error = math.sqrt(max(work.lost, 0.0) / work.whole)
    made = f"difference of the checkpoints {_called(tuned)} and {_called(base)}, rank {rank}, error {error:.2%}"
    lora = LoRA.from_tensors(
        work.tensors, float(rank), Provenance(backbone_fingerprint=backbone_fingerprint(before), made=made),
        target_order=tuple(target.name for target in sizes.targets), check_finite=True)
    return Extracted(lora, error, tuple(others))


@dataclass(frozen=True)
class _Weight:
    """An adapted weight of the checkpoint: the LoRA's targets that its rows belong to, in order, and whose expert's it is."""

    layer: str  # "model.layers.0."
    targets: tuple[LoRATarget, ...]
    expert: int | None

    @property
    def shape(self) -> tuple[int, int]:
        return sum(target.out_features for target in self.targets), self.targets[0].in_features


def _names(sizes: Adapted) -> dict[str, _Weight]:
    """Published name of every adapted weight -> what it is."""
    targets = {target.name: target for target in sizes.targets}
    # Of gate and up the first half is up (spec section 2).
    of_expert = {GATE_UP: (targets[UP], targets[GATE]), DOWN: (targets[LAST],)}
    found: dict[str, _Weight] = {}
    for layer in (f"{PREFIX}{index}." for index in range(sizes.num_layers)):
        for target in sizes.targets:
            if not target.experts:
                found[f"{layer}{target.name}.weight"] = _Weight(layer, (target,), None)
        for expert in range(targets[UP].experts):
            for module, own in of_expert.items():
                found[f"{layer}{GROUP}.{expert}.{module}.weight"] = _Weight(layer, own, expert)
    return found


def _check_there(names: dict[str, _Weight], before: Shards, after: Shards) -> None:
    """Raises LoRAError unless both have all adapted weights in the shapes that config.json gives them."""
    for shards in (before, after):
        if missing := [name for name in names if name not in shards.entries]:
            raise LoRAError(f"{shards.folder} has {len(names) - len(missing)} of {len(names)} adapted projections, missing are "
                            f"{', '.join(missing[:LISTED])}: take a whole published folder")
        for name, weight in names.items():
            if (shape := shards.entries[name].shape) != weight.shape:
                raise LoRAError(f"{shards.folder}: '{name}' has the shape {list(shape)}, expected {list(weight.shape)} as "
                                "config.json says: take a whole published folder")


def _read(name: str, shards: Shards, dtype: torch.dtype) -> torch.Tensor:
    place = torch.empty(shards.entries[name].shape, dtype=dtype)
    read_tensors({name: place}, shards)
    return place


class _Work:
    """The matrices found so far, and what they lose."""

    def __init__(self, rank: int, dtype: torch.dtype):
        self.tensors: dict[str, torch.Tensor] = {}
        self.lost = self.whole = 0.0
        self._rank, self._dtype = rank, dtype

    def add(self, difference_OI: torch.Tensor, weight: _Weight) -> None:
        for target, part_OI in zip(weight.targets, difference_OI.chunk(len(weight.targets)), strict=True):
            a_RI, b_OR = (side.to("cpu", self._dtype) for side in truncated(part_OI, self._rank))
            square = float(part_OI.double().square().sum())
            self.whole += square
            if square:
                self.lost += float((part_OI - b_OR.to(part_OI) @ a_RI.to(part_OI)).double().square().sum())
            for side, shape, found in (("A", target.a_shape(self._rank), a_RI), ("B", target.b_shape(self._rank), b_OR)):
                key = f"{weight.layer}{target.name}.lora_{side}"
                if weight.expert is None:
                    self.tensors[key] = found
                else:
                    if key not in self.tensors:
                        self.tensors[key] = torch.zeros(shape, dtype=self._dtype)
                    self.tensors[key][weight.expert] = found


def truncated(matrix_OI: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, I) and B (O, rank) with B·A the best approximation of a matrix; directions that it has not are zero."""
    outputs, inputs = matrix_OI.shape
    if min(outputs, inputs) <= max(EXACT_BELOW, 2 * (rank + OVERSAMPLED)):
        left, values, right = torch.linalg.svd(matrix_OI, full_matrices=False)
    else:
        # A seed of its own: the same pair of checkpoints gives the same LoRA.
        start = torch.randn(inputs, rank + OVERSAMPLED, generator=torch.Generator().manual_seed(0)).to(matrix_OI)
        basis = torch.linalg.qr(matrix_OI @ start).Q
        for _ in range(ITERATIONS):
            basis = torch.linalg.qr(matrix_OI @ torch.linalg.qr(matrix_OI.mT @ basis).Q).Q
        inside, values, right = torch.linalg.svd(basis.mT @ matrix_OI, full_matrices=False)
        left = basis @ inside
    count = min(rank, len(values))
    root = values[:count].clamp_min(0).sqrt()
    a_RI, b_OR = matrix_OI.new_zeros(rank, inputs), matrix_OI.new_zeros(outputs, rank)
    a_RI[:count], b_OR[:, :count] = root[:, None] * right[:count], left[:, :count] * root
    return a_RI, b_OR


def _told(sizes: Adapted) -> str:
    first, last = sizes.targets[0], sizes.targets[-1]
    return (f"{sizes.num_layers} layers of width {first.in_features} with {last.experts} experts of width {last.out_features} "
            f"({first.name} to {first.out_features})")


def _called(folder: Path) -> str:
    return Path(folder).resolve().name[:200]
