"""Codecs of the formats in which weights are kept smaller than bf16: packed, and unpacked as a whole before a layer runs.

Owns which tensors a packed weight consists of, packing and unpacking; nothing is multiplied in packed form, so a LoRA acts
beside the unpacked weight as beside any other. What a file's ``.comfy_quant`` says is read in ``comfy_quant.py``.

    fp8    e4m3, one fp32 scale a row                          our own: comfy-kitchen's fp8 has one scale for the whole tensor
    int8   rotated (ConvRot), one fp32 scale a row             comfy-kitchen's int8_tensorwise
    int4   rotated, a table of 16 levels, one fp8 scale        comfy-kitchen's asym_w4a8_int8
           a group of 16 columns, one fp32 scale a row

A weight is (O, I), or (E, O, I) for the experts of a layer; then every packed tensor has the experts in front, too, so that any
choice of experts is packed the same way. comfy-kitchen is imported when it is needed: to pack int8 and int4, to unpack int8 and
those forms of int4 that only other people's files have.
"""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError, RequestError

FORMATS = ("bf16", "fp8", "int8", "int4")  # what users type; bf16 = as published
ROTATIONS = (256, 64, 16)  # ConvRot group sizes, the best first
GROUP = 16  # columns that share a scale in int4
# The levels that lose least of Gaussian values in [-1, 1]: comfy-kitchen's table, which its fast kernels know by heart.
LEVELS = (-0.980602, -0.794529, -0.638165, -0.500986, -0.377321, -0.263187, -0.155210, -0.050720,
          0.052541, 0.156985, 0.265284, 0.379533, 0.502636, 0.638953, 0.794876, 0.980671)
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0


