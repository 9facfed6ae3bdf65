"""LoRA files: one safetensors file per LoRA, its provenance in the metadata.

Owns writing (whole or not at all) and reading (nothing on the disk is trusted). In which form matrices are stored is
``stored.py``'s, what the metadata holds ``header.py``'s, what makes a set of tensors a LoRA ``value.py``'s; where files may lie
is decided by the caller.

The file is written here and not by ``safetensors.save_file``, which puts the metadata in an order that differs from run to run
(the same LoRA gives the same bytes) and wants all tensors at once. The header is read with the library, whose parser has seen
more hostile ones than ours; the values as a checkpoint's are, straight to where they stay.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from ..checkpoint.load import read_tensors
from ..checkpoint.shards import Shards, read_header
from ..errors import CheckpointError, LoRAError
from ..progress import Tick, silent
from . import header
from .aside import check_folder, written_whole
from .frame import fields_for, keys, offsets_for, read_frame
from .spectrum import Loss, pieces
from .stored import AS_IT_IS, Form, form_for
from .thumbnail import thumbnail_bytes, thumbnail_text
from .value import Derived, LoRA, Provenance, digest_of, raw_bytes


@dataclass(frozen=True)
class Saved:
    """What was written. error: ‖ΔW - ΔW'‖ / ‖ΔW‖ of the whole update, measured; digest: of what a reader gets; experts: (kept,
    of how many) over all layers."""

    path: Path
    nbytes: int
    error: float
    digest: str
    experts: tuple[int, int]

    @property
    def text(self) -> str:
        """Size, error and kept experts in a line."""
        kept, experts = self.experts
        size = f"{self.nbytes / 1e9:.2f} GB" if self.nbytes >= 1e9 else f"{self.nbytes / 1e6:.1f} MB"
        lost = f"relative error of the update {self.error:.3%}" if self.error else "no error"
        return f"{size}, {lost}" + (f", {kept} of {experts} experts kept" if kept < experts else "")


def save_lora(
    lora: LoRA, path: Path, on_tick: Tick = silent, *, stored: str = AS_IT_IS, keep: float = 1.0,
    picture: Image.Image | None = None, sketch: str | None = None,
) -> Saved:
    """Write ``lora`` to ``path``, replacing a file of that name; after any failure the old state is there.

    In memory is one layer at a time. Ticks per matrix, and where experts are to be ranked first once for each of its pairs.

    Args:
        stored: one of ``stored.STORED``.
        keep: the share of the experts' energy that is kept; experts beyond it are left out and read as zeros.
        picture: a small version of it goes into the file.
        sketch: of ``sketch.py``, goes into the file as it is.

    Raises:
        RequestError: no such format or share.
        LoRAError: the folder is missing or cannot be written, the disk is too full (with the bytes needed and free), or values
            that fp8 or bfloat16 cannot hold.
    """
    path = Path(path)
    check_folder(path)
    before = lora.num_layers * len(lora.targets) if keep < 1 else 0
    total = before + 2 * lora.num_layers * len(lora.targets)
    form = form_for(lora, stored, keep, lambda done, _, latent: on_tick(done, total, latent))
    metadata = header.metadata_for(lora, form, None if picture is None else thumbnail_text(picture), sketch)
    fields = fields_for(lora, form)
    offsets = offsets_for(fields)
    start = len(header.header_bytes(metadata, fields, offsets))
    needed = start + max(end for _, end in offsets.values())
    written = _Written(lora, form, lambda done: on_tick(before + done, total, None))
    with written_whole(path, needed) as file:
        digest = digest_of(lora.alpha, lora.rank_weights, written.into(file, start, offsets))
        file.seek(0)
        file.write(header.header_bytes(header.settled(metadata, digest, written.loss.error), fields, offsets))
    experts = lora.num_layers * max(target.experts for target in lora.targets)
    return Saved(path, needed, written.loss.error, digest,
                 (experts if form.kept is None else sum(map(len, form.kept)), experts))


def load_lora(path: Path, on_tick: Tick = silent) -> LoRA:
    """Read a LoRA file that ``save_lora`` wrote, onto the CPU, every value checked. Ticks count MB.

    fp8 comes back as bfloat16 and dropped experts as zeros, made each time they are asked for.

    Raises:
        LoRAError: there is no such file, it is cut off or damaged, was not written by HY-WU or by a newer version, or its
            tensors make no LoRA.
    """
    path = Path(path)
    with _opened(path) as file:
        frame, form, metadata = read_frame(file, path)
    try:
        # Not through the library: its mapped pages and their copies together are twice the file.
        entries = read_header(path)
        tensors = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in entries.items()}
        read_tensors(tensors, Shards(path.parent, entries), on_tick)
    except CheckpointError as error:
        raise LoRAError(f"{str(error)[:1000]}, or generate the LoRA again") from None
    if form.plain:
        return _true_to(metadata, replace(frame, tensors=MappingProxyType({key: tensors[key] for key in frame.tensors})), path)
    places = {key: (layer, shape) for key, layer, shape in keys(frame)}

    def make(key: str) -> torch.Tensor:
        return form.unpack(key, *places[key], tensors)

    # What is there, not what is asked for later: a few kept experts may stand for thousands.
    there = replace(form, kept=None)
    for key, (layer, _) in places.items():
        if key in tensors and (wrong := int((~torch.isfinite(there.unpack(key, layer, tensors[key].shape, tensors))).sum())):
            raise LoRAError(f"{path}: {key} holds NaN or Inf in {wrong} of {tensors[key].numel()} values, expected none; the "
                            "LoRA is damaged, copy or generate it again")
    return _true_to(metadata, replace(frame, tensors=Derived(tuple(places), make)), path)


def _true_to(metadata: Mapping[str, str], lora: LoRA, path: Path) -> LoRA:
    """The LoRA, if it is what the file says. Raises LoRAError."""
    said = header.digest(metadata)
    if said is not None and said != lora.digest:
        raise LoRAError(f"{path}: its LoRA should have the digest {said[:16]}…, the values have {lora.digest[:16]}…; it is "
                        "damaged, copy or generate it again")
    return lora


@dataclass(frozen=True, eq=False)
class Summary:
    """What the header of a LoRA file says; digest, error, sketch and thumbnail as whoever wrote it claims."""

    frame: LoRA  # the LoRA with zeros for its values
    form: Form
    nbytes: int  # of the whole file
    digest: str | None
    error: float | None
    sketch: str | None  # as ``sketch.sketch_text`` wrote it, or anything
    _thumbnail: str | None

    @property
    def provenance(self) -> Provenance:
        return self.frame.provenance

    @cached_property
    def thumbnail(self) -> bytes | None:
        """A JPEG or WebP of at most 256 pixels a side, tried out; None if there is none or what is there is no picture."""
        return thumbnail_bytes(self._thumbnail)


def read_summary(path: Path) -> Summary:
    """What stands in the header of a LoRA file; no value is read.

    Raises:
        LoRAError: as ``load_lora``, as far as the header shows it.
    """
    path = Path(path)
    with _opened(path) as file:
        frame, form, metadata = read_frame(file, path)
    return Summary(frame, form, path.stat().st_size, header.digest(metadata), header.error(metadata), metadata.get("sketch"),
                   metadata.get("thumbnail"))


def asked_for(summaries: Iterable[tuple[str, Summary]], wanted: str) -> Iterator[tuple[str, Summary]]:
    """Of named files those whose instruction or name holds all words of ``wanted``, each LoRA once: of files whose headers name
    the same digest the first."""
    seen: set[str | None] = set()
    for name, summary in summaries:
        if summary.digest not in seen and matches(wanted, name, summary.provenance.instruction):
            seen |= {summary.digest} - {None}
            yield name, summary


def matches(wanted: str, name: str, instruction: str) -> bool:
    """Whether name and instruction hold every word of ``wanted``, in any case."""
    text = f"{instruction} {name}".casefold()
    return all(word in text for word in wanted.casefold().split())


def read_provenance(path: Path) -> Provenance:
    """What a LoRA file was written from, out of its header alone.

    Raises:
        LoRAError: as ``load_lora``, as far as the header shows it.
    """
    with _opened(Path(path)) as file:
        return header.provenance(header.checked_metadata(file.metadata() or {}, list(file.keys()), path), path)


# ---- writing


class _Written:
    """The matrices of a LoRA on their way into a file: each is asked for once, a layer is in memory at a time."""

    def __init__(self, lora: LoRA, form: Form, on_matrix: Callable[[int], None]):
        self._lora, self._form, self._on_matrix, self.loss = lora, form, on_matrix, Loss()

    def into(self, file: BinaryIO, start: int, offsets: Mapping[str, tuple[int, int]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Write each matrix to its place, and yield what a reader gets of it."""
        lossy = not self._form.plain or self._form.dtype != self._lora.dtype
        done = 0
        layers: dict[int, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
        for key, layer, shape in keys(self._lora):
            matrix = self._lora.tensors[key].detach().cpu()
            parts = self._form.pack(key, layer, matrix)
            for name, part in parts.items():
                file.seek(start + offsets[name][0])
                file.write(raw_bytes(part))
            got = self._form.unpack(key, layer, shape, parts)
            if lossy:
                self._measure(layers.setdefault(layer, {}), layer, key, matrix, got)
            done += 1
            self._on_matrix(done)
            yield key, got

    def _measure(self, waiting: dict, layer: int, key: str, matrix: torch.Tensor, got: torch.Tensor) -> None:
        """Add the loss of a target as soon as both of its sides are there."""
        name, side = key.removeprefix(f"{self._lora.prefix}{layer}.").rsplit(".lora_", 1)
        if side == "A":
            waiting[name] = matrix, got
            return
        target = next(target for target in self._lora.targets if target.name == name)
        (a, got_a), scale_R, rank = waiting.pop(name), self._lora.scale_R, self._lora.rank
        for true, kept in zip(pieces(layer, target, a, matrix, scale_R, rank), pieces(layer, target, got_a, got, scale_R, rank),
                              strict=True):
            self.loss.add(true, kept)


# ---- reading


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file whose header has been checked against its size."""
    if not path.is_file():
        raise LoRAError(f"{path} is not there or no file; choose a LoRA file that exists")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise LoRAError(f"{path} ({path.stat().st_size} bytes) is cut off, damaged or no safetensors file "
                        f"({str(error)[:300]}); copy it again or generate the LoRA again") from None
    except OSError as error:
        raise LoRAError(f"{path} cannot be read: {error}; check that the file may be read") from error
