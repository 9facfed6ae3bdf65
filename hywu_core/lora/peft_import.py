"""A PEFT folder as a LoRA of HY-WU: our own (``peft.py``) or any ordinary one that was trained on HunyuanImage-3.

Owns which modules are known, and how theirs become ours: nothing but safetensors and JSON is read, and nothing of it trusted.

A LoRA of HY-WU has every target in every layer, all of one rank and one scale. So what a PEFT LoRA leaves out is zero (and
takes no memory), smaller ranks are padded with zeros, and a scale that differs from the first module's is multiplied into B, in
fp32 unless it differs by a power of two. An expert's ``gate_and_up_proj`` becomes w3 (first half, up) and w1 (second half,
gate), both with its A; ranks that write to one half only are left out of the other.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import LoRAError
from ..progress import Tick, silent
from . import header
from .algebra import RANK_LIMIT
from .peft import DOWN, GATE, GATE_UP, LAST, MODULE, NOTE, UP
from .peft_config import CONFIG, WEIGHTS, PeftConfig, read_peft_config
from .targets import PREFIX, PUBLISHED, Adapted, targets_of
from .value import LoRA, Provenance

LISTED = 5
_LINEARS = "self_attn.qkv_proj", "self_attn.o_proj", "mlp.shared_mlp.gate_and_up_proj", "mlp.shared_mlp.down_proj"
_KEY = re.compile(
    re.escape(MODULE + PREFIX) + r"(?P<layer>0|[1-9][0-9]{0,3})\.(?:(?P<linear>" + "|".join(map(re.escape, _LINEARS))
    + r")|mlp\.experts\.(?P<expert>0|[1-9][0-9]{0,3})\.(?P<kind>gate_and_up_proj|down_proj))\.lora_(?P<side>[AB])\.weight")
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class _Module:
    """One adapted module: where it is, and what its two matrices are."""

    path: str  # "model.layers.0.mlp.experts.3.down_proj"
    layer: int
    name: str  # "self_attn.qkv_proj", or "gate_and_up_proj" of an expert
    expert: int | None
    rank: int
    in_features: int
    out_features: int
    scale: float

    def key(self, side: str) -> str:
        return f"{MODULE}{self.path}.lora_{side}.weight"


def import_peft(folder: Path, backbone: Adapted | None = None, on_tick: Tick = silent) -> LoRA:
    """Read a PEFT folder. Ticks per module.

    backbone: sizes of what it was trained on; default is those in the folder, where it adapts everything, else the published
    model's.

    Raises:
        LoRAError: something is missing or damaged, there is more to the adapter than A and B on the projections that a LoRA of
            HY-WU has, its sizes are another model's, or ranks above RANK_LIMIT.
    """
    folder = Path(folder)
    config, weights = read_peft_config(folder), folder / WEIGHTS
    if not weights.is_file():
        found = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".safetensors"))[:LISTED]
        raise LoRAError(f"{weights} is missing (there is {', '.join(found) or 'nothing else'} next to {CONFIG}): only "
                        "safetensors are read; save the adapter with safe_serialization=True")
    try:
        with safe_open(weights, framework="pt", device="cpu") as file:
            modules, dtype = _modules(file, config, weights)
            sizes = backbone or _whole(modules) or PUBLISHED
            _check_sizes(modules, sizes, weights, backbone is not None)
            return _read(file, weights, modules, sizes, dtype, _origin(file, folder, weights), on_tick)
    except SafetensorError as error:
        raise LoRAError(f"{weights} ({weights.stat().st_size} bytes) is cut off, damaged or no safetensors file "
                        f"({str(error)[:300]}); copy or export it again") from None
    except OSError as error:
        raise LoRAError(f"{weights} cannot be read: {error}; check that the file may be read") from error


def _modules(file: Any, config: PeftConfig, path: Path) -> tuple[list[_Module], torch.dtype]:
    """All adapted modules from the header, and the widest dtype. Raises LoRAError for any tensor that has no place."""
    places: dict[tuple[int, int, str], dict[str, tuple[int, ...]]] = {}
    unknown, dtype, names = [], None, {}
    for key in file.keys():  # noqa: SIM118
        match = _KEY.fullmatch(key)
        if match is None:
            unknown.append(key)
            continue
        part = file.get_slice(key)
        shape = tuple(part.get_shape())
        if part.get_dtype() not in _DTYPES or len(shape) != 2 or 0 in shape:
            raise LoRAError(f"{path}: '{key}' is {part.get_dtype()} {list(shape)}, expected a matrix of {', '.join(_DTYPES)}: "
                            "convolutions and quantised adapters cannot be imported")
        dtype = _DTYPES[part.get_dtype()] if dtype is None else torch.promote_types(dtype, _DTYPES[part.get_dtype()])
        place = int(match["layer"]), -1 if match["expert"] is None else int(match["expert"]), match["linear"] or match["kind"]
        places.setdefault(place, {})[match["side"]] = shape
        names[place] = key.removeprefix(MODULE).rpartition(".lora_")[0]
    if unknown:
        raise LoRAError(f"{path}: {len(unknown)} of {len(unknown) + 2 * len(places)} tensors belong to no projection that a "
                        f"LoRA of HY-WU adapts, such as {header.shown(unknown[:LISTED], 400)}, expected names such as "
                        f"'{MODULE}{PREFIX}0.self_attn.qkv_proj.lora_A.weight': train it on these projections only")
    if not places:
        raise LoRAError(f"{path} holds 0 tensors, expected A and B of at least one projection: export it again")
    modules = []
    for (layer, expert, name), sides in sorted(places.items()):
        where = names[layer, expert, name]
        if set(sides) != {"A", "B"} or sides["A"][0] != sides["B"][1] or sides["A"][0] != config.rank_of(where):
            raise LoRAError(f"{path}: {where} has {header.shown(sides, 80)} and rank {config.rank_of(where)} in {CONFIG}, "
                            "expected A (rank, in) and B (out, rank): the adapter is damaged, export it again")
        modules.append(_Module(where, layer, name, None if expert < 0 else expert, sides["A"][0], sides["A"][1], sides["B"][0],
                               config.scale_of(where)))
    return modules, dtype


def _whole(modules: list[_Module]) -> Adapted | None:
    """The sizes of the backbone, if every layer and every expert has all its modules; else None."""
    first = {(module.expert is None, module.name): module for module in reversed(modules)}
    layers = max(module.layer for module in modules) + 1
    experts = max(-1 if module.expert is None else module.expert for module in modules) + 1
    if len(first) < len(_LINEARS) + 2 or len(modules) != layers * (len(_LINEARS) + 2 * experts):
        return None
    qkv, out, shared, down = (first[True, "self_attn.qkv_proj"], first[True, "self_attn.o_proj"],
                              first[True, "mlp.shared_mlp.down_proj"], first[False, DOWN])
    return Adapted(layers, targets_of(qkv.in_features, out.in_features, qkv.out_features, shared.in_features, down.in_features,
                                      experts))


def _check_sizes(modules: list[_Module], sizes: Adapted, path: Path, known: bool) -> None:
    """Raises LoRAError for a module that a backbone of these sizes has not."""
    targets = {target.name: target for target in sizes.targets}
    for module in modules:
        target = targets[module.name if module.expert is None else UP if module.name == GATE_UP else LAST]
        outputs = target.out_features * (2 if module.expert is not None and module.name == GATE_UP else 1)
        found, wanted = (module.in_features, module.out_features), (target.in_features, outputs)
        if found != wanted or module.layer >= sizes.num_layers or (module.expert or 0) >= max(target.experts, 1):
            raise LoRAError(
                f"{path}: {module.path} goes from {found[0]} to {found[1]}, expected {wanted[0]} to {wanted[1]} in a backbone "
                f"of {sizes.num_layers} layers and {targets[UP].experts} experts: "
                + ("it was trained on another model" if known else "if it was trained on a model of another size than the "
                   "published one, name that model"))


@dataclass(frozen=True)
class _Piece:
    """What a module gives to one target: all rows of its A, or those of ``ranks``, and the rows ``out`` of its B."""

    target: str
    module: _Module
    out: slice
    ranks: torch.Tensor | None

    @property
    def rank(self) -> int:
        return self.module.rank if self.ranks is None else len(self.ranks)


def _pieces(file: Any, modules: list[_Module], tick: Callable[[], None]) -> Iterator[_Piece]:
    for module in modules:
        if module.expert is not None and module.name == GATE_UP:
            half = module.out_features // 2
            writes_OR = file.get_tensor(module.key("B")) != 0
            for target, out in ((UP, slice(0, half)), (GATE, slice(half, None))):
                yield _Piece(target, module, out, writes_OR[out].any(0).nonzero()[:, 0])
        else:
            yield _Piece(module.name if module.expert is None else LAST, module, slice(None), None)
        tick()


def _read(file: Any, path: Path, modules: list[_Module], sizes: Adapted, dtype: torch.dtype, origin: Provenance,
          on_tick: Tick) -> LoRA:
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        on_tick(done, 2 * len(modules), None)

    pieces = list(_pieces(file, modules, tick))
    rank = max(1, *(piece.rank for piece in pieces))
    if rank > RANK_LIMIT:
        raise LoRAError(f"{path}: {max(pieces, key=lambda piece: piece.rank).module.path} has rank {rank}, a LoRA of HY-WU has "
                        f"at most {RANK_LIMIT}: train or convert it to a smaller one")
    scale = next((module.scale for module in modules if module.scale), 1.0)
    ratios = {module.path: module.scale / scale for module in modules}
    # Times a power of two nothing is rounded; anything else would be, in a narrow dtype.
    if any(ratio and abs(math.frexp(ratio)[0]) != 0.5 for ratio in ratios.values()):
        dtype = torch.promote_types(dtype, torch.float32)
    targets = {target.name: target for target in sizes.targets}
    tensors: dict[str, torch.Tensor] = {}
    last = None
    for piece in pieces:
        module, target = piece.module, targets[piece.target]
        name = f"{PREFIX}{module.layer}.{piece.target}.lora_"
        a, b = file.get_tensor(module.key("A")), file.get_tensor(module.key("B"))[piece.out]
        if piece.ranks is not None:
            a, b = a[piece.ranks], b[:, piece.ranks]
        b = b.to(dtype) if ratios[module.path] == 1 else (b.double() * ratios[module.path]).to(dtype)
        for side, shape, part in (("A", target.a_shape(rank), a), ("B", target.b_shape(rank), b)):
            if name + side not in tensors:
                tensors[name + side] = torch.zeros(shape, dtype=dtype)
            place = tensors[name + side] if module.expert is None else tensors[name + side][module.expert]
            place[:part.shape[0], :part.shape[1]] = part
        if module is not last:
            last = module
            tick()
    for layer in range(sizes.num_layers):
        for target in sizes.targets:
            for side, shape in (("A", target.a_shape(rank)), ("B", target.b_shape(rank))):
                tensors.setdefault(f"{PREFIX}{layer}.{target.name}.lora_{side}", torch.zeros((), dtype=dtype).expand(shape))
    try:
        return LoRA.from_tensors(tensors, abs(scale) * rank, origin, rank_weights=(math.copysign(1.0, scale),) * rank,
                                 target_order=tuple(targets), check_finite=True)
    except LoRAError as error:
        raise LoRAError(f"{path}: {error}") from None


def _origin(file: Any, folder: Path, path: Path) -> Provenance:
    """What our own export wrote beside the matrices; of other folders their name."""
    ours = {key.removeprefix(NOTE): value for key, value in (file.metadata() or {}).items() if key.startswith(NOTE)}
    return header.provenance(ours, path) if ours else Provenance(made=f"imported from the PEFT folder {folder.name[:200]}")
