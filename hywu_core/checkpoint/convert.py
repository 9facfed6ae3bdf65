"""A smaller copy of a backbone folder: the projections of its decoder layers packed, all else byte for byte as it was.

Owns what is packed, the order of the work and the manifest; how a shard gets onto the disk is ``shard_file.py``'s, how a weight
is packed ``formats.py``'s. A layer becomes a shard, in the native HunyuanImage-3 pack's names, so one reader (``packed.py``)
reads both. One matrix is in memory at a time. A run that was killed goes on where it was: shards that are there and have the
SHA-256 that the manifest says are kept, and the index comes last, so an unfinished folder is no checkpoint.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import BackboneConfig
from ..errors import CheckpointError, RequestError
from ..json_fields import read_json
from ..progress import Tick, silent
from .fingerprint import KEPT, backbone_fingerprint
from .formats import FORMATS, Codec, codec
from .load import read_tensors, refuse_foreign_formats, usable_device
from .packed import LINEAR, PARAMETERS, QUANT
from .shard_file import LEFTOVERS, Planned, ShardFile, free_bytes, plan_header, sha256, write_file
from .shards import INDEX_SUFFIX, MANIFEST, Shards, open_shards

VERSION = 1  # of what is written; a folder begun by another version is not continued
INDEX = "model" + INDEX_SUFFIX
GENERATOR_TYPE = "parameter_generator"
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
STACKED = {parameter: stored for stored, parameter in PARAMETERS.items()}
MB = 1 << 20


@dataclass(frozen=True)
class Weight:
    """One weight to pack: ``stored`` is its module's name in the file, ``sources`` the published tensors, one an expert."""

    stored: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]  # (O, I) or (E, O, I)
    codec: Codec

    @property
    def experts(self) -> int:
        return self.shape[0] if len(self.shape) == 3 else 0


@dataclass(frozen=True)
class ShardPlan:
    """What one shard will hold: weights to pack, and tensors to copy."""

    name: str
    weights: tuple[Weight, ...]
    copied: tuple[str, ...]

    def tensors(self, shards: Shards) -> list[Planned]:
        found = [Planned(name, shards.entries[name].dtype, shards.entries[name].shape) for name in self.copied]
        for weight in self.weights:
            for field, (dtype, shape) in weight.codec.fields(weight.shape).items():
                # As the native pack stores them: older readers of safetensors know no fp8, and these are scales, not weights.
                kept = torch.uint8 if field == "weight_s_rel" else dtype
                found.append(Planned(f"{weight.stored}.{field}", kept, shape))
            text = weight.codec.to_json(weight.experts).encode()
            found.append(Planned(weight.stored + QUANT, torch.uint8, (len(text),)))
        return found

    def source_bytes(self, shards: Shards) -> int:
        names = (*self.copied, *(source for weight in self.weights for source in weight.sources))
        return sum(shards.entries[name].nbytes for name in names)


def convert(source: Path, target: Path, format: str, on_tick: Tick = silent, *,
            device: torch.device | str = "cpu") -> dict[str, Any]:
    """Write the backbone folder ``source`` into the folder ``target`` with its projections packed; returns the manifest.

    Run again after a kill or a cancel, it goes on. ``device`` packs; ``on_tick`` counts MB of the source.

    Raises:
        RequestError: no such format or device, ``target`` holds something else, or the disk is too small (with both numbers).
        CheckpointError: ``source`` is no whole unpacked backbone, or holds NaN or Inf; comfy-kitchen is missing.
    """
    source, target, device = Path(source), Path(target), usable_device(device)
    if format not in FORMATS[1:]:
        raise RequestError(f"cannot convert to {format!r}: choose one of {', '.join(FORMATS[1:])}")
    shards = _open_source(source)
    plans = _plan(shards, format)
    if not any(plan.weights for plan in plans):
        raise CheckpointError(f"{source}: {format} can hold none of the projections (int4 needs rows of a multiple of 16 "
                              f"values): choose another format")
    codec(format, (16, 16)).pack(torch.zeros(16, 16, device=device))  # so that a missing library shows before the first shard
    manifest = _begin(
        target, {"format": format, "version": VERSION, "source_fingerprint": backbone_fingerprint(shards)}, source)
    total = sum(plan.source_bytes(shards) for plan in plans)
    ticker = _Ticker(on_tick, total)
    kept = [plan.name for plan in plans if _is_whole(target / plan.name, manifest, plan, shards)]
    _check_space(target, [plan for plan in plans if plan.name not in kept], shards, source)
    _save(manifest, target)
    for plan in plans:
        if plan.name in kept:
            ticker.add(plan.source_bytes(shards))
            continue
        errors: dict[str, float] = {}
        manifest["files"][plan.name] = _write_shard(target / plan.name, plan, shards, device, errors, ticker.add)
        manifest["weight_error"] |= errors
        _save(manifest, target)
    for file in _companions(source):
        manifest["files"][file.name] = write_file(target / file.name, file.read_bytes())
    weight_map = {tensor.name: plan.name for plan in plans for tensor in plan.tensors(shards)}
    size = sum(tensor.nbytes for plan in plans for tensor in plan.tensors(shards))
    index = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=1).encode()
    manifest["files"][INDEX] = write_file(target / INDEX, index)
    _save(manifest | {"complete": True}, target)
    return manifest | {"complete": True}


