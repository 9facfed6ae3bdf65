"""LoRA files: one safetensors file per LoRA, its provenance in the metadata.

Owns writing (whole or not at all) and reading (nothing on the disk is trusted). What makes a set of tensors a LoRA is checked
by ``value.py``; where files may lie is decided by the caller.

The file is written here and not by ``safetensors.save_file``, which puts the metadata in an order that differs from run to run:
the same LoRA gives the same bytes. It is read with the library, whose parser has seen more hostile headers than ours would.
"""

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import LoRAError
from ..progress import Tick, silent
from .value import LoRA, Provenance, raw_bytes

FORMAT = "hywu-lora"
VERSION = "1"
_DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def save_lora(lora: LoRA, path: Path, on_tick: Tick = silent) -> None:
    """Write ``lora`` to ``path``, replacing a file of that name; after any failure the old state is there. Ticks per matrix.

    Raises:
        LoRAError: the folder is missing or cannot be written, or the disk is too full (with the bytes needed and free).
    """
    path = Path(path)
    folder = path.parent
    if not folder.is_dir():
        raise LoRAError(f"cannot save {path}: the folder {folder} does not exist; create it or save elsewhere")
    header = _header(lora)
    needed = len(header) + lora.nbytes
    if (free := shutil.disk_usage(folder).free) < needed:
        raise _disk_full(path, needed, free)
    # In the same folder, because a rename is only whole or not at all within one file system.
    unfinished = folder / f".hywu-{secrets.token_hex(8)}.part"
    try:
        with open(unfinished, "xb") as file:
            file.write(header)
            for done, tensor in enumerate(lora.tensors.values(), start=1):
                file.write(raw_bytes(tensor))
                on_tick(done, len(lora.tensors), None)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        if error.errno in _NO_SPACE:
            written = unfinished.stat().st_size if unfinished.exists() else 0
            raise _disk_full(path, needed, shutil.disk_usage(folder).free + written) from error
        raise LoRAError(f"cannot save {path}: {error.strerror or error}; save to another folder") from error
    finally:
        unfinished.unlink(missing_ok=True)
    _sync_folder(folder)


def load_lora(path: Path, on_tick: Tick = silent) -> LoRA:
    """Read a LoRA file that ``save_lora`` wrote, onto the CPU, every value checked. Ticks per matrix.

    Raises:
        LoRAError: there is no such file, it is cut off or damaged, was not written by HY-WU or by a newer version, or its
            tensors make no LoRA.
    """
    path = Path(path)
    with _opened(path) as file:
        metadata = _metadata(file, path)
        keys = list(file.keys())
        tensors: dict[str, torch.Tensor] = {}
        for done, key in enumerate(keys, start=1):
            # A copy: the library hands out mapped pages of the file, which would change or vanish with it.
            tensors[key] = file.get_tensor(key).clone()
            on_tick(done, len(keys), None)
    target_order = tuple(_json_strings(metadata, "targets", path))
    try:
        lora = LoRA.from_tensors(
            tensors, _number(metadata, "alpha", path), _provenance(metadata, path),
            target_order=target_order, check_finite=True)
    except LoRAError as error:
        raise LoRAError(f"{path}: {error}") from None
    if (rank := _number(metadata, "rank", path)) != lora.rank:
        raise LoRAError(f"{path}: the metadata says rank {rank:g}, the tensors have rank {lora.rank}; generate the LoRA again")
    return lora


def read_provenance(path: Path) -> Provenance:
    """What a LoRA file was written from, out of its header alone.

    Raises:
        LoRAError: as ``load_lora``, as far as the header shows it.
    """
    with _opened(Path(path)) as file:
        return _provenance(_metadata(file, Path(path)), Path(path))


def _header(lora: LoRA) -> bytes:
    """The safetensors header: length, then JSON padded to a multiple of 8 bytes, the tensors in the LoRA's order."""
    origin = lora.provenance
    entries: dict[str, Any] = {"__metadata__": {
        "format": FORMAT, "version": VERSION, "rank": str(lora.rank), "alpha": repr(lora.alpha),
        "targets": json.dumps([target.name for target in lora.targets]),
        "backbone_fingerprint": origin.backbone_fingerprint, "generator_fingerprint": origin.generator_fingerprint,
        # A lone surrogate (from a broken paste) has no UTF-8 form; better a "?" in the note than a finished LoRA lost.
        "instruction": _utf8(origin.instruction), "thinking": _utf8(origin.thinking),
        "picture_digests": json.dumps(list(origin.picture_digests)), "seed": str(origin.seed)}}
    offset = 0
    for key, tensor in lora.tensors.items():
        entries[key] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _utf8(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def _disk_full(path: Path, needed: int, free: int) -> LoRAError:
    return LoRAError(f"cannot save {path}: {needed} bytes are needed, {free} are free; make room or save elsewhere")


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut, where the system can do that."""
    if os.name != "posix":
        return
    # Some network file systems refuse to sync a folder. The file is whole and in place by now, so that is no failure to report.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file whose header has been checked against its size."""
    if not path.is_file():
        raise LoRAError(f"{path} is not there or no file; choose a LoRA file that exists")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise LoRAError(f"{path} ({path.stat().st_size} bytes) is cut off, damaged or no safetensors file ({error}); "
                        "copy it again or generate the LoRA again") from None
    except OSError as error:
        raise LoRAError(f"{path} cannot be read: {error}; check that the file may be read") from error


def _metadata(file: Any, path: Path) -> dict[str, str]:
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        keys = sorted(file.keys())
        raise LoRAError(f"{path} is no HY-WU LoRA: its format is {metadata.get('format')!r}, expected {FORMAT!r}; it holds "
                        f"{len(keys)} tensors such as {keys[:2]}. Choose a file that HY-WU saved")
    if metadata.get("version") != VERSION:
        raise LoRAError(f"{path} has version {metadata.get('version')!r} of the LoRA format, this program reads version "
                        f"{VERSION!r}; update ComfyUI-HYWU or generate the LoRA again")
    return metadata


def _provenance(metadata: dict[str, str], path: Path) -> Provenance:
    seed = _text(metadata, "seed", path)
    if not seed.removeprefix("-").isdecimal() or len(seed) > 40:
        raise LoRAError(f"{path}: the metadata says seed {seed[:40]!r}, expected a whole number; generate the LoRA again")
    return Provenance(
        backbone_fingerprint=_text(metadata, "backbone_fingerprint", path),
        generator_fingerprint=_text(metadata, "generator_fingerprint", path),
        instruction=_text(metadata, "instruction", path), thinking=_text(metadata, "thinking", path),
        picture_digests=tuple(_json_strings(metadata, "picture_digests", path)), seed=int(seed))


def _text(metadata: dict[str, str], key: str, path: Path) -> str:
    if key not in metadata:
        raise LoRAError(f"{path}: the metadata has no '{key}', it has {sorted(metadata)}; generate the LoRA again")
    return metadata[key]


def _number(metadata: dict[str, str], key: str, path: Path) -> float:
    text = _text(metadata, key, path)
    try:
        return float(text)
    except ValueError:
        raise LoRAError(f"{path}: the metadata says {key} {text[:40]!r}, expected a number; generate the LoRA again") from None


def _json_strings(metadata: dict[str, str], key: str, path: Path) -> list[str]:
    text = _text(metadata, key, path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise LoRAError(f"{path}: the metadata says {key} {text[:80]!r}, expected a list of names; generate the LoRA again")
    return value
