"""Files that appear whole or not at all: written aside, synced, renamed."""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import LoRAError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def written_whole(path: Path, needed: int) -> Iterator[BinaryIO]:
    """A new file of ``needed`` bytes to write and seek in; at the end of the block it replaces what is at ``path``.

    After any failure, in the block or at its end, the old state is there.

    Raises:
        LoRAError: the folder is missing or cannot be written, or the disk is too full (with the bytes needed and free).
    """
    check_folder(path)
    folder = path.parent
    if (free := shutil.disk_usage(folder).free) < needed:
        raise _disk_full(path, needed, free)
    # In the same folder, because a rename is only whole or not at all within one file system.
    unfinished = folder / f".hywu-{secrets.token_hex(8)}.part"
    try:
        with open(unfinished, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        if error.errno in _NO_SPACE:
            there = unfinished.stat().st_size if unfinished.exists() else 0
            raise _disk_full(path, needed, shutil.disk_usage(folder).free + there) from error
        raise LoRAError(f"cannot save {path}: {error.strerror or error}; save to another folder") from error
    finally:
        unfinished.unlink(missing_ok=True)
    _sync_folder(folder)


def check_folder(path: Path) -> None:
    """Raises LoRAError if there is no folder for the file, before anything is computed for it."""
    if not path.parent.is_dir():
        raise LoRAError(f"cannot save {path}: the folder {path.parent} does not exist; create it or save elsewhere")


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
