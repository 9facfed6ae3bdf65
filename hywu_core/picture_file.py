"""Picture files that commands write: the name is checked before minutes of work, the file is whole or not at all."""

import os
import tempfile
from pathlib import Path

from .errors import RequestError


def check_picture(path: Path) -> None:
    """Refuse a file that could not be written, before minutes of work. Raises RequestError."""
    from PIL import Image

    # Pillow can read more formats than it can write.
    if path.suffix.lower() not in Image.registered_extensions() or _format(path) not in Image.SAVE:
        raise RequestError(f"{path}: '{path.suffix}' names no picture format; end the name in .png, .jpg or .webp")
    check_place(path)


def check_place(path: Path) -> None:
    """Refuse a name that no file can have, before minutes of work. Raises RequestError."""
    if "\0" in str(path):
        raise RequestError(f"{str(path)!r}: a file name cannot hold a NUL byte; choose another name")
    if not path.absolute().parent.is_dir():
        raise RequestError(f"{path}: the folder {path.absolute().parent} is not there; make it first")
    if path.is_dir():
        raise RequestError(f"{path} is a folder; give the name of a file in it")
    if not os.access(path.absolute().parent, os.W_OK):
        raise RequestError(f"{path}: nothing may be written into {path.absolute().parent}; choose another folder")


def save_picture(picture, path: Path) -> None:
    """Write the picture whole or not at all. Raises RequestError if the disk refuses."""
    try:
        handle, scratch = tempfile.mkstemp(dir=path.absolute().parent, prefix=".hywu-", suffix=path.suffix)
    except OSError as error:
        raise RequestError(f"{path} could not be written ({error}): choose another folder") from None
    try:
        with os.fdopen(handle, "wb") as file:
            picture.save(file, format=_format(path))
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read; a picture is an ordinary file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(scratch, 0o666 & ~umask)
        os.replace(scratch, path)
    except OSError as error:
        raise RequestError(f"{path} could not be written ({error}): free some space or choose another folder") from None
    finally:
        Path(scratch).unlink(missing_ok=True)


def _format(path: Path) -> str:
    from PIL import Image

    return Image.registered_extensions()[path.suffix.lower()]
