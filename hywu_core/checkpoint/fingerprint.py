"""A short name for the weights of a checkpoint, so that a LoRA can say which backbone it was written for.

Owns which tensors identify a checkpoint and how they are hashed. Only small tensors that every stored format keeps unquantised
are read (norms, routers, embedders), so the fingerprint costs megabytes and does not depend on sharding, file names, or whether
the same values are stored as bf16 or fp32.
"""

import hashlib
from collections.abc import Callable
from fnmatch import fnmatchcase

import torch

from ..errors import CheckpointError
from .shards import Shards

BACKBONE_PATTERNS = ("*layernorm.weight", "model.ln_f.weight", "*.gate.wg.weight",
                     "timestep_emb.*", "time_embed.*", "time_embed_2.*")
# SigLIP2's pooling head has a layernorm, too, and not every copy of the backbone carries the head.
BACKBONE_EXCEPT = "vision_model.*"
GENERATOR_PATTERNS = ("*norm*.weight", "*.bias", "*layer_pos.weight")


def fingerprint(shards: Shards, names: Callable[[str], bool]) -> str:
    """16 hex digits over names, shapes and fp32 values of the stored tensors that ``names`` selects.

    Raises:
        CheckpointError: nothing is selected, a selected tensor is not of a float dtype, or its file is cut off.
    """
    chosen = sorted(name for name in shards.entries if names(name))
    if not chosen:
        raise CheckpointError(f"{shards.folder} holds none of the tensors that identify a checkpoint (of "
                              f"{len(shards.entries)}): it is no HunyuanImage-3 backbone or HY-WU generator")
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
    return digest.hexdigest()[:16]


def backbone_fingerprint(shards: Shards) -> str:
    """The fingerprint of a backbone folder: its decoder norms, routers and time embedders."""
    return fingerprint(shards, lambda name: not fnmatchcase(name, BACKBONE_EXCEPT)
                       and any(fnmatchcase(name, pattern) for pattern in BACKBONE_PATTERNS))


def generator_fingerprint(shards: Shards) -> str:
    """The fingerprint of a generator folder: its norms, biases and layer positions."""
    return fingerprint(shards, lambda name: any(fnmatchcase(name, pattern) for pattern in GENERATOR_PATTERNS))
