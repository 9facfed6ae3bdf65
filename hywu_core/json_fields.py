"""Fields of a JSON object from disk: reading the file, and refusing values of the wrong kind by key.

Everything here is untrusted input. What the fields mean is ``config.py``'s business.
"""

import json
from pathlib import Path
from typing import Any

from .errors import CheckpointError


def read_text(path: Path) -> str:
    """A text file of a checkpoint. Raises CheckpointError if it is missing, unreadable or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the folder is no complete checkpoint; download it again") from None
    except OSError as error:  # the folder is a file, the file is a folder, or it may not be read
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): give the folder that holds it") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 ({error}): download it again") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object from ``path``.

    Raises:
        CheckpointError: the file is missing, is not JSON, or holds something else than an object.
    """
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, numbers of thousands of digits
        raise CheckpointError(f"{path} is not valid JSON ({error}): download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a JSON object: download it again")
    return value


def require(raw: dict[str, Any], key: str, where: str) -> Any:
    if raw.get(key) is None:
        raise CheckpointError(f"{where} has no value for '{key}': it is not a HunyuanImage-3 / HY-WU configuration")
    return raw[key]


def check_counts(raw: dict[str, Any], keys: tuple[str, ...], where: str, least: int = 1) -> None:
    """Whole numbers of at least ``least``, or lists of them, wherever a key has a value: sizes come from an untrusted file."""
    for key in keys:
        value = raw.get(key)
        for entry in value if isinstance(value, list) else [value]:
            if entry is not None and (type(entry) is not int or entry < least):
                raise CheckpointError(f"{where}: '{key}' is {str(value)[:60]!r}, expected whole numbers of at least {least}: "
                                      "download the file again")


def check_single(raw: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    """One number, not a list, wherever a key has a value."""
    for key in keys:
        if isinstance(raw.get(key), list):
            raise CheckpointError(f"{where}: '{key}' is a list of {len(raw[key])}, expected 1 number: download the file again")


def check_lists(raw: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    """Lists that hold something, wherever a key has a value."""
    for key in keys:
        if raw.get(key) is not None and (not isinstance(raw[key], list) or not raw[key]):
            raise CheckpointError(f"{where}: '{key}' is {str(raw[key])[:60]!r}, expected a list with entries: download the "
                                  "file again")


def check_objects(raw: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    """JSON objects that hold something, wherever a key has a value."""
    for key in keys:
        if raw.get(key) is not None and (not isinstance(raw[key], dict) or not raw[key]):
            raise CheckpointError(f"{where}: '{key}' is {str(raw[key])[:60]!r}, expected an object with entries: download the "
                                  "file again")


def count(raw: dict[str, Any], key: str, where: str) -> int:
    check_counts(raw, (key,), where)
    check_single(raw, (key,), where)
    return require(raw, key, where)
