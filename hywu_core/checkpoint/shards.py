"""The safetensors files of one checkpoint folder: which tensor lies where.

Owns finding the files, parsing their headers, proving that every byte range lies inside its file before a weight is read, and
giving each tensor its published name: the native HunyuanImage-3 pack keeps backbone, VAE, vision tower and text head in files
of their own, and the experts of a layer in one tensor. Everything here comes from disk and is not trusted. Does not read
weights (load.py, fingerprint.py), knows no module (slots.py) and no packed format (packed.py).

The headers are parsed here and not by the safetensors library because that library hands out copies of mapped pages, while
load.py needs the offsets to read straight into the parameters.
"""

import json
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..json_fields import read_json

INDEX_SUFFIX = ".safetensors.index.json"
MANIFEST = "hywu_manifest.json"  # what convert.py leaves beside the index
NUMBERED = re.compile(r".*-\d{5}-of-(?!00001)\d{5}\.safetensors")  # one of several
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
MAX_NAME_LENGTH = 256

STACK = re.compile(r"(model\.layers\.\d+\.mlp\.)experts_(gate_up|down)_proj\.weight")
ONE_BY_ONE = {"gate_up": "gate_and_up_proj", "down": "down_proj"}
MAX_EXPERTS = 4096
# Names without their published prefix, as in files that hold the vision tower or the VAE alone. Told apart by what follows.
VISION = re.compile(r"(embeddings|encoder\.layers|post_layernorm|head)\..*")
VAE = re.compile(r"(encoder|decoder)\..*")

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorEntry:
    """Where one stored tensor lies: ``nbytes`` bytes at ``offset`` (absolute) of ``file``, as it was at ``time_ns``."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    time_ns: int  # of the file's last change when its header was read


@dataclass(frozen=True)
class Shards:
    """All tensors of one checkpoint folder, by published name."""

    folder: Path
    entries: dict[str, TensorEntry]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())


def open_shards(folder: Path) -> Shards:
    """Read the headers of all safetensors files of ``folder``: one file, shards listed by an index, or files of disjoint names.

    Experts that are stored as one float tensor (E, O, I) are named one by one.

    Raises:
        CheckpointError: no weights there, a file is damaged or cut off, index and files disagree, or two files hold the same
            tensor.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: give the folder that holds config.json and *.safetensors")
    index = _find_index(folder)
    weight_map = {} if index is None else _read_weight_map(index)
    absent = sorted(shard for shard in set(weight_map.values()) if not (folder / shard).is_file())
    # Whoever took the published folder without its weights has the index, but may have other files for them.
    if index is None or (len(absent) == len(set(weight_map.values())) and any(folder.glob("*.safetensors"))):
        return Shards(folder, _one_by_one(_gathered(_loose_files(folder))))
    if absent:
        raise CheckpointError(f"{index} lists {len(set(weight_map.values()))} shards, {len(absent)} of them are missing: "
                              f"{', '.join(absent[:10])}: download them")
    return Shards(folder, _one_by_one(_indexed(index, weight_map)))


def _indexed(index: Path, weight_map: dict[str, str]) -> dict[str, TensorEntry]:
    """The tensors of the shards that an index lists, which must be in the shards that it says."""
    entries: dict[str, TensorEntry] = {}
    stray: list[str] = []
    for shard in sorted(set(weight_map.values())):
        for name, entry in read_header(index.parent / shard).items():
            if name in entries:
                raise CheckpointError(
                    f"tensor '{name}' is in two shards, {entries[name].file.name} and {shard}: download the checkpoint again")
            if weight_map.get(name) != shard:
                stray.append(f"{name} (in {shard}, index says {weight_map.get(name, 'nothing')})")
            entries[name] = entry
    absent = [f"{name} (index says {shard})" for name, shard in weight_map.items() if name not in entries]
    if absent or stray:
        raise CheckpointError(
            f"{index.name} lists {len(weight_map)} tensors, its shards hold {len(entries)}; not in their shard: "
            f"{len(absent)} {absent[:10]}; not in the index: {len(stray)} {stray[:10]}: download the checkpoint again")
    return entries


def _gathered(files: list[Path]) -> dict[str, TensorEntry]:
    """The tensors of files that no index ties together; of several, each may hold the vision tower or the VAE alone."""
    entries: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if len(files) > 1:
                name = "vision_model." + name if VISION.fullmatch(name) else "vae." + name if VAE.fullmatch(name) else name
            if name in entries:
                raise CheckpointError(f"tensor '{name}' is in two files, {entries[name].file} and {file}: keep one checkpoint "
                                      f"per folder, in one format")
            entries[name] = entry
    return entries


