"""The metadata of a LoRA file: what is written there, and reading it without trusting it.

Every value is a text, as safetensors wants it. A file of version 1 holds the matrices as they are; readers of version 1 ignore
the keys that came later (``made``, ``digest``, ``stored``, ``error``, ``thumbnail``), so such a file stays version 1. Version 2
is what they would read wrongly: fp8, dropped experts, weights of ranks.

    format version rank alpha targets backbone_fingerprint generator_fingerprint instruction thinking picture_digests seed
    made                  how the LoRA was made of others
    digest                sha256 of what a reader gets (``LoRA.digest``), as the writer saw it
    stored, error         form of the matrices, and the relative error of the update that this costs
    kept, experts         version 2: the experts of each layer that are there, and of how many
    rank_weights          version 2: one number a rank
    thumbnail             a small JPEG or WebP, base64
    sketch                the update as a short vector (``sketch.py``)
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from ..checkpoint.shard_file import NAMES
from ..errors import LoRAError
from .algebra import NOTE_LENGTH
from .stored import AS_IT_IS, MAX_EXPERTS, STORED, Field, Form
from .value import LoRA, Provenance

FORMAT = "hywu-lora"
FINGERPRINT_LENGTH = 200  # characters; ours have 16
VERSIONS = ("1", "2")
ORIGIN = ("backbone_fingerprint", "generator_fingerprint", "instruction", "thinking", "picture_digests", "seed", "made")
NO_DIGEST, NO_ERROR = "0" * 64, f"{0:.6e}"  # as long as any: the true ones are known when all is written
_DIGEST = re.compile(r"[0-9a-f]{64}")
Metadata = Mapping[str, str]


def metadata_for(lora: LoRA, form: Form, thumbnail: str | None = None, sketch: str | None = None) -> dict[str, str]:
    """The metadata of ``lora`` stored in ``form``. A LoRA as it was generated, without a thumbnail, gets exactly what version 1
    always held; all others also places for digest and error (``settled``)."""
    origin, weighted = lora.provenance, set(lora.rank_weights) != {1.0}
    old = form.plain and not weighted
    found = {
        "format": FORMAT, "version": VERSIONS[0] if old else VERSIONS[1], "rank": str(lora.rank), "alpha": repr(lora.alpha),
        "targets": json.dumps([target.name for target in lora.targets]),
        "backbone_fingerprint": origin.backbone_fingerprint, "generator_fingerprint": origin.generator_fingerprint,
        # A lone surrogate (from a broken paste) has no UTF-8 form; better a "?" in the note than a finished LoRA lost.
        "instruction": _utf8(origin.instruction), "thinking": _utf8(origin.thinking),
        "picture_digests": json.dumps(list(origin.picture_digests)), "seed": str(origin.seed)}
    if old and form.stored == AS_IT_IS and not origin.made and thumbnail is None and sketch is None:
        return found
    found |= {"digest": NO_DIGEST, "stored": form.stored, "error": NO_ERROR}
    if origin.made:
        found["made"] = _utf8(origin.made)
    if thumbnail is not None:
        found["thumbnail"] = thumbnail
    if sketch is not None:
        found["sketch"] = sketch
    if weighted:
        found["rank_weights"] = json.dumps(lora.rank_weights)
    if form.kept is not None:
        found |= {"kept": json.dumps(form.kept, separators=(",", ":")),
                  "experts": str(max(target.experts for target in lora.targets))}
    return found


def settled(metadata: dict[str, str], digest: str, error: float) -> dict[str, str]:
    """The same with the true digest and error, if it has places for them, and exactly as long."""
    return metadata | {key: value for key, value in {"digest": digest, "error": f"{error:.6e}"}.items() if key in metadata}


def header_bytes(metadata: Metadata, fields: Mapping[str, Field], offsets: Mapping[str, tuple[int, int]]) -> bytes:
    """The safetensors header: length, then JSON padded to a multiple of 8 bytes, the tensors in the order of ``fields``."""
    entries: dict[str, Any] = {"__metadata__": metadata} | {
        name: {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": list(offsets[name])}
        for name, (dtype, shape) in fields.items()}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def checked_metadata(metadata: Metadata, names: list[str], path: object) -> Metadata:
    """Raises LoRAError unless it is a HY-WU LoRA's, of a version that is read here."""
    if metadata.get("format") != FORMAT:
        raise LoRAError(f"{path} is no HY-WU LoRA: its format is {shown(metadata.get('format'), 80)}, expected {FORMAT!r}; it "
                        f"holds {len(names)} tensors such as {shown(sorted(names)[:2], 200)}. Choose a file that HY-WU saved")
    if metadata.get("version") not in VERSIONS:
        raise LoRAError(f"{path} has version {shown(metadata.get('version'), 40)} of the LoRA format, this program reads "
                        f"version {' and '.join(map(repr, VERSIONS))}; update ComfyUI-HYWU or generate the LoRA again")
    return metadata


