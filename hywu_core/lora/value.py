"""The LoRA as a value: the weights that the generator wrote for one request, and where they come from.

Owns the names, the shapes, their validation and the digest. Does not apply anything (``attach.py``), combine anything
(``algebra.py``) or touch the disk (``files.py``). Serves the step between generating and injecting.

A LoRA of the published sizes holds 722,993,152 values (1.45 GB in bf16). ``write_lora`` and ``load_lora`` keep them on the CPU,
because ComfyUI's output cache will hold the object; training passes live tensors with gradients through the same class. What
``algebra.py`` makes of LoRAs holds no values of its own: ``Derived`` makes each matrix when it is asked for.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch

from ..config import LoRATarget
from ..errors import LoRAError

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SCALE_LIMIT = torch.finfo(torch.float32).max  # adapters multiply each rank in fp32
# "model.layers.0.mlp.experts.w1.lora_A": everything before the first number is the prefix, as the reference writes it.
_KEY = re.compile(r"(?P<prefix>[^0-9]*)(?P<layer>0|[1-9][0-9]{0,3})\.(?P<target>.+)\.lora_(?P<side>[AB])")


@dataclass(frozen=True)
class Provenance:
    """What a LoRA was written from: enough to refuse it on another backbone and to write it again."""

    backbone_fingerprint: str = ""
    generator_fingerprint: str = ""
    instruction: str = ""
    thinking: str = ""
    picture_digests: tuple[str, ...] = ()
    seed: int = 0
    made: str = ""  # what was done to it after it was written, or of which LoRAs it was made


class Derived(Mapping[str, torch.Tensor]):
    """Tensors that are made each time they are asked for, out of others: a blend of ten LoRAs takes no memory."""

    def __init__(self, keys: tuple[str, ...], make: Callable[[str], torch.Tensor]):
        self._keys, self._make = dict.fromkeys(keys), make

    def __getitem__(self, key: str) -> torch.Tensor:
        if key not in self._keys:
            raise KeyError(key)
        return self._make(key)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


@dataclass(frozen=True, eq=False)
class LoRA:
    """Matrices A and B for every target of every backbone layer; equal only to itself, never changed once made.

    ``tensors`` maps the reference's key strings to A (R, I) or (E, R, I) and B (O, R) or (E, O, R), in the reference's order:
    layer 0 all A, layer 0 all B, layer 1 and so on. Make one with ``LoRA.from_tensors``, which checks all of this, or of others
    with ``algebra.py``. The adapted output is W x + alpha / R · B diag(rank_weights) A x.
    """

    tensors: Mapping[str, torch.Tensor]
    dtype: torch.dtype
    rank: int
    alpha: float
    rank_weights: tuple[float, ...]  # one of every rank: 1 as generated, something else once scaled or blended
    targets: tuple[LoRATarget, ...]  # the same for every layer
    num_layers: int
    prefix: str  # "model.layers."
    provenance: Provenance

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, torch.Tensor],
        alpha: float,
        provenance: Provenance | None = None,
        *,
        rank_weights: tuple[float, ...] | None = None,
        target_order: tuple[str, ...] | None = None,
        check_finite: bool = False,
    ) -> "LoRA":
        """Check a set of LoRA tensors and make the value; the only place where a LoRA is validated (spec section 3).

        Args:
            tensors: key -> A (R, I) or (E, R, I), B (O, R) or (E, O, R), in any order. Kept as they are: no copy, no move.
            alpha: a positive number; alpha / R multiplies the update.
            rank_weights: what else multiplies each rank; default 1.
            target_order: names of the targets in the reference's order; default is their order in ``tensors``.
            check_finite: also read all values and refuse NaN and Inf (about a second for a LoRA of the published size).

        Raises:
            LoRAError: no tensors, a foreign name, an A without its B, ranks or experts that disagree, integer tensors, layers
                that differ or are missing, not one weight for every rank, and (with ``check_finite``) values that are not
                finite.
        """
        prefix, by_layer = _grouped(tensors)
        names = tuple(by_layer[0]) if target_order is None else tuple(target_order)
        targets, rank = _targets(by_layer[0], names, layer=0)
        for layer in range(1, len(by_layer)):
            found, layer_rank = _targets(by_layer[layer], names, layer)
            if found != targets or layer_rank != rank:
                wrong = next((pair for pair in zip(targets, found, strict=True) if pair[0] != pair[1]), (rank, layer_rank))
                raise LoRAError(f"layer {layer} of the LoRA is shaped otherwise than layer 0: {wrong[1]}, expected {wrong[0]}; "
                                "the LoRA is damaged, generate it again")
        if not 0 < float(alpha) <= SCALE_LIMIT:
            raise LoRAError(f"the LoRA's alpha is {alpha}, expected a positive number that fp32 holds; generate it again")
        weights = (1.0,) * rank if rank_weights is None else tuple(map(float, rank_weights))
        if len(weights) != rank or not fits(weights, float(alpha) / rank):
            raise LoRAError(f"the LoRA has {len(weights)} rank weights {str(weights)[:80]}, expected {rank} numbers that fp32 "
                            "holds; the LoRA is damaged, generate it again")
        ordered = {
            f"{prefix}{layer}.{name}.lora_{side}": pairs[name][side]
            for layer, pairs in enumerate(by_layer) for side in "AB" for name in names}
        dtype = _check_values(ordered, check_finite)
        return cls(MappingProxyType(ordered), dtype, rank, float(alpha), weights, targets, len(by_layer), prefix,
                   provenance or Provenance())

    @classmethod
    def from_reference_state(
        cls, state: Mapping[str, torch.Tensor], alpha: float | None = None, provenance: Provenance | None = None
    ) -> "LoRA":
        """Make a LoRA from the reference's state: every tensor with a leading batch axis of 1, and a 0-dim ``scale``.

        ``alpha`` stands in for a missing ``scale``; where both are there they must agree.

        Raises:
            LoRAError: neither is there or they contradict each other, a batch axis is not 1, or what ``from_tensors`` refuses.
        """
        for key, tensor in state.items():
            if key != "scale" and (tensor.ndim < 3 or tensor.shape[0] != 1):
                raise LoRAError(f"{key} has shape {tuple(tensor.shape)}, expected a leading batch axis of 1")
        if alpha is None and "scale" not in state:
            raise LoRAError("the reference state has no 'scale', expected one next to the matrices; give alpha")
        lora = cls.from_tensors(
            {key: tensor[0] for key, tensor in state.items() if key != "scale"}, 1.0 if alpha is None else alpha, provenance)
        if "scale" not in state:
            return lora
        scale = float(state["scale"])
        if alpha is not None and not math.isclose(scale, lora.scale, rel_tol=1e-2):  # a bf16 scale has three digits
            raise LoRAError(f"the reference state has scale {scale}, but alpha {alpha} and rank {lora.rank} make {lora.scale}")
        return lora if alpha is not None else cls.from_tensors(lora.tensors, scale * lora.rank, lora.provenance)

    @property
    def scale(self) -> float:
        """What multiplies the update of every rank, next to its own weight, at strength 1."""
        return self.alpha / self.rank

    @property
    def scale_R(self) -> torch.Tensor:
        """(R,) fp64: all that multiplies each rank at strength 1."""
        return torch.tensor(self.rank_weights, dtype=torch.float64) * self.scale

    @property
    def num_values(self) -> int:
        return self.num_layers * sum(
            math.prod(shape) for target in self.targets for shape in (target.a_shape(self.rank), target.b_shape(self.rank)))

    @property
    def nbytes(self) -> int:
        """Of all matrices; a derived LoRA has them only while each is asked for."""
        return self.num_values * self.dtype.itemsize

    def layer(self, index: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The (A, B) pairs of one backbone layer by target name ("mlp.experts.w1").

        Raises:
            LoRAError: the LoRA has no such layer.
        """
        if not 0 <= index < self.num_layers:
            raise LoRAError(f"layer {index} was asked for, but the LoRA has layers 0 to {self.num_layers - 1}")
        start = f"{self.prefix}{index}."
        return {
            target.name: (self.tensors[f"{start}{target.name}.lora_A"], self.tensors[f"{start}{target.name}.lora_B"])
            for target in self.targets}

    @cached_property
    def digest(self) -> str:
        """sha256 over scales, names, dtypes, shapes and values: the same numbers have the same digest, whoever wrote them."""
        return digest_of(self.alpha, self.rank_weights, self.tensors.items())

    def __reduce__(self) -> tuple[Any, ...]:
        # A read-only mapping cannot be pickled or deep-copied; the value itself can (a Ray worker receives it that way).
        return _rebuild, (dict(self.tensors), self.alpha, self.rank_weights, self.provenance)