def _one_by_one(entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Stacks of experts that are not packed, cut into the published tensor of each expert."""
    found: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        stack = STACK.fullmatch(name)
        if not stack or len(entry.shape) != 3 or name.removesuffix("weight") + "comfy_quant" in entries:
            found[name] = entry
            continue
        if not 0 < entry.shape[0] <= MAX_EXPERTS:
            raise CheckpointError(f"{entry.file}: '{name}' {list(entry.shape)} stacks {entry.shape[0]} experts, expected 1 to "
                                  f"{MAX_EXPERTS}: download it again")
        nbytes = entry.nbytes // entry.shape[0]
        for expert in range(entry.shape[0]):
            own = f"{stack[1]}experts.{expert}.{ONE_BY_ONE[stack[2]]}.weight"
            if own in entries:
                raise CheckpointError(f"{entry.file}: '{name}' holds '{own}', which is there by itself, too: keep one "
                                      f"checkpoint per folder")
            found[own] = replace(entry, shape=entry.shape[1:], offset=entry.offset + expert * nbytes, nbytes=nbytes)
    return found


def _find_index(folder: Path) -> Path | None:
    """The index to follow; a single ``model.safetensors`` wins over an index, as it does in transformers."""
    found = sorted(folder.glob("*" + INDEX_SUFFIX))
    if not found or (folder / "model.safetensors").is_file():
        return None
    if len(found) > 1:
        raise CheckpointError(f"{folder} holds {len(found)} indices ({', '.join(p.name for p in found)}), expected one: "
                              f"keep one checkpoint per folder")
    return found[0]


def _loose_files(folder: Path) -> list[Path]:
    """The files to take where no index is followed."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    found = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    if any(NUMBERED.fullmatch(file.name) for file in found):
        remedy = ("`hywu convert` was stopped before its end: run the same line again" if (folder / MANIFEST).is_file()
                  else "download that file, too")
        raise CheckpointError(f"{folder} holds {len(found)} *.safetensors but no model{INDEX_SUFFIX}, which says what "
                              f"belongs together: {remedy}")
    if found:
        return found
    raise CheckpointError(f"{folder} holds no weights: expected {folder / 'model.safetensors'} or model{INDEX_SUFFIX} with its "
                          f"shards; download the published folder")


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no 'weight_map': download it again")
    for name, shard in weight_map.items():
        # A plain name is a file beside the index. A link there may lead elsewhere (that is how the hub cache stores files): the
        # user made it; an index that climbs out of the folder was made by someone else.
        if not isinstance(shard, str) or not shard or shard in (".", "..") or any(mark in shard for mark in "/\\:\0"):
            raise CheckpointError(f"{index}: tensor '{name}' is said to lie in {shard!r}, expected the name of a file in the "
                                  f"same folder: do not use this checkpoint")
    return weight_map


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Parse and check the header of one safetensors file: name -> entry, in file order.

    Raises:
        CheckpointError: the header is damaged, or its byte ranges do not fill the file exactly.
    """
    with open(file, "rb") as handle:
        size = handle.seek(0, 2)
        handle.seek(0)
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(f"{file} has {size} bytes but announces a header of {length} bytes (at most "
                                  f"{MAX_HEADER_BYTES}): it is cut off or no safetensors file; download it again")
        header, time_ns = _parse_json(handle.read(length), file), os.fstat(handle.fileno()).st_mtime_ns
    start = 8 + length
    entries = {name: _entry(name, raw, file, start, time_ns) for name, raw in header.items() if name != "__metadata__"}
    return _check_ranges(entries, file, start, size)


def _parse_json(text: bytes, file: Path) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            double = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{file}: the header names '{double}' twice: download it again")
        return found

    try:
        header = json.loads(text, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, bad UTF-8, numbers of thousands of digits
        raise CheckpointError(f"{file}: the header is not valid JSON ({error}): download it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header is a {type(header).__name__}, expected an object: download it again")
    return header


def _entry(name: str, raw: Any, file: Path, start: int, time_ns: int) -> TensorEntry:
    def natural(values: Any) -> bool:
        return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)

    if len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise CheckpointError(f"{file}: a tensor is named {name[:MAX_NAME_LENGTH]!r}, expected at most {MAX_NAME_LENGTH} "
                              f"printable characters: do not use this checkpoint")
    shape, offsets = (raw.get("shape"), raw.get("data_offsets")) if isinstance(raw, dict) else (None, None)
    if not natural(shape) or not natural(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise CheckpointError(f"{file}: '{name}' has shape {shape} and data_offsets {offsets}, expected natural numbers and "
                              f"two offsets in order: download it again")
    if not isinstance(raw.get("dtype"), str) or raw["dtype"] not in DTYPES:
        raise CheckpointError(f"{file}: '{name}' is stored as {raw.get('dtype')!r}, known are {', '.join(DTYPES)}: use the "
                              f"published bf16 folder")
    dtype = DTYPES[raw["dtype"]]
    nbytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(f"{file}: '{name}' {raw['dtype']} {shape} needs {nbytes} bytes, its data_offsets {offsets} hold "
                              f"{offsets[1] - offsets[0]}: download it again")
    return TensorEntry(file, dtype, tuple(shape), start + offsets[0], nbytes, time_ns)


def _check_ranges(entries: dict[str, TensorEntry], file: Path, start: int, size: int) -> dict[str, TensorEntry]:
    """The ranges must fill the file from ``start`` to ``size`` without a gap or an overlap."""
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    end = start
    for name, entry in ordered.items():
        if entry.offset != end:
            what = "overlaps the tensor before it" if entry.offset < end else "leaves a gap before it"
            raise CheckpointError(f"{file}: '{name}' starts at byte {entry.offset}, expected {end}: it {what}; "
                                  f"download it again")
        end += entry.nbytes
    if end != size:
        what = "cut off" if size < end else "too long"
        raise CheckpointError(f"{file} is {what}: it has {size} bytes, its header describes {end}; download it again")
    return ordered
