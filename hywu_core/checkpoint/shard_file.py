"""Writing safetensors files whose tensors come piece by piece: a shard is larger than what should be in memory at once.

Owns the header, the place of each tensor, and that a file appears whole or not at all (write aside, fsync, rename), with its
SHA-256. What is written is ``convert.py``'s. Not ``safetensors.save_file``, which wants all tensors of the file at once.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from ..errors import CheckpointError, RequestError
from .shards import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}
LEFTOVERS = ".hywu-*.part"
CHUNK_BYTES = 8 << 20
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class Planned(NamedTuple):
    """A tensor that a file will hold."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan_header(tensors: Sequence[Planned]) -> tuple[bytes, int]:
    """The header of a file with these tensors, and how many bytes follow it."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in _ordered(tensors):
        entries[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape),
                                "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offset


def _ordered(tensors: Sequence[Planned]) -> list[Planned]:
    """Wide dtypes first, so that every tensor lies at a multiple of its item size: readers map files."""
    return sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))


class ShardFile:
    """One file being written, in a ``with`` block; without ``finish`` in it, nothing is left behind.

    Raises RequestError if the disk refuses.
    """

    def __init__(self, file: Path, tensors: Sequence[Planned]):
        self._file = file
        # In the same folder, because a rename is only whole or not at all within one file system.
        self._aside = file.parent / f".hywu-{secrets.token_hex(8)}.part"
        self._header, self._size = plan_header(tensors)
        self._places: dict[str, int] = {}
        offset = len(self._header)
        for tensor in _ordered(tensors):
            self._places[tensor.name] = offset
            offset += tensor.nbytes

    def __enter__(self) -> "ShardFile":
        try:
            self._handle = open(self._aside, "xb")
        except OSError as error:
            raise self._refused(error) from error
        try:
            self._handle.write(self._header)
            self._handle.truncate(len(self._header) + self._size)
        except OSError as error:
            self.__exit__()
            raise self._refused(error) from error
        return self

    def __exit__(self, *error: object) -> None:
        # A full disk refuses what is left in the buffer once more; by now the file is renamed and safe, or not wanted.
        with contextlib.suppress(OSError):
            self._handle.close()
        self._aside.unlink(missing_ok=True)

    def write(self, name: str, offset: int, data: Any) -> None:
        """Some bytes of the tensor ``name``, from its byte ``offset`` on."""
        try:
            self._handle.seek(self._places[name] + offset)
            self._handle.write(data)
        except OSError as error:
            raise self._refused(error) from error

    def copy(self, name: str, source: BinaryIO, nbytes: int) -> None:
        """The tensor ``name`` from the next ``nbytes`` of ``source``. Raises CheckpointError if these are not there."""
        done = 0
        while done < nbytes:
            chunk = source.read(min(CHUNK_BYTES, nbytes - done))
            if not chunk:
                raise CheckpointError(f"{source.name} ends {nbytes - done} bytes before the end of '{name}' ({nbytes} bytes): "
                                      f"it changed while it was read; download it again")
            self.write(name, done, chunk)
            done += len(chunk)

    def finish(self) -> dict[str, Any]:
        """Give the file its name; returns its size and SHA-256, of what a reader finds on the disk."""
        try:
            self._handle.flush()
            os.fsync(self._handle.fileno())
            digest = sha256(self._aside)
            os.replace(self._aside, self._file)
        except OSError as error:
            raise self._refused(error) from error
        return {"bytes": len(self._header) + self._size, "sha256": digest}

    def _refused(self, error: OSError) -> RequestError:
        needed = len(self._header) + self._size
        if error.errno in NO_SPACE:
            return RequestError(f"cannot write {self._file}: {needed} bytes are needed, {free_bytes(self._file.parent)} are "
                                f"left: make room and run the same line again")
        return RequestError(f"cannot write {self._file} ({needed} bytes): {error.strerror or error}; choose another folder")


def write_file(file: Path, data: bytes) -> dict[str, Any]:
    """A small file, whole or not at all; returns its size and SHA-256. Raises RequestError if the disk refuses."""
    aside = file.parent / f".hywu-{secrets.token_hex(8)}.part"
    try:
        with open(aside, "xb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(aside, file)
    except OSError as error:
        raise RequestError(f"cannot write {file} ({len(data)} bytes, {free_bytes(file.parent)} are free): "
                           f"{error.strerror or error}; make room or choose another folder") from error
    finally:
        with contextlib.suppress(OSError):  # a read-only file system refuses even what is not there
            aside.unlink(missing_ok=True)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while chunk := handle.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def free_bytes(folder: Path) -> int:
    """Bytes that can still be written to a folder, or to where it will be made."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free