def fits(rank_weights: Iterable[float], scale: float) -> bool:
    """Whether all that multiplies each rank is a number that an adapter can hold."""
    return all(abs(weight * scale) <= SCALE_LIMIT for weight in rank_weights)


def check_finite_values(key: str, tensor: torch.Tensor) -> None:
    """Raises LoRAError for NaN and Inf."""
    if not torch.isfinite(tensor).all():
        wrong = int((~torch.isfinite(tensor)).sum())
        raise LoRAError(f"{key} holds NaN or Inf in {wrong} of {tensor.numel()} values, expected none; "
                        "the LoRA is damaged, generate it again")


def digest_of(alpha: float, rank_weights: tuple[float, ...], named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """``LoRA.digest`` of matrices that come one by one, in the LoRA's order."""
    state = hashlib.sha256(f"alpha={alpha!r}\n".encode())
    if set(rank_weights) != {1.0}:
        state.update(f"rank_weights={rank_weights!r}\n".encode())
    for key, tensor in named:
        state.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        state.update(raw_bytes(tensor))
    return state.hexdigest()


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, without a copy where it lies so on the CPU already."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _rebuild(
    tensors: dict[str, torch.Tensor], alpha: float, rank_weights: tuple[float, ...], provenance: Provenance
) -> LoRA:
    return LoRA.from_tensors(tensors, alpha, provenance, rank_weights=rank_weights)


