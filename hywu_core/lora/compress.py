"""A LoRA of any rank as one of a smaller rank: the best approximation of every update (truncated SVD), with its error."""

from dataclasses import dataclass, replace

import torch

from ..errors import LoRAError, RequestError
from ..progress import Tick, silent
from .algebra import noted
from .spectrum import Loss, Pair, core, pairs
from .value import LoRA


@dataclass(frozen=True)
class Compressed:
    """error: Frobenius norm of what is lost, of the whole update's, as stored (so rounding is in it)."""

    lora: LoRA
    error: float


def compressed(lora: LoRA, rank: int, dtype: torch.dtype | None = None, on_tick: Tick = silent) -> Compressed:
    """The LoRA at ``rank``, in memory of its own; unchanged where it has no more than that. Ticks per target of each layer.

    dtype: of the result; default is the LoRA's.

    Raises:
        RequestError: the rank is below 1.
        LoRAError: the LoRA holds NaN or Inf, or its values are too large for ``dtype`` (which float16 can be).
    """
    if rank < 1:
        raise RequestError(f"the rank to compress to is {rank}, expected at least 1")
    if rank >= lora.rank:
        return Compressed(lora, 0.0)
    dtype = dtype or lora.dtype
    tensors: dict[str, torch.Tensor] = {}
    loss = Loss()
    for pair in pairs(lora, on_tick):
        path = f"{lora.prefix}{pair.layer}.{pair.target.name}"
        exact = _truncated(pair, rank)
        a, b = (side.to(dtype) for side in exact)
        stored = replace(pair, a=a.double(), b=b.double(), scale=torch.ones(rank, dtype=torch.float64))
        if not torch.isfinite(stored.a.sum() + stored.b.sum()):
            raise LoRAError(f"{path}: values up to {max(float(side.abs().max()) for side in exact):.3g} do not fit {dtype}, "
                            f"whose largest is {torch.finfo(dtype).max:.3g}: scale the LoRA down before compressing it")
        loss.add(pair, stored)
        for side, part, shape in (("A", a, pair.target.a_shape(rank)), ("B", b, pair.target.b_shape(rank))):
            if pair.experts is None:
                tensors[f"{path}.lora_{side}"] = part
            else:
                tensors.setdefault(f"{path}.lora_{side}", torch.empty(shape, dtype=dtype))[pair.experts] = part
    error = loss.error
    of = lora.provenance.made or "LoRA"
    made = noted(lora.provenance, f"{of} compressed from rank {lora.rank} to {rank}, error {error:.2%}")
    return Compressed(LoRA.from_tensors(tensors, float(rank), made, target_order=tuple(target.name for target in lora.targets)),
                      error)


def _truncated(pair: Pair, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """a (..., r, I) and b (..., O, r) of the best approximation, singular values shared evenly between both."""
    inside, back_b, back_a = core(pair)
    left, values, right = torch.linalg.svd(inside)
    root = values[..., :rank].sqrt()
    a = (root[..., :, None] * right[..., :rank, :]) @ (back_a @ pair.a)
    return a, pair.b @ (back_b @ left[..., :rank] * root[..., None, :])
