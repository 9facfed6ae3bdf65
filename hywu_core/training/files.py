"""Tensors to disk, whole or not at all: beside the file, synced, then renamed."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..errors import RequestError


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises:
        RequestError: the disk refuses; what was there before is untouched.
    """
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, aside, metadata=metadata)
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        # The library makes files that only their owner can read; a checkpoint is an ordinary file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(aside, 0o666 & ~umask)
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        raise RequestError(f"{path} could not be written ({error}): free some space and run again") from None
    finally:
        aside.unlink(missing_ok=True)