class Field(NamedTuple):
    """One tensor of a packed weight."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Codec:
    """How one weight is packed. Equal codecs pack alike; nothing in them depends on O or E."""

    format: ClassVar[str]

    def fields(self, shape: tuple[int, ...]) -> dict[str, Field]:
        """Name -> dtype and shape of the packed tensors of a weight (O, I) or (E, O, I). "weight" is always among them."""
        *experts, rows, columns = shape
        return {name: Field(dtype, (*experts, *tail)) for name, (dtype, tail) in self._matrix(rows, columns).items()}

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """A float weight (O, I) or (E, O, I) on any device -> the tensors of ``fields``, on the same device.

        Raises:
            CheckpointError: the weight holds NaN or Inf, or values too large for the format's scales; comfy-kitchen is missing.
        """
        with torch.cuda.device_of(weight):  # comfy-kitchen's kernels go to the current device
            return self._pack_all(weight)

    def _pack_all(self, weight: Tensor) -> dict[str, Tensor]:
        if weight.ndim == 2:
            return self._pack_checked(weight)
        packed = {name: torch.empty(shape, dtype=dtype, device=weight.device)
                  for name, (dtype, shape) in self.fields(tuple(weight.shape)).items()}
        for expert, matrix in enumerate(weight):
            for name, part in self._pack_checked(matrix).items():
                packed[name][expert].copy_(part)
        return packed

    def unpack(self, tensors: Mapping[str, Tensor], out: Tensor) -> Tensor:
        """Write the weight that ``tensors`` (those of ``fields(out.shape)``) stand for into ``out``, and return it.

        ``out`` is bf16, fp16 or fp32, on the same device, and may have strided rows. Temporaries are those of one expert;
        nothing waits for a GPU. Raises ValueError for tensors of other shapes or dtypes.
        """
        expected = self.fields(tuple(out.shape))
        found = {name: Field(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        if found != expected:
            raise ValueError(f"packed tensors {found} are no {self.format} weight of shape {list(out.shape)}, which has "
                             f"{expected}")
        with torch.cuda.device_of(out):
            if out.ndim == 2:
                self._unpack(tensors, out)
            else:
                for expert, matrix in enumerate(out):
                    self._unpack({name: tensor[expert] for name, tensor in tensors.items()}, matrix)
        return out

    def to_json(self, experts: int = 0) -> str:
        """What ``<module>.comfy_quant`` says of a weight with so many stacked experts (0: none)."""
        return json.dumps(self._described() | ({"num_experts": experts} if experts else {}))

    def _pack_checked(self, weight: Tensor) -> dict[str, Tensor]:
        if not weight.isfinite().all():
            bad = int(weight.numel() - weight.isfinite().sum())
            raise CheckpointError(f"a weight of shape {list(weight.shape)} has NaN or Inf in {bad} of {weight.numel()} values, "
                                  f"expected none: it cannot be stored as {self.format}; download it again")
        # In fp32: of a bf16 weight, comfy-kitchen would round the rotated values to bf16 first.
        packed = self._pack(weight.float())
        for name, tensor in packed.items():
            if tensor.is_floating_point() and not tensor.float().isfinite().all():
                raise CheckpointError(f"a weight of shape {list(weight.shape)} has values up to "
                                      f"{float(weight.abs().max()):.3g}, too large for the {name} of {self.format}: use bf16")
        return packed

    def _matrix(self, rows: int, columns: int) -> dict[str, Field]:
        raise NotImplementedError

    def _pack(self, weight: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def _unpack(self, tensors: Mapping[str, Tensor], out: Tensor) -> None:
        raise NotImplementedError

    def _described(self) -> dict[str, object]:
        raise NotImplementedError


@dataclass(frozen=True)
class Float8(Codec):
    """e4m3 values times a scale a row (ours), or times one scale (ComfyUI's ``float8_e4m3fn``, which is only read)."""

    format: ClassVar[str] = "fp8"
    per_row: bool = True

    def _matrix(self, rows: int, columns: int) -> dict[str, Field]:
        return {"weight": Field(E4M3, (rows, columns)),
                "weight_scale": Field(torch.float32, (rows, 1) if self.per_row else ())}

    def _pack(self, weight: Tensor) -> dict[str, Tensor]:
        scale = (weight.abs().amax(1, keepdim=True) if self.per_row else weight.abs().max()) / E4M3_MAX
        # A row of zeros has scale 0; e4m3 has no Inf, so what rounding carries beyond its largest value would be NaN.
        scaled = (weight / scale.where(scale > 0, 1.0)).clamp_(-E4M3_MAX, E4M3_MAX)
        return {"weight": scaled.to(E4M3), "weight_scale": scale}

    def _unpack(self, tensors: Mapping[str, Tensor], out: Tensor) -> None:
        # Every float dtype holds e4m3 exactly; the product is formed in fp32 and rounded once.
        scale = tensors["weight_scale"]
        if scale.ndim == 0:  # which counts as a Python number when dtypes are chosen: the product would be formed in bf16
            scale = scale.view(1, 1)
        torch.mul(tensors["weight"].to(out.dtype), scale, out=out)

    def _described(self) -> dict[str, object]:
        return {"format": "hywu_float8_e4m3fn_rowwise" if self.per_row else "float8_e4m3fn"}


@dataclass(frozen=True)
class Int8(Codec):
    """comfy-kitchen's ``int8_tensorwise``. ``rotation``: ConvRot group size, 0 = not rotated."""

    format: ClassVar[str] = "int8"
    rotation: int = 256
    per_row: bool = True

    def _matrix(self, rows: int, columns: int) -> dict[str, Field]:
        return {"weight": Field(torch.int8, (rows, columns)),
                "weight_scale": Field(torch.float32, (rows, 1) if self.per_row else ())}

    def _pack(self, weight: Tensor) -> dict[str, Tensor]:
        data, params = _kitchen().TensorWiseINT8Layout.quantize(
            weight.contiguous(), is_weight=True, per_channel=self.per_row, convrot=self.rotation > 0,
            convrot_groupsize=self.rotation)
        return {"weight": data, "weight_scale": params.scale}

    def _unpack(self, tensors: Mapping[str, Tensor], out: Tensor) -> None:
        layout = _kitchen().TensorWiseINT8Layout
        params = layout.Params(scale=tensors["weight_scale"], orig_dtype=out.dtype, orig_shape=tuple(out.shape),
                               convrot=self.rotation > 0, convrot_groupsize=self.rotation)
        out.copy_(layout.dequantize(tensors["weight"], params))

    def _described(self) -> dict[str, object]:
        rotated = {"convrot": True, "convrot_groupsize": self.rotation} if self.rotation else {"convrot": False}
        return {"format": "int8_tensorwise"} | rotated


@dataclass(frozen=True)
class Int4(Codec):
    """comfy-kitchen's ``asym_w4a8_int8``, in the 4-bit form that it packs by default and in the others that a file may have.

    Two values a byte, the left one in the low half; a value is round(level * scale of its group) times the scale of its row.
    ``levels``: a table of 16 comes along, else they are -8 .. 7. ``correction``: what is added to each group, a dtype or None.
    """

    format: ClassVar[str] = "int4"
    rotation: int = 256
    group: int = GROUP
    levels: bool = True
    scale_dtype: torch.dtype = E4M3
    correction: torch.dtype | None = None

    def _matrix(self, rows: int, columns: int) -> dict[str, Field]:
        groups = columns // self.group
        fields = {"weight": Field(torch.int8, (rows, columns // 2)), "weight_s_rel": Field(self.scale_dtype, (rows, groups)),
                  "weight_s_channel": Field(torch.float32, (rows,))}
        if self.correction is not None:
            fields["weight_correction"] = Field(self.correction, (groups, rows))
        if self.levels:
            fields["weight_codebook"] = Field(torch.float32, (16,))
        return fields

    def _pack(self, weight: Tensor) -> dict[str, Tensor]:
        layout = _kitchen().AsymW4A8Int8Layout
        # Always the table that comfy-kitchen takes for rotated weights. Where many rows are zero it would fit one of its own,
        # whose levels come out unsorted (0.2.40) while it searches them as sorted: errors of 40 % instead of 7.
        data, params = layout.quantize(
            weight.contiguous(), group_size=self.group, convrot_groupsize=self.rotation, symmetric=self.correction is None,
            scale_dtype=self.scale_dtype, codebook=self.levels,
            codebook_tensor=torch.tensor(LEVELS, device=weight.device) if self.levels else None)
        return {f"weight{suffix}": tensor for suffix, tensor in layout.state_dict_tensors(data, params).items()}

    def _unpack(self, tensors: Mapping[str, Tensor], out: Tensor) -> None:
        if self.correction is not None or self.scale_dtype != E4M3:
            self._unpack_by_kitchen(tensors, out)
            return
        # comfy-kitchen's numbers in a quarter of its memory traffic: a group's scale has 256 values and a byte of two codes
        # has 256, so what a byte stands for is looked up in one table instead of computed in fp32.
        rows, columns = out.shape
        table = self._table(tensors, out.dtype)
        scale = tensors["weight_s_rel"].view(torch.uint8).to(torch.int32).mul_(256).unsqueeze(-1)
        index = tensors["weight"].view(torch.uint8).view(rows, -1, self.group // 2) + scale
        values = table.index_select(0, index.view(-1)).view(out.dtype).view(rows, columns)
        torch.mul(values, tensors["weight_s_channel"].unsqueeze(1), out=values)
        # CPUs without bf16 arithmetic multiply 40 times slower in it than in fp32; the products are the same.
        wide = torch.float32 if out.device.type == "cpu" else out.dtype
        values, turn = values.view(-1, self.rotation).to(wide), _hadamard(self.rotation, out.device, wide)
        if out.is_contiguous() and wide == out.dtype:
            torch.mm(values, turn, out=out.view(-1, self.rotation))
        else:
            out.copy_((values @ turn).view(rows, columns))

    def _table(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """(65536,) integers of two ``dtype`` each: at 256 * scale byte + code byte, both values before the row's scale."""
        device = tensors["weight"].device
        levels = tensors["weight_codebook"] if self.levels else torch.arange(-8.0, 8.0, device=device)
        scales = torch.arange(256, dtype=torch.uint8, device=device).view(E4M3).float()
        value = (scales.unsqueeze(1) * levels).round_().clamp_(-127, 127).to(dtype)  # (scale, code)
        pairs = torch.stack((value.unsqueeze(1).expand(-1, 16, -1), value.unsqueeze(2).expand(-1, -1, 16)), dim=-1)
        return pairs.view(torch.int64 if dtype.itemsize == 4 else torch.int32).view(-1)

    def _unpack_by_kitchen(self, tensors: Mapping[str, Tensor], out: Tensor) -> None:
        layout = _kitchen().AsymW4A8Int8Layout
        params = layout.Params(
            scale=tensors["weight_s_rel"], s_channel=tensors["weight_s_channel"], correction=tensors.get("weight_correction"),
            codebook=tensors.get("weight_codebook"), orig_dtype=out.dtype, orig_shape=tuple(out.shape), group_size=self.group,
            convrot_groupsize=self.rotation)
        out.copy_(layout.dequantize(tensors["weight"], params))

    def _described(self) -> dict[str, object]:
        return {"format": "asym_w4a8_int8", "group_size": self.group, "convrot_groupsize": self.rotation}


def codec(format: str, shape: tuple[int, ...]) -> Codec | None:
    """The best codec of ``format`` for a weight (O, I) or (E, O, I); None where the weight stays as it is: in bf16, or where
    the format has no form for that shape (int4 needs an I that is a multiple of 16).

    Raises RequestError for a format that is none of FORMATS.
    """
    if format not in FORMATS:
        raise RequestError(f"there is no format {format!r}: choose one of {', '.join(FORMATS)}")
    if format == "bf16" or len(shape) not in (2, 3) or not math.prod(shape):
        return None
    if format == "fp8":
        return Float8()
    rotation = next((size for size in ROTATIONS if shape[-1] % size == 0), 0)
    if format == "int8":
        return Int8(rotation)
    return Int4(rotation) if rotation else None


@functools.lru_cache(maxsize=32)
def _hadamard(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """ConvRot's rotation (size, size), which is its own inverse: powers of the 4 x 4 regular Hadamard matrix, normalised."""
    # Outside of inference mode, or what is kept here could not be used with autograd later.
    with torch.inference_mode(False):
        four = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
        whole = four
        while len(whole) < size:
            whole = torch.kron(whole, four)
        return (whole / math.sqrt(size)).to(device, dtype)


def _kitchen():
    """comfy-kitchen's layouts. Raises CheckpointError if it is missing or too old."""
    try:
        from comfy_kitchen.tensor import AsymW4A8Int8Layout, TensorWiseINT8Layout  # noqa: F401
    except ImportError as error:
        raise CheckpointError(f"int8 and 4-bit weights need comfy-kitchen 0.2.40 or newer ({error}): "
                              f"pip install comfy-kitchen") from None
    from comfy_kitchen import tensor

    return tensor
