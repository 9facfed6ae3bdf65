"""The frame of a LoRA: names, places, dtypes and shapes of what a file holds, without a value of it.

``files.py`` writes by it what a LoRA has, and checks by it what a file says before it reads a value.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.shards import DTYPES
from ..errors import LoRAError
from . import header
from .stored import FP8, SCALE, Field, Form
from .value import LoRA

_PLACE = re.compile(r"([^0-9]*)[0-9]{1,4}(\..+)")  # "model.layers." and ".mlp.experts.w1.lora_A" around a layer's number


def keys(lora: LoRA) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """(key, layer, shape) of every matrix in the LoRA's order, none of them made."""
    for layer in range(lora.num_layers):
        for side in "AB":
            for target in lora.targets:
                shape = target.a_shape(lora.rank) if side == "A" else target.b_shape(lora.rank)
                yield f"{lora.prefix}{layer}.{target.name}.lora_{side}", layer, shape


def fields_for(lora: LoRA, form: Form) -> dict[str, Field]:
    """What the file holds: in the LoRA's order, wide scales before narrow values, so that readers may map them."""
    found = {name: field for key, layer, shape in keys(lora) for name, field in form.fields(key, layer, shape).items()}
    return dict(sorted(found.items(), key=lambda item: -item[1][0].itemsize))


def offsets_for(fields: Mapping[str, Field]) -> dict[str, tuple[int, int]]:
    """Where each tensor of a file begins and ends, after its header."""
    found, end = {}, 0
    for name, (dtype, shape) in fields.items():
        found[name] = end, end + math.prod(shape) * dtype.itemsize
        end = found[name][1]
    return found


def read_frame(file: Any, path: Path) -> tuple[LoRA, Form, Mapping[str, str]]:
    """The LoRA that a file's header describes, with zeros that take no memory for values; everything about it is checked."""
    metadata = header.checked_metadata(file.metadata() or {}, list(file.keys()), path)
    origin, order = header.provenance(metadata, path), tuple(header.names_in(metadata, "targets", path))
    alpha, rank = (header.number(metadata, key, path) for key in ("alpha", "rank"))
    weights = header.rank_weights(metadata, path)
    found: dict[str, Field] = {}
    for name in file.keys():  # noqa: SIM118
        slice_ = file.get_slice(name)
        if slice_.get_dtype() not in DTYPES:
            raise LoRAError(f"{path}: {header.shown(name, 80)} is {slice_.get_dtype()}, known are {', '.join(DTYPES)}; "
                            "generate the LoRA again")
        found[name] = DTYPES[slice_.get_dtype()], tuple(slice_.get_shape())
    fp8 = metadata.get("stored") == FP8
    named = {name: field for name, field in found.items() if not (fp8 and name.endswith(SCALE))}
    dtype = torch.bfloat16 if fp8 or not named else next(iter(named.values()))[0]
    form = header.form_in(metadata, dtype, path)
    shapes = {name: (torch.bfloat16 if fp8 and dtype_ == torch.float8_e4m3fn else dtype_, shape)
              for name, (dtype_, shape) in named.items()}
    try:
        if form.kept is not None:
            shapes = _with_dropped(shapes, form, header.expert_count(metadata, path))
        frame = LoRA.from_tensors(
            {name: torch.zeros((), dtype=dtype_).expand(shape) for name, (dtype_, shape) in shapes.items()},
            alpha, origin, rank_weights=weights, target_order=order)
    except LoRAError as error:
        raise LoRAError(f"{path}: {str(error)[:1000]}") from None
    if rank != frame.rank:
        raise LoRAError(f"{path}: the metadata says rank {rank:g}, the tensors have rank {frame.rank}; generate the LoRA again")
    if form.kept is not None and len(form.kept) != frame.num_layers:
        raise LoRAError(f"{path}: the metadata says which experts of {len(form.kept)} layers were kept, the LoRA has "
                        f"{frame.num_layers} layers; copy or generate it again")
    expected = fields_for(frame, form)
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        raise LoRAError(f"{path}: {len(wrong)} tensors are not as the metadata says, such as {header.shown(wrong[0], 120)}: "
                        f"expected {expected.get(wrong[0], 'none')}, found {found.get(wrong[0], 'none')}; copy or generate the "
                        "LoRA again")
    return frame, form, metadata


def _with_dropped(shapes: Mapping[str, Field], form: Form, experts: int) -> dict[str, Field]:
    """The fields as if all experts were there: their number in front, and the layers whose experts are all left out."""
    whole = {name: (dtype, (experts, *shape[1:]) if len(shape) == 3 else shape) for name, (dtype, shape) in shapes.items()}
    grouped: dict[tuple[str, str], Field] = {}
    for name, field in whole.items():
        place = _PLACE.fullmatch(name)
        if place and len(field[1]) == 3:
            grouped.setdefault((place[1], place[2]), field)
    for (prefix, rest), field in grouped.items():
        for layer, kept in enumerate(form.kept):
            if not kept:
                whole.setdefault(f"{prefix}{layer}{rest}", field)
    return whole
