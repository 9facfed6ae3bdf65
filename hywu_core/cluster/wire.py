"""What crosses between a desk and its clients: plain data and tensors in one run of bytes, nothing pickled.

Owns the form (a safetensors file whose metadata is JSON) and which values it may hold: None, booleans, numbers, texts, lists,
mappings, tensors, pictures, and the plain values of an edit. Whether they make sense is for the reader to check.
"""

import json
from dataclasses import fields
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError

from .. import errors
from ..backbone.pictures import EncodedPicture
from ..condition import Condition
from ..errors import ClusterError, HYWUError
from ..lora.value import Provenance
from ..sampling.taylor import TaylorSettings
from ..vision.buckets import Bucket
from ..vision.pictures import upright_rgb

PROTOCOL = 1  # changes when an old client and a new desk would misunderstand each other
VALUES = {kind.__name__: kind for kind in (Bucket, Condition, EncodedPicture, Provenance, TaylorSettings)}
MAX_HEADER = 64 << 20
_KEY = "hywu"


class PartsLost(ClusterError):
    """Parts of a LoRA that lay on the cluster are gone with the process that kept them: whoever has the LoRA sends it again."""


def pack(message: dict[str, Any]) -> bytes:
    """Raises ClusterError for a value of another kind, and PictureError for a picture that cannot be read."""
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_plain(message, tensors), allow_nan=False)
    tensors = tensors or {"": torch.zeros(0)}  # a file without any is none
    return safetensors.torch.save(tensors, metadata={_KEY: text})


def unpack(data: bytes) -> dict[str, Any]:
    """What was packed; lists as tuples, pictures as RGB. Raises ClusterError for anything that ``pack`` does not write."""
    try:
        size = int.from_bytes(data[:8], "little")
        if len(data) < 8 or size > min(len(data) - 8, MAX_HEADER):
            raise ClusterError(f"a message of {len(data)} bytes says that its header has {size}: it is cut off or none of ours")
        text = json.loads(data[8 : 8 + size])["__metadata__"][_KEY]
        tensors = safetensors.torch.load(data)
        return _value(json.loads(text), tensors)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ClusterError(f"a message of {len(data)} bytes cannot be read ({type(error).__name__}: {error}): client and "
                           "cluster need the same version of this pack") from None


def _plain(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        name, flat = str(len(tensors)), value.detach().cpu().contiguous()
        # A file holds no tensor twice: a picture that is sent twice is.
        tensors[name] = flat.clone() if any(_shared(flat, other) for other in tensors.values()) else flat
        return {"$tensor": name}
    if isinstance(value, Image.Image):
        pixels = torch.from_numpy(np.array(upright_rgb(value)))
        return {"$picture": _plain(pixels, tensors)}
    if isinstance(value, list | tuple):
        return [_plain(item, tensors) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) and not key.startswith("$") for key in value):
        return {key: _plain(item, tensors) for key, item in value.items()}
    if type(value) in VALUES.values():
        return {f"${type(value).__name__}": {each.name: _plain(getattr(value, each.name), tensors) for each in fields(value)}}
    raise ClusterError(f"a value of type {type(value).__name__} cannot be sent to a cluster")


def _shared(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _value(plain: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(plain, list):
        return tuple(_value(item, tensors) for item in plain)
    if not isinstance(plain, dict):
        return plain
    tag, inner = next(iter(plain.items()), ("", None))
    if not tag.startswith("$"):
        return {key: _value(item, tensors) for key, item in plain.items()}
    if len(plain) != 1:
        raise ClusterError(f"a message holds {sorted(plain)} where one tagged value is expected")
    if tag == "$tensor":
        return tensors[inner]
    if tag == "$picture":
        pixels_HWC = _value(inner, tensors)
        if pixels_HWC.dtype != torch.uint8 or pixels_HWC.ndim != 3 or pixels_HWC.shape[2] != 3:
            raise ClusterError(f"a picture came as {pixels_HWC.dtype} {tuple(pixels_HWC.shape)}, expected uint8 (H, W, 3)")
        return Image.fromarray(pixels_HWC.numpy())
    kind = VALUES[tag[1:]]
    return kind(**{each.name: _value(inner[each.name], tensors) for each in fields(kind)})


def error_of(kind: str, text: str) -> HYWUError:
    """The error that was sent as the name of its class and its text."""
    found = PartsLost if kind == PartsLost.__name__ else getattr(errors, kind, ClusterError)
    return (found if isinstance(found, type) and issubclass(found, HYWUError) else ClusterError)(text)


# ---- between the parts of a cluster: one tensor, its bytes not copied on the way

Parcel = tuple[str, tuple[int, ...], np.ndarray]


def parcel(tensor: torch.Tensor) -> Parcel:
    """A tensor as what Ray shares without a copy: dtype, shape and its bytes."""
    flat = tensor.detach().cpu().contiguous()
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), flat.view(-1).view(torch.uint8).numpy()


def opened(parcel: Parcel, device: torch.device) -> torch.Tensor:
    """The tensor on ``device``, in memory of its own (what Ray shares must not be written to)."""
    dtype, shape, flat = parcel
    tensor = torch.empty(shape, dtype=getattr(torch, dtype))
    if tensor.numel():
        tensor.view(-1).view(torch.uint8).numpy()[:] = flat
    return tensor.to(device)
