"""Packed weights in a checkpoint: which module each belongs to, how it is unpacked, and where its tensors lie.

Owns the names under which packed weights are stored, our own (``convert.py``) and the native HunyuanImage-3 pack's alike, and
checking them before a weight is read; of the files only the small ``.comfy_quant`` texts are read. Unpacking is done by
``formats.py``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..progress import Tick, silent
from .comfy_quant import MAX_JSON_BYTES, REMEDY, read_comfy_quant
from .formats import Codec, Field
from .load import read_tensors, refuse_bitsandbytes
from .shards import Shards, TensorEntry

QUANT = ".comfy_quant"
UNUSED = (QUANT[1:], "input_scale")  # the latter is for multiplying in fp8, which is not done here
LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn\.(qkv|o)_proj|mlp\.(shared_mlp\.)?(gate_and_up|down)_proj)")
STACK = re.compile(r"(model\.layers\.\d+\.mlp\.experts)_(gate_up|down)_proj")
PARAMETERS = {"gate_up": "gate_and_up_proj", "down": "down_proj"}  # of the stack's module, by the middle of its stored name


@dataclass(frozen=True)
class PackedWeight:
    """One packed weight.

    ``module`` and ``parameter`` say whose it is: ("model.layers.0.self_attn.qkv_proj", "weight"), or
    ("model.layers.0.mlp.experts", "gate_and_up_proj"). ``shape`` is the unpacked weight's, (O, I) or (E, O, I). ``names`` gives
    the stored name of each of the codec's fields, ``entries`` its place, with the dtype and shape that the codec gives it.
    """

    module: str
    parameter: str
    shape: tuple[int, ...]
    codec: Codec
    names: Mapping[str, str]
    entries: Mapping[str, TensorEntry]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())


@dataclass(frozen=True)
class Packed:
    """A checkpoint taken apart. ``weights``: by (module, parameter). ``plain``: all that is not packed, under published names.

    ``shards``: both, each tensor as its codec wants it, so that any of them can be read with ``load.read_tensors``.
    """

    weights: dict[tuple[str, str], PackedWeight]
    plain: Shards
    shards: Shards


def find_packed(shards: Shards) -> Packed:
    """Take a checkpoint apart into packed weights and all else, without reading a weight.

    Raises:
        CheckpointError: a packed weight is incomplete, belongs to no projection of a decoder layer, is there twice, or its
            ``.comfy_quant`` does not fit its tensors; or the weights are bitsandbytes'.
    """
    refuse_bitsandbytes(shards)
    weights: dict[tuple[str, str], PackedWeight] = {}
    plain, whole = dict(shards.entries), dict(shards.entries)
    parts: dict[str, dict[str, str]] = {}
    for name in shards.entries:
        module, _, last = name.rpartition(".")
        parts.setdefault(module, {})[last] = name
    for stored in [name.removesuffix(QUANT) for name in shards.entries if name.endswith(QUANT)]:
        weight = _packed_weight(stored, {last: name for last, name in parts[stored].items() if last not in UNUSED}, shards)
        weights[weight.module, weight.parameter] = weight
        for name in parts[stored].values():
            del plain[name], whole[name]
        whole |= {weight.names[field]: entry for field, entry in weight.entries.items()}
    _refuse_leftovers(weights, plain, shards)
    return Packed(weights, Shards(shards.folder, plain), Shards(shards.folder, whole))


def read_packed(weight: PackedWeight, into: Mapping[str, Tensor], on_tick: Tick = silent) -> None:
    """Fill ``into`` with the stored tensors of ``weight``, chunk by chunk, straight from the files.

    into: for each of the codec's fields a contiguous tensor of the field's bytes: uint8, or the field's own dtype and shape.

    Raises:
        CheckpointError: a file is cut off, or a tensor of a float dtype holds NaN or Inf.
        ValueError: ``into`` has other fields or sizes.
    """
    places = {}
    for name, entry in weight.entries.items():
        if name not in into or len(into) != len(weight.entries) or into[name].nbytes != entry.nbytes:
            raise ValueError(f"places {[(key, place.nbytes) for key, place in into.items()]} for the packed tensors "
                             f"{[(key, stored.nbytes) for key, stored in weight.entries.items()]} of {weight.module}")
        places[name] = into[name].view(-1).view(torch.uint8).view(entry.dtype).view(entry.shape)
    # Under the names of the files, for what an error says.
    read_tensors({weight.names[name]: place for name, place in places.items()},
                 Shards(next(iter(weight.entries.values())).file.parent,
                        {weight.names[name]: entry for name, entry in weight.entries.items()}), on_tick)


def _packed_weight(stored: str, names: dict[str, str], shards: Shards) -> PackedWeight:
    text = shards.entries[stored + QUANT]
    where = f"{text.file}: '{stored}{QUANT}'"
    if LINEAR.fullmatch(stored):
        module, parameter, axes = stored, "weight", 2
    elif found := STACK.fullmatch(stored):
        module, parameter, axes = found[1], PARAMETERS[found[2]], 3
    else:
        raise CheckpointError(f"{where} is no projection of a decoder layer: only these may be packed; {REMEDY}")
    if text.dtype != torch.uint8 or not 0 < text.nbytes <= MAX_JSON_BYTES:
        raise CheckpointError(f"{where} has {text.nbytes} bytes as {text.dtype}, expected 1 to {MAX_JSON_BYTES} as torch."
                              f"uint8: {REMEDY}")
    fields = {last: Field(shards.entries[name].dtype, shards.entries[name].shape) for last, name in names.items()}
    codec, shape = read_comfy_quant(_bytes(text), fields, where)
    if len(shape) != axes:
        raise CheckpointError(f"{where}: the weight has {len(shape)} axes, expected {axes}: {REMEDY}")
    entries = {last: replace(shards.entries[names[last]], dtype=dtype, shape=size)
               for last, (dtype, size) in codec.fields(shape).items()}
    return PackedWeight(module, parameter, shape, codec, names, entries)


def _bytes(entry: TensorEntry) -> bytes:
    with open(entry.file, "rb") as handle:
        handle.seek(entry.offset)
        return handle.read(entry.nbytes)


def _refuse_leftovers(weights: dict[tuple[str, str], PackedWeight], plain: dict[str, TensorEntry], shards: Shards) -> None:
    """Raises CheckpointError for scales that no ``.comfy_quant`` explains, and for experts that are packed and plain."""
    for name, entry in plain.items():
        module, _, last = name.rpartition(".")
        if last.startswith("weight_") and (LINEAR.fullmatch(module) or STACK.fullmatch(module)):
            raise CheckpointError(f"{entry.file}: '{name}' belongs to a packed weight, but there is no '{module}{QUANT}' that "
                                  f"says how it is packed: {REMEDY}")
        owner, found, rest = name.partition(".mlp.experts.")
        number, _, parameter = rest.removesuffix(".weight").partition(".")
        if found and number.isdecimal() and (f"{owner}.mlp.experts", parameter) in weights:
            raise CheckpointError(f"{shards.folder}: '{name}' is there once more inside a packed stack of experts: keep one "
                                  f"checkpoint per folder")
