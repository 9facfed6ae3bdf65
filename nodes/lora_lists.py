"""What the nodes for LoRA files offer to choose from: each LoRA once, and the PEFT folders; and what they may show of a file.

The model folders themselves are ``host.py``'s.
"""

import json
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..hywu_core.errors import LoRAError
from ..hywu_core.lora.files import read_summary
from ..hywu_core.lora.peft_config import CONFIG
from ..hywu_core.lora.value import Provenance
from . import host

ALL = "all"  # of the choices of folders
MAX_DEPTH = 4  # of a PEFT folder below a model folder
SHOWN = 300  # characters of an instruction on a node
_digests: dict[Path, tuple[tuple[int, int], str | None]] = {}  # by path: (size, time) and what the header said then


def lora_choices() -> list[str]:
    """``host.lora_names`` with each LoRA once: of files whose headers name the same digest the first. Fresh at every call."""
    chosen, seen = [], set()
    for name in host.lora_names():
        digest = _digest(name)
        if digest is None or digest not in seen:
            chosen.append(name)
        seen.add(digest)
    return chosen


def _digest(name: str) -> str | None:
    """What the file's header says; None where it says nothing or cannot be read: then loading it by name says why."""
    try:
        path = host.lora_path(name)
        status = path.stat()
        state = status.st_size, status.st_mtime_ns
        if _digests.get(path, (None, None))[0] != state:
            _digests[path] = state, read_summary(path).digest
    except (LoRAError, OSError):
        return None
    return _digests[path][1]


# ---- folders of LoRA files


def folder_inputs() -> list[io.Input]:
    """Which folder's LoRAs, and which of them."""
    return [
        io.Combo.Input("folder", options=folder_choices(),
                       tooltip="all: every saved LoRA. Otherwise those below one folder of output/hywu_loras or "
                               "models/hywu_loras."),
        io.String.Input("filter", default="",
                        tooltip="Only LoRAs whose instruction or file name holds all of these words; empty for all."),
    ]


def folder_choices() -> list[str]:
    """ALL and every folder below the LoRA folders that holds LoRA files, fresh at every call."""
    return [ALL, *host.lora_folders()]


def check_folder(folder: str) -> bool | str:
    """For ``validate_inputs``: True, or which folders there are."""
    known = folder_choices()
    return True if folder in known else f"there is no folder {folder[:SHOWN]!r} with LoRAs, only {', '.join(known)}"


def files_below(folder: str) -> dict[str, Path]:
    """Saved LoRAs by name: all, or those below a folder."""
    return {name: host.lora_path(name) for name in sorted(host.lora_names())
            if folder == ALL or Path(name).as_posix().startswith(f"{folder}/")}


def folder_fingerprint(folder: str) -> str:
    """Changes when a file comes, goes or changes."""
    states = {name: path.stat() for name, path in files_below(folder).items()}
    return json.dumps([(name, state.st_size, state.st_mtime_ns) for name, state in states.items()])


# ---- PEFT folders


def peft_names() -> list[str]:
    """Names of all PEFT folders below the LoRA folders, relative to them, fresh at every call."""
    return list({folder.relative_to(root).as_posix(): None for root in _roots()
                 for folder in host.folders_with(CONFIG, root, MAX_DEPTH, itself=False)})


def _roots() -> list[Path]:
    return [Path(path) for path in folder_paths.get_folder_paths(host.LORAS)]


def peft_folder(name: str) -> Path:
    """The folder of a listed name.

    Raises:
        LoRAError: no LoRA folder holds it (all are named), or the name climbs out of them.
    """
    # A drive letter or a backslash leads elsewhere on Windows only; refusing them everywhere keeps graphs portable.
    if not name or Path(name).is_absolute() or ".." in Path(name).parts or any(mark in name for mark in "\\:\0"):
        raise LoRAError(f"the PEFT folder {name[:SHOWN]!r} must be the name of a folder below {_roots()[0]}")
    places = [root / name for root in _roots()]
    for place in places:
        if (place / CONFIG).is_file():
            return place
    raise LoRAError(f"{name[:SHOWN]} is missing: looked for {CONFIG} in {', '.join(map(str, places))}")


def check_peft(name: str) -> bool | str:
    """For ``validate_inputs``: True, or what is missing and where it was looked for."""
    try:
        peft_folder(name)
    except LoRAError as error:
        return str(error)
    return True


# ---- texts of files


def told(origin: Provenance) -> str:
    """A line about where a LoRA comes from, as a node may show it: short, and no markup whatever the file says."""
    parts = [inert(origin.instruction), inert(origin.made) and f"({inert(origin.made)})"]
    return " ".join(filter(None, parts)) or "a LoRA without an instruction"


def inert(text: str) -> str:
    # The front end makes HTML of a node's text; what looks like a bracket to a reader is none to it.
    shown = "".join(mark if mark.isprintable() else " " for mark in text[:SHOWN]).translate(
        {ord("<"): "‹", ord(">"): "›", ord("&"): "＆"})
    return shown + "…" if len(text) > SHOWN else shown
