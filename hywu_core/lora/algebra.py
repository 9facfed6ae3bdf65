"""Arithmetic on LoRAs: scale, blend, mean, mask. Exact, and without memory of its own.

Every result is a LoRA whose matrices are made when they are asked for (``value.Derived``), so that combining full-size LoRAs
takes no copy; the factors go into ``rank_weights``, which no rounding touches. A blend acts exactly as its LoRAs injected in a
row. To make a blend small again see ``compress.py``.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch

from ..config import LoRATarget
from ..errors import LoRAError, RequestError
from .value import SCALE_LIMIT, Derived, LoRA, Provenance, fits

RANK_LIMIT = 256  # of an exact blend; sixteen LoRAs of the published rank
NOTE_LENGTH = 2000  # characters of provenance that say how a LoRA was made
GROUPS = ("attention", "shared", "experts")


def scaled(lora: LoRA, factor: float) -> LoRA:
    """The LoRA times ``factor``, which may be negative or 0.

    Raises:
        RequestError: the factor is not finite, or too large after those before it.
    """
    if not math.isfinite(factor):
        raise RequestError(f"the factor is {factor}, expected a finite number")
    if factor == 1:
        return lora
    weights = tuple(weight * factor for weight in lora.rank_weights)
    _check_fit(weights, lora.scale)
    return replace(lora, rank_weights=weights, provenance=noted(lora.provenance, f"{factor:g} × {_named(lora)}"))


def blend(loras: Sequence[LoRA], weights: Sequence[float]) -> LoRA:
    """The weighted sum of the updates, exact: ranks side by side, as if the LoRAs were injected in a row.

    Raises:
        RequestError: no LoRA, not one finite weight for each, weights too large, or ranks that add up to more than RANK_LIMIT.
        LoRAError: the LoRAs are of different backbones or have different targets.
    """
    total = sum(lora.rank for lora in loras)
    if len(loras) > 1 and total > RANK_LIMIT:
        raise RequestError(f"the ranks of {len(loras)} LoRAs add up to {total}, an exact blend holds at most {RANK_LIMIT}: "
                           "choose a rank to compress the blend to, or blend fewer")
    return joined(loras, weights)


def joined(loras: Sequence[LoRA], weights: Sequence[float]) -> LoRA:
    """As ``blend`` at any rank, for what is compressed at once."""
    if not loras or len(weights) != len(loras) or not all(map(math.isfinite, weights)):
        raise RequestError(f"{len(loras)} LoRAs and the weights {list(weights)[:8]} cannot be blended: give at least one LoRA "
                           "and a finite weight for each")
    first = _alike(loras)
    if len(loras) == 1:
        return scaled(first, weights[0])
    rank, dtype = sum(lora.rank for lora in loras), _widest(loras)

    def make(key: str) -> torch.Tensor:
        axis = -2 if key.endswith("A") else -1
        return torch.cat([lora.tensors[key].to(dtype) for lora in loras], dim=axis)

    ranks = tuple(inner * lora.scale * weight
                  for lora, weight in zip(loras, weights, strict=True) for inner in lora.rank_weights)
    _check_fit(ranks, 1.0)
    note = " + ".join(f"{weight:g} × {_named(lora)}" for lora, weight in zip(loras, weights, strict=True))
    return replace(first, tensors=Derived(tuple(first.tensors), make), dtype=dtype, rank=rank, alpha=float(rank),
                   rank_weights=ranks, provenance=noted(_shared(loras), note))


def mean(loras: Sequence[LoRA], of: str = "matrices") -> LoRA:
    """One LoRA for many requests.

    of: "matrices" averages A with A and B with B, the paper's uniform LoRA, which is no mean of the updates (the product of
    means is not the mean of products); "updates" is their exact mean, a blend.

    Raises: RequestError, LoRAError: as ``blend``; LoRAs of different ranks or scales have no mean of matrices.
    """
    if of == "updates":
        return blend(loras, [1 / max(1, len(loras))] * len(loras))
    if of != "matrices":
        raise RequestError(f"the mean of {of!r} was asked for, expected 'matrices' or 'updates'")
    if not loras:
        raise RequestError("0 LoRAs have no mean: give at least one")
    first = _alike(loras)
    if len(loras) == 1:
        return first
    for lora in loras:
        if (lora.rank, lora.alpha, lora.rank_weights) != (first.rank, first.alpha, first.rank_weights):
            raise LoRAError(f"matrices of rank {first.rank} and scale {first.scale:g} were to be averaged with matrices "
                            f"of rank {lora.rank} and scale {lora.scale:g} or other weights of ranks: "
                            "take the mean of the updates")

    dtype = torch.promote_types(_widest(loras), torch.float32)

    def make(key: str) -> torch.Tensor:
        total = first.tensors[key].to(dtype)
        for lora in loras[1:]:
            total = total + lora.tensors[key]
        return total / len(loras)

    note = f"mean of the matrices of {len(loras)} LoRAs: " + ", ".join(_named(lora) for lora in loras)
    return replace(first, tensors=Derived(tuple(first.tensors), make), dtype=dtype,
                   provenance=noted(_shared(loras), note))


@dataclass(frozen=True)
class Selection:
    """A part of a LoRA: some layers, some groups of projections, some experts; None for all. ``inverted``: everything else."""

    layers: Collection[int] | None = None
    groups: Collection[str] | None = None
    experts: Collection[int] | None = None
    inverted: bool = False

    def kept(self, layer: int, target: LoRATarget) -> torch.Tensor:
        """(E,) or () bool: which experts of a target, or whether the target, is in the selection."""
        inside = (self.layers is None or layer in self.layers) and (self.groups is None or group(target) in self.groups)
        if not target.experts:
            kept = torch.tensor(inside)
        else:
            wanted = torch.ones(target.experts, dtype=torch.bool)
            if self.experts is not None:
                wanted = torch.tensor([expert in self.experts for expert in range(target.experts)])
            kept = wanted & inside
        return ~kept if self.inverted else kept


def group(target: LoRATarget) -> str:
    """Which of GROUPS a target belongs to."""
    if target.experts:
        return "experts"
    return "attention" if target.name.startswith("self_attn.") else "shared"


def masked(lora: LoRA, selection: Selection, note: str = "a part") -> LoRA:
    """The LoRA with zeros outside the selection; it still has all targets, and parts that complement each other add up to it.

    Raises:
        RequestError: a layer, group or expert that the LoRA has not, or nothing is selected.
    """
    _check_selection(lora, selection)
    kept, whole = {}, True
    for layer in range(lora.num_layers):
        for target in lora.targets:
            kept[f"{lora.prefix}{layer}.{target.name}.lora_B"] = mask = selection.kept(layer, target)
            whole = whole and bool(mask.all())
    if not any(bool(mask.any()) for mask in kept.values()):
        raise RequestError(f"the mask keeps 0 of {len(kept)} projections of the LoRA: widen it")
    if whole:
        return lora

    def make(key: str) -> torch.Tensor:
        mask = kept.get(key)  # none for A: a zero B is enough
        if mask is None or mask.all():
            return lora.tensors[key]
        source = lora.tensors[key]
        if not mask.any():
            return source.new_zeros(()).expand(source.shape)
        return source.masked_fill(~mask[:, None, None].to(source.device), 0)  # not times the mask: NaN times 0 is NaN

    return replace(lora, tensors=Derived(tuple(lora.tensors), make),
                   provenance=noted(lora.provenance, f"{note} of {_named(lora)}"))


def numbers(text: str, count: int, what: str) -> tuple[int, ...] | None:
    """"0-3, 7" -> (0, 1, 2, 3, 7); None for an empty text, which means all of ``count``.

    Raises:
        RequestError: something else stands there, or a number is not below ``count``.
    """
    found: set[int] = set()
    for part in filter(None, (part.strip() for part in text.replace("–", "-").split(","))):
        ends = [end.strip() for end in part.split("-")]
        if len(ends) > 2 or not all(end.isascii() and end.isdecimal() and len(end) < 6 for end in ends):
            raise RequestError(f"{what} {part[:40]!r} is neither a number nor a range: write numbers such as 0-3, 7")
        first, last = int(ends[0]), int(ends[-1])
        if first > last:
            raise RequestError(f"{what} {part[:40]!r} is a range from {first} down to {last}: write the smaller number first")
        if last >= count:
            raise RequestError(f"{what} {part[:40]!r} is outside 0-{count - 1}: the LoRA has {count} of them" if count else
                               f"{what} {part[:40]!r} were chosen, the LoRA has 0 of them: leave this empty")
        found.update(range(first, last + 1))
    return tuple(sorted(found)) or None


def _check_selection(lora: LoRA, selection: Selection) -> None:
    experts = max(target.experts for target in lora.targets)
    for what, chosen, known in (("layers", selection.layers, range(lora.num_layers)), ("groups", selection.groups, GROUPS),
                                ("experts", selection.experts, range(experts))):
        if wrong := [each for each in chosen or () if each not in known]:
            raise RequestError(f"the mask names the {what} {wrong[:4]}, the LoRA has {known[0]} to {known[-1]}" if known else
                               f"the mask names the experts {wrong[:4]}, the LoRA has 0 experts")


def _alike(loras: Sequence[LoRA]) -> LoRA:
    """The first, if all are of one backbone and have the same targets in as many layers. Raises LoRAError."""
    check_alike(*loras)
    return loras[0]


def check_alike(*loras: LoRA) -> None:
    """Raises LoRAError unless all were written for one backbone and have the same targets in as many layers."""
    first = loras[0]
    known = {lora.provenance.backbone_fingerprint for lora in loras} - {""}
    if len(known) > 1:
        raise LoRAError(f"these LoRAs were written for {len(known)} backbones ({', '.join(sorted(known)[:3])}), expected one: "
                        "use LoRAs of one backbone together")
    for lora in loras[1:]:
        if (lora.num_layers, lora.prefix) != (first.num_layers, first.prefix):
            raise LoRAError(f"one LoRA has {first.num_layers} layers ({first.prefix}), another {lora.num_layers} "
                            f"({lora.prefix}): use LoRAs of one backbone together")
        if different := set(first.targets) ^ set(lora.targets):
            raise LoRAError(f"the targets of two LoRAs differ in {len(different)} projections, such as "
                            f"{min(different, key=lambda target: target.name)}: use LoRAs of one backbone together")


def _widest(loras: Sequence[LoRA]) -> torch.dtype:
    dtype = loras[0].dtype
    for lora in loras[1:]:
        dtype = torch.promote_types(dtype, lora.dtype)
    return dtype


def _shared(loras: Sequence[LoRA]) -> Provenance:
    """What the origins have in common; source pictures of all."""
    origins = [lora.provenance for lora in loras]
    pictures = tuple(dict.fromkeys(digest for origin in origins for digest in origin.picture_digests))
    generators = {origin.generator_fingerprint for origin in origins}
    return Provenance(next((origin.backbone_fingerprint for origin in origins if origin.backbone_fingerprint), ""),
                      generators.pop() if len(generators) == 1 else "", picture_digests=pictures)


def _check_fit(rank_weights: Sequence[float], scale: float) -> None:
    if not fits(rank_weights, scale):
        largest = max(abs(weight * scale) for weight in rank_weights)
        raise RequestError(f"all factors together would multiply a rank of the LoRA by {largest:.3g}, at most "
                           f"{SCALE_LIMIT:.3g} can be: choose smaller factors")


def noted(origin: Provenance, note: str) -> Provenance:
    return replace(origin, made=note if len(note) <= NOTE_LENGTH else note[:NOTE_LENGTH - 1] + "…")


def _named(lora: LoRA) -> str:
    """What a person would call it: how it was made, or its instruction."""
    origin = lora.provenance
    return f"({origin.made})" if origin.made else f"“{origin.instruction[:NOTE_LENGTH]}”" if origin.instruction else "a LoRA"
