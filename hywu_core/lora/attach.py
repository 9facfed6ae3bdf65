"""Injecting a LoRA into a handle, and attaching it to the modules for as long as a ``with`` block lasts.

``inject`` makes values only. ``attached`` is the single place where a module is touched: it hangs adapters onto the projections
on entry and takes them off on exit, error and cancel. The weights themselves are never written.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from ...kernels.reference import Adapter
from ..backbone.adapted import AdaptedLinear, Experts
from ..backbone.model import Backbone
from ..errors import LoRAError, RequestError
from ..handle import InjectedLoRA, ModelHandle
from .value import LoRA

STRENGTH_LIMIT = 4.0
Modules = Iterable[tuple[str, AdaptedLinear | Experts]]
LISTED = 10


def inject(model: ModelHandle, lora: LoRA, strength: float = 1.0) -> ModelHandle:
    """A new handle that shares all weights with ``model`` and also carries ``lora``; several in a row add up.

    Raises:
        LoRAError: the LoRA was written for another backbone (both fingerprints), or its targets are not exactly the backbone's.
        RequestError: the strength is not a number within -4 .. 4.
    """
    check_strength(strength)
    written_for = lora.provenance.backbone_fingerprint
    if written_for and written_for != model.fingerprint:
        raise LoRAError(
            f"this LoRA was written for the backbone {written_for}, the model loaded is {model.fingerprint}: load that "
            "backbone, or generate the LoRA again with this one")
    check_targets(model.backbone, lora)
    return replace(model, loras=(*model.loras, InjectedLoRA(lora, float(strength))))


def check_strength(strength: float) -> None:
    """Raises RequestError unless the strength is a number within -4 .. 4."""
    if not math.isfinite(strength) or abs(strength) > STRENGTH_LIMIT:
        raise RequestError(f"strength {strength} is outside -{STRENGTH_LIMIT:g} .. {STRENGTH_LIMIT:g}: choose one within")


def check_targets(backbone: Backbone, lora: LoRA) -> None:
    """Raises LoRAError unless the LoRA has exactly the backbone's projections, each with its shapes: no half-applied LoRA."""
    wanted = {}
    for path, target in _targets(backbone):
        wanted[f"{path}.lora_A"] = target.a_shape(lora.rank)
        wanted[f"{path}.lora_B"] = target.b_shape(lora.rank)
    # From the targets: asking a derived LoRA for its tensors would make every one of them.
    found = {f"{lora.prefix}{layer}.{target.name}.lora_{side}": shape for layer in range(lora.num_layers)
             for target in lora.targets for side, shape in (("A", target.a_shape(lora.rank)), ("B", target.b_shape(lora.rank)))}
    problems = [f"missing {name} {wanted[name]}" for name in wanted if name not in found]
    problems += [f"surplus {name} {found[name]}" for name in found if name not in wanted]
    problems += [f"{name}: expected {shape}, found {found[name]}" for name, shape in wanted.items()
                 if name in found and found[name] != shape]
    if problems:
        more = f" (and {len(problems) - LISTED} more)" if len(problems) > LISTED else ""
        raise LoRAError("this LoRA does not fit the backbone: " + "; ".join(problems[:LISTED]) + more
                        + ". It was made for another base model: generate it again with this one")


@contextmanager
def attached(model: ModelHandle, on_layer: Callable[[], None] = lambda: None) -> Iterator[None]:
    """While the block runs, the handle's LoRAs act in its backbone; afterwards none does, whatever happened inside.

    LoRAs of strength 0 are left out. on_layer is called after each layer that was given its adapters, and may raise to cancel:
    weights that nobody placed move the first time to where there is room behind them. Raises LoRAError if another block still
    holds this backbone.
    """
    backbone = model.backbone
    _refuse_second(backbone)
    active = [injected for injected in model.loras if injected.strength != 0.0]
    try:
        if active:
            hang(backbone.adapted_modules(), active, on_layer)
        yield
    finally:
        take_off(backbone.adapted_modules())


@contextmanager
def attached_rows(backbone: Backbone, matrices: Mapping[str, torch.Tensor], scale: float) -> Iterator[None]:
    """While the block runs, each row of a batch has a LoRA of its own: for training, gradients flow into ``matrices``.

    matrices: reference key -> A (B, R, I) or (B, E, R, I), B (B, O, R) or (B, E, O, R), as the generator's tokens give them.
    B is 1 for one LoRA that all rows share. Raises LoRAError for a missing target, or if the backbone carries a LoRA already.
    """
    _refuse_second(backbone)
    try:
        for name, module in backbone.adapted_modules():
            for target in module.targets():
                path = f"{name}.{target.name}".rstrip(".")
                if f"{path}.lora_A" not in matrices or f"{path}.lora_B" not in matrices:
                    raise LoRAError(f"the LoRA has no matrices for {path}, expected lora_A and lora_B: its generator was made "
                                    "for another backbone")
                a, b = matrices[f"{path}.lora_A"], matrices[f"{path}.lora_B"]
                module.attach(target.name, Adapter(a, b, a.new_full((a.shape[-2],), scale, dtype=torch.float32)))
        yield
    finally:
        take_off(backbone.adapted_modules())


def _refuse_second(backbone: Backbone) -> None:
    holding = [name for name, module in backbone.adapted_modules() if module.attached()]
    if holding:
        raise LoRAError(
            f"the backbone already carries a LoRA at {len(holding)} places ({holding[0]}, ...): let that run finish first")


def hang(modules: Modules, active: Sequence[InjectedLoRA], on_layer: Callable[[], None] = lambda: None) -> None:
    """Give modules, by their names in the backbone, their adapters of the LoRAs; for who owns only some of the layers."""
    last = None
    for name, module in modules:
        layer = name.split(".")[2]  # model.layers.0....
        if last not in (None, layer):
            on_layer()
        last, weight = layer, next(module.parameters())
        for target in module.targets():
            path = f"{name}.{target.name}".rstrip(".")
            module.attach(target.name, _adapter(path, active, module.adapter_device, weight.dtype))


def take_off(modules: Modules) -> None:
    """Take all adapters off again."""
    for _, module in modules:
        for name in module.attached():
            module.attach(name, None)


def _adapter(path: str, active: Sequence[InjectedLoRA], device: torch.device, dtype: torch.dtype) -> Adapter:
    """The LoRAs' A and B of one projection, ranks side by side; strengths go into the scale."""
    a = [injected.lora.tensors[f"{path}.lora_A"].to(device, dtype) for injected in active]
    b = [injected.lora.tensors[f"{path}.lora_B"].to(device, dtype) for injected in active]
    scale_R = torch.cat([injected.lora.scale_R * injected.strength for injected in active]).to(device, torch.float32)
    if len(active) == 1:
        return Adapter(a[0], b[0], scale_R)
    return Adapter(torch.cat(a, dim=-2), torch.cat(b, dim=-1), scale_R)


def _targets(backbone: Backbone):
    for name, module in backbone.adapted_modules():
        for target in module.targets():
            yield f"{name}.{target.name}".rstrip("."), target
