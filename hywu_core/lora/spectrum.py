"""The singular values of a LoRA's updates, and what follows from them: norms, ranks, cosines, principal angles, compression.

The update s·B·A of a matrix is never formed. With A Aᵀ = U Λ Uᵀ and Bᵀ B likewise its singular values are those of an R x R
matrix (fp64: what lies below about 1e-7 of the largest is lost, which no stored LoRA has use for). Everything is streamed
target by target, and what holds NaN or Inf is refused: the rest would have numbers that look sound.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..config import LoRATarget
from ..progress import Tick, silent
from .algebra import check_alike
from .value import LoRA, check_finite_values

ROUNDING = 1e-15  # of the largest and for each rank: squares below it are what fp64 leaves of zero
CHUNK = 1 << 21  # values in fp64 at once, 16 MB: larger pieces leave the caches, and their memory comes page by page


@dataclass(frozen=True)
class Pair:
    """One update, or some experts' updates of one target: a (..., R, I), b (..., O, R) in fp64, scale (R,)."""

    layer: int
    target: LoRATarget
    experts: slice | None
    a: torch.Tensor
    b: torch.Tensor
    scale: torch.Tensor


def pairs(lora: LoRA, on_tick: Tick = silent, cut_for: int = 0) -> Iterator[Pair]:
    """All updates, layer by layer and target by name, in pieces of at most CHUNK values; ticks per target of each layer.

    cut_for: a rank above the LoRA's own, so that LoRAs of different ranks come in the same pieces.

    Raises:
        LoRAError: a matrix holds NaN or Inf.
    """
    scale, done = lora.scale_R, 0
    for layer in range(lora.num_layers):
        for target in sorted(lora.targets, key=lambda target: target.name):
            path = f"{lora.prefix}{layer}.{target.name}"
            a, b = lora.tensors[f"{path}.lora_A"], lora.tensors[f"{path}.lora_B"]
            for pair in pieces(layer, target, a, b, scale, max(lora.rank, cut_for)):
                for name, side in (("A", pair.a), ("B", pair.b)):
                    if not torch.isfinite(side.sum()):  # 20 times as fast as looking at each
                        check_finite_values(f"{path}.lora_{name}", side)
                yield pair
            done += 1
            on_tick(done, lora.num_layers * len(lora.targets), None)