def provenance(metadata: Metadata, path: object) -> Provenance:
    """Raises LoRAError for a missing key or one of the wrong kind."""
    seed = _text(metadata, "seed", path)
    if not re.fullmatch(r"-?[0-9]{1,39}", seed):
        raise LoRAError(f"{path}: the metadata says seed {seed[:40]!r}, expected a whole number; generate the LoRA again")
    made = metadata.get("made", "")
    prints = {}
    for key in ("backbone_fingerprint", "generator_fingerprint"):
        prints[key] = _text(metadata, key, path)
        if len(prints[key]) > FINGERPRINT_LENGTH:  # it stands in messages
            raise LoRAError(f"{path}: the metadata's {key} has {len(prints[key])} characters, expected at most "
                            f"{FINGERPRINT_LENGTH}; generate the LoRA again")
    return Provenance(
        **prints,
        instruction=_text(metadata, "instruction", path), thinking=_text(metadata, "thinking", path),
        picture_digests=tuple(names_in(metadata, "picture_digests", path)), seed=int(seed), made=made[:NOTE_LENGTH])


def form_in(metadata: Metadata, dtype, path: object) -> Form:
    """How the file's matrices are stored. dtype: of what a reader gets.

    Raises:
        LoRAError: an unknown form, dropped experts that cannot be, or a version 1 that would be none.
    """
    stored = metadata.get("stored", AS_IT_IS)
    if stored not in STORED:
        raise LoRAError(f"{path} is stored as {shown(stored, 40)}, known are {', '.join(map(repr, STORED))}; update "
                        "ComfyUI-HYWU")
    kept = None
    if "kept" in metadata or "experts" in metadata:
        found, experts = _json(metadata, "kept", path), expert_count(metadata, path)
        if not isinstance(found, list) or not found or not all(_increasing(row, experts) for row in found) or not any(found):
            raise LoRAError(f"{path}: the metadata says that the experts {shown(found, 80)} were kept, expected for each layer "
                            f"numbers below {experts} in order; the LoRA is damaged, copy or generate it again")
        kept = tuple(tuple(row) for row in found)
    form = Form(stored, dtype, kept)
    if metadata["version"] == VERSIONS[0] and not (form.plain and "rank_weights" not in metadata):
        raise LoRAError(f"{path} says version {VERSIONS[0]!r} but is packed as only version {VERSIONS[1]!r} is; generate the "
                        "LoRA again")
    return form


def expert_count(metadata: Metadata, path: object) -> int:
    text = _text(metadata, "experts", path)
    if not re.fullmatch(r"[1-9][0-9]{0,3}", text) or int(text) > MAX_EXPERTS:
        raise LoRAError(f"{path}: the metadata says {text[:40]!r} experts, expected 1 to {MAX_EXPERTS}; generate the LoRA "
                        "again")
    return int(text)


def rank_weights(metadata: Metadata, path: object) -> tuple[float, ...] | None:
    if "rank_weights" not in metadata:
        return None
    found = _json(metadata, "rank_weights", path)
    if not isinstance(found, list) or not all(type(weight) in (int, float) and abs(weight) < 1e300 for weight in found):
        raise LoRAError(f"{path}: the metadata says rank_weights {shown(found, 80)}, expected a list of finite numbers; "
                        "generate the LoRA again")
    return tuple(map(float, found))


def digest(metadata: Metadata) -> str | None:
    """The digest as the file's writer says it; None if the file has none."""
    found = metadata.get("digest", "")
    return found if _DIGEST.fullmatch(found) and found != NO_DIGEST else None


def error(metadata: Metadata) -> float | None:
    """The relative error as the file's writer says it; None if it says none, or nonsense."""
    found = metadata.get("error", "")
    if not re.fullmatch(r"[0-9]\.[0-9]{6}e[+-][0-9]{2,3}", found) or not math.isfinite(float(found)):
        return None
    return float(found)


def number(metadata: Metadata, key: str, path: object) -> float:
    text = _text(metadata, key, path)
    try:
        return float(text)
    except ValueError:
        raise LoRAError(f"{path}: the metadata says {key} {text[:40]!r}, expected a number; generate the LoRA again") from None


def names_in(metadata: Metadata, key: str, path: object) -> list[str]:
    value = _json(metadata, key, path)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise LoRAError(f"{path}: the metadata says {key} {metadata[key][:80]!r}, expected a list of names; generate the LoRA "
                        "again")
    return value


def shown(value: object, length: int) -> str:
    """A value of unknown origin for a message: quoted, control characters escaped, cut."""
    text = repr(value[:length] if isinstance(value, str) else value)
    return text if len(text) <= length + 2 else text[:length] + "…"


def _increasing(row: Any, limit: int) -> bool:
    return (isinstance(row, list) and all(type(expert) is int and 0 <= expert < limit for expert in row)
            and all(left < right for left, right in zip(row, row[1:], strict=False)))


def _json(metadata: Metadata, key: str, path: object) -> Any:
    try:
        return json.loads(_text(metadata, key, path))
    except (ValueError, RecursionError):  # bad JSON, numbers of thousands of digits
        return None


def _text(metadata: Metadata, key: str, path: object) -> str:
    if key not in metadata:
        raise LoRAError(f"{path}: the metadata has no '{key}', it has {shown(sorted(metadata), 400)}; generate the LoRA again")
    return metadata[key]


def _utf8(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


