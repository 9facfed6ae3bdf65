"""What ``<module>.comfy_quant`` in a file says about a packed weight: a small JSON object, turned into a codec.

Owns that JSON and whether the tensors beside it are what it says. Text and shapes come from disk and are not trusted: nothing
of a weight is read before they fit each other. How the codec works is ``formats.py``'s.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch

from ..errors import CheckpointError
from .formats import E4M3, GROUP, Codec, Field, Float8, Int4, Int8

OURS = "hywu_float8_e4m3fn_rowwise"
KNOWN = (OURS, "float8_e4m3fn", "int8_tensorwise", "asym_w4a8_int8")
MAX_JSON_BYTES = 4096
POWERS_OF_FOUR = (4, 16, 64, 256, 1024)
REMEDY = "take the native HunyuanImage-3 pack's W4A8 or int8 file, or make one from the published folder with `hywu convert`"
# The same bytes under another dtype: safetensors files of older programs know no fp8, and packed codes have no sign.
SAME_BYTES = {"weight": {(torch.int8, torch.uint8)}, "weight_s_rel": {(E4M3, torch.uint8)}}


def read_comfy_quant(text: bytes, stored: Mapping[str, Field], where: str) -> tuple[Codec, tuple[int, ...]]:
    """The codec of a packed weight and the shape (O, I) or (E, O, I) that it unpacks to.

    stored: the dtype and shape of each tensor of the module by its last name ("weight", "weight_scale", ...), without the JSON.
    A shape may lack axes of length 1, or have some more, at its end.

    Raises:
        CheckpointError: the JSON is none, names a format that is not known, or does not fit the stored tensors.
    """
    said = _parse(text, where)
    weight = stored.get("weight")
    if weight is None or len(weight.shape) not in (2, 3) or 0 in weight.shape:
        _refuse(where, f"has a weight of shape {list(weight.shape) if weight else None}, expected 2 axes, or 3 for experts")
    experts = said.get("num_experts") or 0
    found = weight.shape[0] if len(weight.shape) == 3 else 0
    if type(experts) is not int or experts not in (0, found):
        _refuse(where, f"says num_experts {str(experts)[:40]}, but its weight {list(weight.shape)} has {found or 'no'} experts")
    name = said.get("format")
    if name == "asym_w4a8_int8":
        codec, shape = _int4(said, stored, where)
    elif name == "int8_tensorwise":
        codec = Int8(_rotation(said, weight.shape[-1], where) if _flag(said, "convrot", where) else 0, _per_row(stored))
        shape = weight.shape
    elif name in (OURS, "float8_e4m3fn"):
        codec, shape = Float8(per_row=name == OURS), weight.shape
    else:
        _refuse(where, f"has the format {str(name)[:60]!r}, known are {', '.join(KNOWN)}")
    _check(codec.fields(shape), stored, where)
    return codec, shape


def _parse(text: bytes, where: str) -> dict[str, Any]:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, bad UTF-8, numbers of thousands of digits
        _refuse(where, f"is not valid JSON ({str(error)[:100]})")
    if not isinstance(said, dict):
        _refuse(where, f"holds a {type(said).__name__}, expected an object")
    return said


def _int4(said: dict[str, Any], stored: Mapping[str, Field], where: str) -> tuple[Codec, tuple[int, ...]]:
    *front, width = stored["weight"].shape
    group = _size(said, "group_size", GROUP, where)
    scales = stored.get("weight_s_rel")
    groups = scales.shape[-1] if scales is not None and scales.shape else 0
    # The scales say how wide the weight is: with 6 bits a value, the same bytes would stand for fewer values.
    if group * groups != 2 * width:
        _refuse(where, f"has rows of {width} bytes and {groups} scales for groups of {group}, expected {group * groups // 2} "
                       f"bytes: only 4 bits a value are supported")
    if group < 4 or group % 2 or (16 % group and group % 16) or 2 * width % 16:
        _refuse(where, f"says group_size {group} for rows of {2 * width} values, expected 4, 8 or a multiple of 16, and rows "
                       f"of a multiple of 16 values")
    correction = stored.get("weight_correction")
    kept = torch.float32 if scales.dtype == torch.float32 else E4M3
    codec = Int4(_rotation(said, 2 * width, where), group, "weight_codebook" in stored, kept,
                 correction.dtype if correction is not None and correction.dtype.is_floating_point else None)
    return codec, (*front, 2 * width)


def _rotation(said: dict[str, Any], columns: int, where: str) -> int:
    size = _size(said, "convrot_groupsize", 256, where)
    if size not in POWERS_OF_FOUR or columns % size:
        _refuse(where, f"says convrot_groupsize {size} for rows of {columns} values, expected one of "
                       f"{', '.join(map(str, POWERS_OF_FOUR))} that divides them")
    return size


def _size(said: dict[str, Any], key: str, default: int, where: str) -> int:
    value = said.get(key, default)
    if type(value) is not int or not 0 < value <= 1 << 20:
        _refuse(where, f"says {key} {str(value)[:40]}, expected a whole number from 1 to {1 << 20}")
    return value


def _flag(said: dict[str, Any], key: str, where: str) -> bool:
    value = said.get(key, False)
    if type(value) is not bool:
        _refuse(where, f"says {key} {str(value)[:40]}, expected true or false")
    return value


def _per_row(stored: Mapping[str, Field]) -> bool:
    """Whether there is a scale for each row, or one for the whole weight (of each expert)."""
    scale, weight = stored.get("weight_scale"), stored["weight"].shape
    matrices = weight[0] if len(weight) == 3 else 1
    return scale is None or math.prod(scale.shape) != matrices or weight[-2] == 1


def _check(expected: Mapping[str, Field], stored: Mapping[str, Field], where: str) -> None:
    """Raises CheckpointError unless exactly the expected tensors are stored."""
    if expected.keys() != stored.keys():
        _refuse(where, f"stands for the tensors {', '.join(sorted(expected))}, found {', '.join(sorted(stored))}")
    for name, (dtype, shape) in expected.items():
        found = stored[name]
        if found.dtype != dtype and (dtype, found.dtype) not in SAME_BYTES.get(name, ()):
            _refuse(where, f"wants '{name}' as {_dtype(dtype)}, found {_dtype(found.dtype)}")
        if _trimmed(found.shape) != _trimmed(shape):
            _refuse(where, f"wants '{name}' of shape {list(shape)}, found {list(found.shape)}")


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    shape = list(shape)
    while shape and shape[-1] == 1:
        shape.pop()
    return tuple(shape)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refuse(where: str, what: str) -> NoReturn:
    raise CheckpointError(f"{where} {what}: {REMEDY}")