def pieces(
    layer: int, target: LoRATarget, a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor, rank: int,
) -> Iterator[Pair]:
    """The update of one target in pieces of at most CHUNK values, experts counted at ``rank``."""
    if not target.experts:
        yield Pair(layer, target, None, a.double(), b.double(), scale)
        return
    at_once = max(1, CHUNK // (rank * (target.in_features + target.out_features)))
    for start in range(0, target.experts, at_once):
        part = slice(start, min(start + at_once, target.experts))
        yield Pair(layer, target, part, a[part].double(), b[part].double(), scale)


def _roots(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of G = U Λ Uᵀ: (U Λ^½, U Λ^-½), directions without weight left out as zeros."""
    values, vectors = torch.linalg.eigh(gram)
    floor = values[..., -1:].clamp_min(0) * ROUNDING * gram.shape[-1]
    real = values > floor
    root = torch.where(real, values, 1).sqrt()
    return torch.where(real[..., None, :], vectors * root[..., None, :], 0), torch.where(
        real[..., None, :], vectors / root[..., None, :], 0)


def core(pair: Pair) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(C, left, right): the update is (b left) C (right a), with orthonormal (b left) and (right a)."""
    root_a, back_a = _roots(pair.a @ pair.a.mT)
    root_b, back_b = _roots(pair.b.mT @ pair.b)
    return root_b.mT @ (pair.scale[:, None] * root_a), back_b, back_a.mT


def singular_values(pair: Pair) -> torch.Tensor:
    """(..., R) of the updates, the largest first."""
    return torch.linalg.svdvals(core(pair)[0])


@dataclass(frozen=True)
class Spectra:
    """Singular values of all updates: (layer, target name) -> (R,) or (E, R) fp64."""

    values: dict[tuple[int, str], torch.Tensor]
    num_layers: int
    targets: tuple[LoRATarget, ...]

    def norms(self) -> torch.Tensor:
        """(N, targets): Frobenius norm of every update, experts of a target together."""
        return torch.stack([torch.stack([self.values[layer, target.name].norm() for target in self.targets])
                            for layer in range(self.num_layers)])

    def effective_ranks(self) -> torch.Tensor:
        """(N, targets): mean effective rank of the updates (Roy & Vetterli 2007: exp of the entropy of σ / Σσ); 0 for none."""
        return torch.stack([torch.stack([effective_rank(self.values[layer, target.name]) for target in self.targets])
                            for layer in range(self.num_layers)])

    def expert_energy(self) -> torch.Tensor:
        """(N, E): squared norm of the update of each routed expert, its projections together; (N, 0) without experts."""
        grouped = [target for target in self.targets if target.experts]
        if not grouped:
            return torch.zeros(self.num_layers, 0, dtype=torch.float64)
        return torch.stack([sum(self.values[layer, target.name].square().sum(-1) for target in grouped)
                            for layer in range(self.num_layers)])

    @property
    def norm(self) -> float:
        """Frobenius norm of the whole update."""
        return float(self.norms().norm())


def effective_rank(values: torch.Tensor) -> torch.Tensor:
    """() mean over the updates (..., R) of exp(entropy of σ / Σσ); updates of zero norm count as 0."""
    total = values.sum(-1, keepdim=True)
    share = values / total.clamp_min(torch.finfo(values.dtype).tiny)
    ranks = torch.where(total[..., 0] > 0, torch.special.entr(share).sum(-1).exp(), 0)
    return ranks.mean()


def spectra(lora: LoRA, on_tick: Tick = silent) -> Spectra:
    """All singular values of a LoRA's updates. Ticks per target of each layer."""
    values: dict[tuple[int, str], list[torch.Tensor]] = {}
    for pair in pairs(lora, on_tick):
        values.setdefault((pair.layer, pair.target.name), []).append(singular_values(pair))
    return Spectra({key: torch.cat(found) if len(found) > 1 else found[0] for key, found in values.items()},
                   lora.num_layers, lora.targets)


@dataclass(frozen=True)
class Comparison:
    """Two LoRAs side by side. cosine: of the whole updates; cosines (N, targets), experts of a target together.

    angles_in, angles_out (N, targets): mean principal angle in degrees between what the updates read (rows of A) and between
    what they write (columns of B): 0 for the same subspace, 90 for orthogonal ones; over those experts whose update is zero in
    neither LoRA, without ranks of weight 0. All of these are NaN where one of the two updates is zero.
    norms: of the two whole updates.
    """

    cosine: float
    cosines: torch.Tensor
    angles_in: torch.Tensor
    angles_out: torch.Tensor
    norms: tuple[float, float]


def compare(one: LoRA, two: LoRA, on_tick: Tick = silent) -> Comparison:
    """Cosines and principal angles (Björck & Golub 1973) of two LoRAs' updates. Ticks per target of each layer.

    Raises:
        LoRAError: they are of different backbones, have different targets, or hold NaN or Inf.
    """
    check_alike(one, two)
    shape = (one.num_layers, len(one.targets))
    index = {target.name: column for column, target in enumerate(one.targets)}
    dots, first, second = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    angles = [torch.zeros(shape, dtype=torch.float64) for _ in range(2)]
    counts = torch.zeros(shape, dtype=torch.float64)
    used_1, used_2 = ((lora.scale_R != 0).double() for lora in (one, two))
    for left, right in zip(pairs(one, cut_for=two.rank), pairs(two, on_tick, cut_for=one.rank), strict=True):
        place = left.layer, index[left.target.name]
        reads, writes = ((x @ x.mT, y @ y.mT, x @ y.mT) for x, y in ((left.a, right.a), (left.b.mT, right.b.mT)))
        square_1, square_2 = _squares(writes[0], reads[0], left.scale), _squares(writes[1], reads[1], right.scale)
        first[place] += square_1.sum()
        second[place] += square_2.sum()
        dots[place] += _terms(writes[2], reads[2], left.scale, right.scale).sum()
        there = (square_1 > 0) & (square_2 > 0)
        for total, (gram_1, gram_2, across) in zip(angles, (reads, writes), strict=True):
            gram_1, gram_2 = gram_1 * used_1[:, None] * used_1, gram_2 * used_2[:, None] * used_2
            total[place] += torch.where(there, _angle(gram_1, gram_2, across), 0).sum()
        counts[place] += there.sum()
    return Comparison(
        float(_cosine(dots.sum(), first.sum(), second.sum())), _cosine(dots, first, second), angles[0] / counts,
        angles[1] / counts, (float(first.sum().sqrt()), float(second.sum().sqrt())))


def _cosine(dots: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """NaN where there is nothing to compare."""
    there = (first > 0) & (second > 0)
    return torch.where(there, dots / (first.sqrt() * second.sqrt()), torch.nan).clamp(-1, 1)


def inner(left: Pair, right: Pair) -> torch.Tensor:
    """() sum over the updates of <s·B·A, s·B·A>; of a pair with itself never below 0."""
    if left is right:
        return squares(left).sum()
    return _terms(left.b.mT @ right.b, left.a @ right.a.mT, left.scale, right.scale).sum()


def squares(pair: Pair) -> torch.Tensor:
    """(...) squared norms of the updates, never below 0."""
    return _squares(pair.b.mT @ pair.b, pair.a @ pair.a.mT, pair.scale)


class Loss:
    """How much of a LoRA's whole update is lost, added up piece by piece."""

    def __init__(self):
        self._lost = self._whole = 0.0

    def add(self, true: Pair, kept: Pair) -> None:
        square = float(inner(true, true))
        self._whole += square
        self._lost += square - 2 * float(inner(true, kept)) + float(inner(kept, kept))

    @property
    def error(self) -> float:
        """Frobenius norm of what is lost, of the whole update's; 0 for an update that is zero."""
        return math.sqrt(max(self._lost, 0.0) / self._whole) if self._whole else 0.0


def _terms(across_b: torch.Tensor, across_a: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(..., R, R) whose sum is <s·B·A, s·B·A> = trace (B₁ᵀB₂)(A₂A₁ᵀ), from B₁ᵀB₂ and A₁A₂ᵀ."""
    return left[:, None] * across_b * right * across_a


def _squares(gram_b: torch.Tensor, gram_a: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(...) squared norms; 0 where ranks cancel each other and only their rounding is left, which may be negative."""
    found = _terms(gram_b, gram_a, scale, scale).sum((-1, -2))
    ranks = scale.abs() * (gram_b.diagonal(dim1=-2, dim2=-1) * gram_a.diagonal(dim1=-2, dim2=-1)).sqrt()
    return torch.where(found > ROUNDING * len(scale) * ranks.sum(-1).square(), found, 0)


def _angle(gram_1: torch.Tensor, gram_2: torch.Tensor, across: torch.Tensor) -> torch.Tensor:
    """(...) mean principal angle in degrees between two subspaces whose bases have these Gram matrices; NaN if one is empty."""
    (_, back_1), (_, back_2) = _roots(gram_1), _roots(gram_2)
    cosines = torch.linalg.svdvals(back_1.mT @ across @ back_2)
    # A direction without weight is a column of zeros, and an angle of its own neither subspace has.
    dims = torch.minimum(*((back != 0).any(-2).sum(-1) for back in (back_1, back_2)))
    angles = torch.rad2deg(torch.acos(cosines.clamp(max=1)))
    counted = torch.arange(cosines.shape[-1]) < dims[..., None]
    return torch.where(counted, angles, 0).sum(-1) / dims