def _grouped(tensors: Mapping[str, torch.Tensor]) -> tuple[str, list[dict[str, dict[str, torch.Tensor]]]]:
    """Sort the tensors into layer -> target -> side; returns the common prefix and the layers 0..N-1."""
    if not tensors:
        raise LoRAError("the LoRA holds no tensors, expected two for every target of every layer; generate it again")
    layers: dict[int, dict[str, dict[str, torch.Tensor]]] = {}
    prefixes: dict[str, str] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise LoRAError(f"'{key}' is no HY-WU LoRA tensor: expected names such as "
                            "'model.layers.0.self_attn.qkv_proj.lora_A'; this LoRA was made for another kind of model")
        prefixes.setdefault(match["prefix"], key)
        sides = layers.setdefault(int(match["layer"]), {}).setdefault(match["target"], {})
        if match["side"] in sides:
            raise LoRAError(f"'{key}' names a matrix that the LoRA already has; the LoRA is damaged, generate it again")
        sides[match["side"]] = tensor
    if len(prefixes) > 1:
        raise LoRAError(f"the LoRA mixes tensors of different models: {' and '.join(list(prefixes.values())[:2])}")
    missing = sorted(set(range(len(layers))) - set(layers))
    if missing:
        raise LoRAError(f"the LoRA has {len(layers)} layers up to number {max(layers)}, but layer {missing[0]} is missing; "
                        "the LoRA is damaged, generate it again")
    return next(iter(prefixes)), [layers[index] for index in range(len(layers))]


def _targets(
    pairs: dict[str, dict[str, torch.Tensor]], names: tuple[str, ...], layer: int
) -> tuple[tuple[LoRATarget, ...], int]:
    """Derive the targets and the rank of one layer from the shapes of its pairs."""
    if set(names) != set(pairs) or len(set(names)) != len(names):
        raise LoRAError(f"layer {layer} of the LoRA has the targets {sorted(pairs)}, expected {sorted(names)}; "
                        "the LoRA is damaged, generate it again")
    targets, ranks = [], {}
    for name in names:
        sides = pairs[name]
        if set(sides) != {"A", "B"}:
            raise LoRAError(f"layer {layer}, {name}: only lora_{next(iter(sides))} is there, expected both lora_A and lora_B")
        a, b = sides["A"], sides["B"]
        experts_agree = a.ndim == 2 or (a.ndim == 3 and b.ndim == 3 and a.shape[0] == b.shape[0])
        if a.ndim != b.ndim or not experts_agree or a.shape[-2] != b.shape[-1] or 0 in a.shape or 0 in b.shape:
            raise LoRAError(f"layer {layer}, {name}: lora_A {tuple(a.shape)} does not fit lora_B {tuple(b.shape)}, expected "
                            "(R, I) with (O, R) or (E, R, I) with (E, O, R); the LoRA is damaged, generate it again")
        targets.append(LoRATarget(name, a.shape[-1], b.shape[-2], a.shape[0] if a.ndim == 3 else 0))
        ranks.setdefault(a.shape[-2], name)
    if len(ranks) > 1:
        (rank, name), (other, other_name) = list(ranks.items())[:2]
        raise LoRAError(f"layer {layer}: {name} has rank {rank} but {other_name} has rank {other}, expected one rank for all")
    return tuple(targets), next(iter(ranks))


def _check_values(tensors: dict[str, torch.Tensor], check_finite: bool) -> torch.dtype:
    """Raises LoRAError unless all are of one floating-point dtype, which is returned, and finite if that is asked for."""
    dtype = next(iter(tensors.values())).dtype
    for key, tensor in tensors.items():
        if tensor.dtype != dtype or dtype not in DTYPES:
            raise LoRAError(f"{key} is {tensor.dtype} and the first matrix is {dtype}, expected one of "
                            f"{', '.join(map(str, DTYPES))} for all; generate the LoRA again")
        if check_finite:
            check_finite_values(key, tensor)
    return dtype