def _open_source(source: Path) -> Shards:
    if not (source / "config.json").is_file():
        raise CheckpointError(f"{source} holds no config.json: give the folder of a published backbone")
    if read_json(source / "config.json").get("model_type") == GENERATOR_TYPE:
        raise CheckpointError(f"{source} is a weight generator: only backbones can be converted; the generator's 8.1 B "
                              f"parameters are used as published")
    config = BackboneConfig.from_folder(source)
    shards = open_shards(source)
    if any(name.endswith(QUANT) for name in shards.entries):
        raise CheckpointError(f"{source} is packed already: convert the published bf16 folder")
    refuse_foreign_formats(shards)
    layers = {int(name.split(".")[2]) for name in shards.entries if name.startswith("model.layers.")}
    if layers != set(range(config.num_hidden_layers)):
        raise CheckpointError(f"{source}: config.json has {config.num_hidden_layers} layers, the files hold {len(layers)}: "
                              f"download it again")
    return shards


def _plan(shards: Shards, format: str) -> list[ShardPlan]:
    """One shard a layer, then one for all else. Experts become stacks; what the format cannot hold is copied."""
    layers: dict[int, list[str]] = {}
    for name in shards.entries:
        layers.setdefault(int(name.split(".")[2]) if name.startswith("model.layers.") else -1, []).append(name)
    plans = []
    numbers = sorted(layer for layer in layers if layer >= 0) + [-1] * (-1 in layers)
    for number, layer in enumerate(numbers, start=1):
        weights = list(_weights(layers[layer], shards, format))
        taken = {source for weight in weights for source in weight.sources}
        plans.append(ShardPlan(f"model-{number:05}-of-{len(numbers):05}.safetensors", tuple(weights),
                               tuple(name for name in layers[layer] if name not in taken)))
    return plans


def _weights(names: list[str], shards: Shards, format: str) -> Iterator[Weight]:
    stacks: dict[str, dict[int, str]] = {}
    for name in names:
        module = name.removesuffix(".weight")
        before, found, rest = module.partition(".mlp.experts.")
        number, _, parameter = rest.partition(".")
        if found and number.isdecimal() and parameter in STACKED:
            stacks.setdefault(f"{before}.mlp.experts_{STACKED[parameter]}_proj", {})[int(number)] = name
        elif LINEAR.fullmatch(module) and name.endswith(".weight"):
            chosen = codec(format, shards.entries[name].shape)
            if chosen is not None:
                yield Weight(module, (name,), shards.entries[name].shape, chosen)
    for stored, experts in stacks.items():
        shapes = {shards.entries[name].shape for name in experts.values()}
        if len(shapes) != 1 or set(experts) != set(range(len(experts))):
            raise CheckpointError(f"{shards.folder}: '{stored}' would stack experts {min(experts)} to {max(experts)}, of which "
                                  f"{len(experts)} are there, in {len(shapes)} shapes, expected all in one: download it again")
        shape = (len(experts), *next(iter(shapes)))
        chosen = codec(format, shape)
        if chosen is not None:
            yield Weight(stored, tuple(experts[number] for number in range(len(experts))), shape, chosen)


