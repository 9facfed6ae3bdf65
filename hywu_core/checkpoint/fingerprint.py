"""A short name for the weights of a checkpoint, so that a LoRA can say which backbone it was written for.

Owns which tensors identify a checkpoint and how they are hashed. Only small tensors that every stored format keeps unquantised
are read (norms, routers, embedders), so the fingerprint costs megabytes and does not depend on sharding, file names, or whether
the same values are stored as bf16 or fp32. Of the published backbone that is 141 MB out of hundreds of places, so it is kept in
a file beside the index, which counts as long as every shard has the size and the time of change that it had then.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from fnmatch import fnmatchcase

import torch

from ..errors import CheckpointError, RequestError
from ..json_fields import read_json
from .shard_file import write_file
from .shards import Shards

log = logging.getLogger("hywu")

BACKBONE_PATTERNS = ("*layernorm.weight", "model.ln_f.weight", "*.gate.wg.weight",
                     "timestep_emb.*", "time_embed.*", "time_embed_2.*")
# SigLIP2's pooling head has a layernorm, too, and not every copy of the backbone carries the head.
BACKBONE_EXCEPT = "vision_model.*"
DIGITS = 16
KEPT = "hywu_fingerprint.json"
KEPT_FROM_BYTES = 16 << 20  # what is read faster than a file is worth is not kept
GENERATOR_PATTERNS = ("*norm*.weight", "*.bias", "*layer_pos.weight")


def fingerprint(shards: Shards, names: Callable[[str], bool]) -> str:
    """``DIGITS`` hex digits over names, shapes and fp32 values of the stored tensors that ``names`` selects.

    Taken from the file that keeps it, or written there if many bytes had to be read; a folder that cannot be written does not
    matter.

    Raises:
        CheckpointError: nothing is selected, a selected tensor is not of a float dtype, or its file is cut off.
    """
    chosen = sorted(name for name in shards.entries if names(name))
    if not chosen:
        raise CheckpointError(f"{shards.folder} holds none of the tensors that identify a checkpoint (of "
                              f"{len(shards.entries)}): it is no HunyuanImage-3 backbone or HY-WU generator")
    large = sum(shards.entries[name].nbytes for name in chosen) >= KEPT_FROM_BYTES
    if large and (kept := _kept(shards, chosen)) is not None:
        return kept
    found = _computed(shards, chosen)
    if large:
        _keep(shards, chosen, found)
    return found


def _computed(shards: Shards, chosen: list[str]) -> str:
    digest = hashlib.sha256()
    for name in chosen:
        entry = shards.entries[name]
        if not entry.dtype.is_floating_point:
            raise CheckpointError(f"{entry.file}: '{name}' is stored as {entry.dtype}, expected a float dtype: use the "
                                  f"published bf16 folder")
        stored = torch.empty(entry.nbytes // entry.dtype.itemsize, dtype=entry.dtype)
        with open(entry.file, "rb") as handle:
            handle.seek(entry.offset)
            count = handle.readinto(memoryview(stored.view(torch.uint8).numpy())) if entry.nbytes else 0
        if count != entry.nbytes:
            raise CheckpointError(f"{entry.file} is cut off: '{name}' needs {entry.nbytes} bytes, {count} are there; download "
                                  f"it again")
        digest.update(f"{name}{list(entry.shape)}\n".encode())
        digest.update(stored.float().numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()[:DIGITS]


def _state(shards: Shards, chosen: list[str]) -> dict:
    """What must be the same for a kept fingerprint to count: which tensors it is of, and the files as they were."""
    files: dict[str, list[int]] = {}
    for entry in shards.entries.values():  # each file ends with its last tensor
        size, _ = files.get(entry.file.name, (0, 0))
        files[entry.file.name] = [max(size, entry.offset + entry.nbytes), entry.time_ns]
    return {"tensors": hashlib.sha256("\n".join(chosen).encode()).hexdigest(), "files": files}


def _kept(shards: Shards, chosen: list[str]) -> str | None:
    file = shards.folder / KEPT
    if not file.is_file():
        return None
    try:
        found = read_json(file)
    except CheckpointError as error:
        log.warning("HY-WU: %s; the fingerprint is computed and kept anew", error)
        return None
    kept = found.pop("fingerprint", None)
    sound = isinstance(kept, str) and len(kept) == DIGITS and not set(kept) - set("0123456789abcdef")
    return kept if sound and found == _state(shards, chosen) else None


def _keep(shards: Shards, chosen: list[str], found: str) -> None:
    text = json.dumps({"fingerprint": found} | _state(shards, chosen), indent=1)
    try:
        write_file(shards.folder / KEPT, text.encode())
    except RequestError as error:  # a read-only folder, a full disk
        log.info("HY-WU: the fingerprint of %s is not kept: %s", shards.folder, error)


def backbone_fingerprint(shards: Shards) -> str:
    """The fingerprint of a backbone folder: its decoder norms, routers and time embedders."""
    return fingerprint(shards, lambda name: not fnmatchcase(name, BACKBONE_EXCEPT)
                       and any(fnmatchcase(name, pattern) for pattern in BACKBONE_PATTERNS))


def generator_fingerprint(shards: Shards) -> str:
    """The fingerprint of a generator folder: its norms, biases and layer positions."""
    return fingerprint(shards, lambda name: any(fnmatchcase(name, pattern) for pattern in GENERATOR_PATTERNS))