def _begin(target: Path, identity: dict[str, Any], source: Path) -> dict[str, Any]:
    """The manifest to continue, or a new one. Raises RequestError for a folder with something else in it."""
    fresh = identity | {"complete": False, "source": source.resolve().name, "comfy_kitchen": _kitchen_version(),
                        "weight_error": {}, "files": {}}
    if target.exists() and not target.is_dir():
        raise RequestError(f"{target} is a file: give the name of a new folder")
    if target.is_dir() and any(target.iterdir()):
        if not (target / MANIFEST).is_file():
            raise RequestError(f"{target} holds something that `hywu convert` did not write: give the name of a new folder")
        before = read_json(target / MANIFEST)
        for key, value in identity.items():
            if before.get(key) != value:
                raise RequestError(f"{target} holds a conversion with {key} {str(before.get(key))[:40]!r}, this one has "
                                   f"{value!r}: give the name of a new folder")
        for key in ("weight_error", "files"):
            fresh[key] = before[key] if isinstance(before.get(key), dict) else {}
        for left in target.glob(LEFTOVERS):
            left.unlink()
    target.mkdir(parents=True, exist_ok=True)
    return fresh


def _kitchen_version() -> str | None:
    try:
        return metadata.version("comfy-kitchen")
    except metadata.PackageNotFoundError:
        return None


def _is_whole(file: Path, manifest: dict[str, Any], plan: ShardPlan, shards: Shards) -> bool:
    said = manifest["files"].get(plan.name)
    if not isinstance(said, dict) or not file.is_file():
        return False
    known = all(isinstance(manifest["weight_error"].get(weight.stored), float) for weight in plan.weights)
    header, size = plan_header(plan.tensors(shards))
    return known and file.stat().st_size == len(header) + size and sha256(file) == said.get("sha256")


def _check_space(target: Path, plans: list[ShardPlan], shards: Shards, source: Path) -> None:
    needed = sum(len(header) + size for header, size in (plan_header(plan.tensors(shards)) for plan in plans))
    needed += sum(file.stat().st_size for file in _companions(source))
    if (free := free_bytes(target)) < needed:
        raise RequestError(f"{target}: {needed} bytes are needed, {free} are free: make room or choose another disk")


def _companions(source: Path) -> list[Path]:
    """What makes a checkpoint beside its weights: configurations, tokenizer, system prompts, licence."""
    return sorted(file for file in source.iterdir() if file.is_file() and not file.name.startswith((".", MANIFEST, KEPT))
                  and file.suffix not in WEIGHT_FILES and not file.name.endswith(".index.json"))


def _write_shard(file: Path, plan: ShardPlan, shards: Shards, device: torch.device, errors: dict[str, float],
                 on_bytes: Callable[[int], None]) -> dict[str, Any]:
    """Write one shard, note the relative error of each weight; returns its size and SHA-256."""
    with ShardFile(file, plan.tensors(shards)) as out:
        for name in plan.copied:
            entry = shards.entries[name]
            with open(entry.file, "rb") as handle:
                handle.seek(entry.offset)
                out.copy(name, handle, entry.nbytes)
            on_bytes(entry.nbytes)
        for weight in plan.weights:
            out.write(weight.stored + QUANT, 0, weight.codec.to_json(weight.experts).encode())
            squares = [0.0, 0.0]
            for number, source in enumerate(weight.sources):
                matrix = _read(source, shards).to(device)
                packed = weight.codec.pack(matrix)
                for field, tensor in packed.items():
                    data = tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy()
                    out.write(f"{weight.stored}.{field}", number * tensor.nbytes, data)
                again = weight.codec.unpack(packed, torch.empty(matrix.shape, device=device))
                squares[0] += float((again - matrix).norm()) ** 2
                squares[1] += float(matrix.float().norm()) ** 2
                on_bytes(shards.entries[source].nbytes)
            errors[weight.stored] = (squares[0] / squares[1]) ** 0.5 if squares[1] else 0.0
        return out.finish()


def _read(name: str, shards: Shards) -> Tensor:
    entry = shards.entries[name]
    place = torch.empty(entry.shape, dtype=entry.dtype)
    read_tensors({name: place}, shards)
    return place


def _save(manifest: dict[str, Any], target: Path) -> None:
    write_file(target / MANIFEST, json.dumps(manifest, indent=1).encode())


class _Ticker:
    """Counts bytes and ticks in MB; the last tick is the total."""

    def __init__(self, on_tick: Tick, total: int):
        self._on_tick, self._total, self._done = on_tick, total, 0
        self.add(0)

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        self._on_tick(-(-self._done // MB), max(1, -(-self._total // MB)), None)
