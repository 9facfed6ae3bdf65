"""Stream a checkpoint into a module that was built on ``meta``, without a second copy of the weights.

Owns checking names, shapes and dtypes before a byte is read, giving the module memory, and reading each shard in order of
offsets straight into the parameters. Where the files' tensors lie is shards.py, where they go is slots.py.

Not ``safetensors.load_file`` and ``load_state_dict``: those hold the mapped pages and the parameters at the same time (twice
the bytes) and cannot gather the experts of a layer from two shards into one stacked parameter.
"""

import ctypes
import math
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from io import FileIO
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, RequestError
from ..progress import Tick, silent
from .readers import at_once
from .shards import Shards, TensorEntry
from .slots import slots

# SigLIP2's pooling head: the published backbones carry it, no stage uses it (spec section 1). Any other surplus is an error.
UNUSED_VISION_HEAD = frozenset("vision_model.head." + name for name in (
    "probe", "attention.in_proj_weight", "attention.in_proj_bias", "attention.out_proj.weight", "attention.out_proj.bias",
    "layernorm.weight", "layernorm.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"))

SAME_SIZE_INTEGER = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32,
                     torch.float64: torch.int64, torch.float8_e4m3fn: torch.int8}
FP8_NAN = 0x7F
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
BITSANDBYTES_SUFFIXES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB", ".weight_format")
QUANTISED = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)
# Read and checked piece by piece: small enough to be still in the cache when it is checked or converted.
CHUNK_BYTES = 8 << 20
TICK_BYTES = 256 << 20
# Files read at once: a disk of today answers several readers faster than one, and one core cannot copy and check as fast.
READERS = 4
PARALLEL_BYTES = 64 << 20  # below it threads cost more than they bring
MB = 1 << 20
MADV_POPULATE_WRITE = 23  # Linux 5.14; the mmap module has no name for it
LISTED = 10


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@torch.no_grad()
def load_weights(module: nn.Module, shards: Shards, *, skip: frozenset[str] = frozenset(),
                 device: torch.device | str = "cpu", on_tick: Tick = silent) -> None:
    """Fill ``module`` (built on ``meta`` with its final dtypes) with the weights of ``shards``; float dtypes are converted.

    Parameters and persistent buffers get memory on ``device`` and no gradient. ``skip`` names stored tensors that are ignored.
    ``on_tick`` counts MB, about every 256 MB; what it raises (a cancel) passes through.

    Raises:
        RequestError: there is no such device.
        CheckpointError: names, shapes or dtypes do not match (before a byte is read; all of them listed), a file is shorter
            than its header says, or a tensor holds NaN or Inf.
    """
    device = usable_device(device)
    refuse_foreign_formats(shards)
    check_names(slots(module), shards, skip)
    materialise(module, device)
    read_tensors(slots(module), shards, on_tick)


def read_tensors(places: Mapping[str, Tensor], shards: Shards, on_tick: Tick = silent) -> None:
    """Read the stored tensor of each name in ``places`` into its place: a ``Reading`` that is run once."""
    Reading(places, shards).run(on_tick)


class Reading:
    """Tensors on their way from the files into their places, in the order of the files; dtypes are converted.

    Places may lie on any device and have strided rows. A run that ended early (a cancel) leaves what it had read complete:
    the next one goes on with the others.
    """

    def __init__(self, places: Mapping[str, Tensor], shards: Shards):
        self._places, self._entries = dict(places), shards.entries
        self.total = sum(self._entries[name].nbytes for name in places)  # bytes

    def run(self, on_tick: Tick = silent) -> None:
        """Read what is missing; several large files are read at once. on_tick as in ``load_weights``, called from this thread.

        Raises CheckpointError for a file that is cut off or was changed, NaN or Inf.
        """
        wanted = sorted(((name, self._entries[name]) for name in self._places),
                        key=lambda item: (item[1].file.name, item[1].offset))
        left, total = sum(entry.nbytes for _, entry in wanted), -(-self.total // MB)
        files = [_read_file(file, list(group), self._places) for file, group in groupby(wanted, key=lambda item: item[1].file)]
        readers = min(READERS, len(files), os.cpu_count() or 1) if left >= PARALLEL_BYTES else 1
        done = ticked = self.total - left
        on_tick(done // MB, total, None)
        # Closed here and now when a tick raises, so that no thread goes on writing into memory that is being given back.
        with closing(at_once(files, readers)) as counts:
            for nbytes in counts:
                done += nbytes
                if done - ticked >= TICK_BYTES:
                    ticked = done
                    on_tick(done // MB, total, None)
        on_tick(total, total, None)


def usable_device(name: torch.device | str) -> torch.device:
    """The device of that name, tried out. Raises RequestError if this machine or this torch has no such device."""
    try:
        device = torch.empty(1, device=torch.device(name)).device  # with its number
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch built without CUDA
        said = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise RequestError(f"the device {str(name)!r} cannot be used here ({said}): choose 'cpu', or 'cuda' where torch "
                           f"finds a GPU (it finds {torch.cuda.device_count()})") from None
    if device.type == "meta":
        raise RequestError("the device 'meta' holds no values, so nothing can be loaded there: choose 'cpu' or 'cuda'")
    return device


def refuse_foreign_formats(shards: Shards) -> None:
    """Raises CheckpointError for weights that are packed, by bitsandbytes or in a format that ``packed.py`` takes apart."""
    refuse_bitsandbytes(shards)
    for name in shards.entries:
        if name.endswith(".comfy_quant"):
            raise CheckpointError(f"{shards.folder} is quantised for ComfyUI ('{name}'): only the projections of a backbone's "
                                  f"decoder layers may be, and not here; use the published bf16 folder")
    for name, entry in shards.entries.items():
        if entry.dtype in QUANTISED:
            raise CheckpointError(f"{entry.file}: '{name}' is stored as {_dtype(entry.dtype)}, expected one of "
                                  f"{', '.join(map(_dtype, FLOATS))}: quantised weights are not supported without a "
                                  f"'.comfy_quant' that describes them; use the published bf16 folder")


def refuse_bitsandbytes(shards: Shards) -> None:
    """Raises CheckpointError for weights quantised by bitsandbytes, whose format changes with its releases."""
    for name in shards.entries:
        if ".quant_state." in name or name.endswith(BITSANDBYTES_SUFFIXES):
            raise CheckpointError(f"{shards.folder} is quantised by bitsandbytes ('{name}'): that format is not supported; use "
                                  f"the published bf16 folder, make a smaller copy of it with `hywu convert`, or take the "
                                  f"native HunyuanImage-3 pack's W4A8 or int8 file")


def check_names(places: dict[str, Tensor], shards: Shards, skip: frozenset[str]) -> None:
    """Compare what the module has room for with what the files hold; one error for everything that does not match."""
    stored = {name: entry for name, entry in shards.entries.items() if name not in skip}
    shared = [(name, place, stored[name]) for name, place in places.items() if name in stored]
    problems = {
        "missing in the files": [f"{name} {list(place.shape)}" for name, place in places.items() if name not in stored],
        "surplus in the files": [f"{name} {list(entry.shape)}" for name, entry in stored.items() if name not in places],
        "of another shape": [f"{name} expected {list(place.shape)}, found {list(entry.shape)}"
                             for name, place, entry in shared if tuple(place.shape) != entry.shape],
        "of another dtype": [f"{name} expected {_dtype(place.dtype)}, found {_dtype(entry.dtype)}"
                             for name, place, entry in shared if not _convertible(entry.dtype, place.dtype)],
    }
    if any(problems.values()):
        lines = [f"{shards.folder} does not fit its configuration (which has {len(places)} tensors, the files {len(stored)}):"]
        for what, names in problems.items():
            if names:
                more = f" (first {LISTED} of {len(names)})" if len(names) > LISTED else ""
                lines.append(f"  {len(names)} {what}{more}: " + "; ".join(names[:LISTED]))
        lines.append("Use the published folder with its own config.json, or download it again.")
        raise CheckpointError("\n".join(lines))


def _convertible(stored: torch.dtype, wanted: torch.dtype) -> bool:
    return stored == wanted or (stored in FLOATS and wanted in FLOATS)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def materialise(module: nn.Module, device: torch.device | Callable[[str], torch.device | None]) -> None:
    """Give memory to every meta parameter and persistent buffer, in place; shared parameters stay shared.

    device: one for all, or asked for each submodule by its path; None leaves it on meta.
    Not ``module.to_empty``: that would also wipe the buffers that modules computed themselves, and ``empty_like`` of a meta
    tensor imports 30 MB of Python.
    """
    made: dict[int, Tensor] = {}
    for path, part in module.named_modules():
        where = device(path) if callable(device) else device
        if where is None:
            continue
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    memory = torch.empty(parameter.shape, dtype=parameter.dtype, device=where)
                    made[id(parameter)] = nn.Parameter(memory, requires_grad=False)
                part._parameters[name] = made[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_meta:
                if name in part._non_persistent_buffers_set:
                    raise RuntimeError(f"buffer '{name}' of {path or 'the model'} ({type(part).__name__}) is on meta and in no "
                                       f"checkpoint: compute it outside the meta context")
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=where)


def _read_file(file: Path, group: Sequence[tuple[str, TensorEntry]], places: dict[str, Tensor]) -> Iterator[int]:
    """Read the tensors of one file into their places, which are struck off when complete; yields the bytes of each chunk."""
    bounce = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
    with open(file, "rb", buffering=0) as handle:
        # A model that was released may be read again days later: other weights at the old places would load without a sign.
        if os.fstat(handle.fileno()).st_mtime_ns != group[0][1].time_ns:
            raise CheckpointError(f"{file} was changed after its header had been read: load the model again")
        for name, entry in group:
            yield from _read_tensor(handle, name, entry, places[name], bounce)
            del places[name]


def _read_tensor(handle: FileIO, name: str, entry: TensorEntry, place: Tensor, bounce: Tensor) -> Iterator[int]:
    """Read one tensor into ``place`` chunk by chunk, each checked for NaN and Inf while hot; yields the bytes of each chunk."""
    handle.seek(entry.offset)
    itemsize = entry.dtype.itemsize
    on_cpu = place.device.type == "cpu"
    for target in _pieces(place.detach(), CHUNK_BYTES // itemsize):
        direct = on_cpu and target.is_contiguous() and target.dtype == entry.dtype
        chunk = target if direct else bounce[:target.numel() * itemsize].view(entry.dtype).view(target.shape)
        if on_cpu:
            _prefault(target)
        _read_into(handle, chunk, name, entry)
        if not direct:
            target.copy_(chunk)
        # Checked as it is kept, not as it was stored: a sound bf16 value may be Inf in fp16.
        kept = chunk if entry.dtype == place.dtype else target if on_cpu else chunk.to(place.dtype)
        _check_finite(kept, name, entry)
        yield chunk.nbytes


def _prefault(target: Tensor) -> None:
    """Ask Linux for the memory behind a 1-D ``target`` in one call; a no-op where that is not possible.

    New memory has no pages yet. Letting the read find that out page by page costs more than the check for NaN does (measured
    with 2 GB: 1.35 s of CPU time without this, 1.05 s with it, 1.2 s for the bare read).
    """
    if _LIBC is not None and target.is_contiguous():
        # Whole pages only, and none that a neighbour shares.
        first = -(-target.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (target.data_ptr() + target.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < stop:
            _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(stop - first), MADV_POPULATE_WRITE)  # advice: may be refused


def _pieces(place: Tensor, most: int) -> Iterator[Tensor]:
    """``place`` cut into tensors of at most ``most`` values that follow each other in the file: 1-D where it is contiguous,
    else whole rows."""
    if place.is_contiguous():
        yield from place.view(-1).split(most)
    elif place[0].numel() <= most:
        yield from place.split(max(1, most // max(1, place[0].numel())))
    else:
        for row in place:
            yield from _pieces(row, most)


def _read_into(handle: FileIO, chunk: Tensor, name: str, entry: TensorEntry) -> None:
    buffer = memoryview(chunk.view(-1).view(torch.uint8).numpy())
    while buffer:
        count = handle.readinto(buffer)
        if not count:
            raise CheckpointError(f"{entry.file} ends {len(buffer)} bytes before the end of a part of '{name}' (at offset "
                                  f"{entry.offset}, {entry.nbytes} bytes): it changed while it was read; download it again")
        buffer = buffer[count:]


def _check_finite(chunk: Tensor, name: str, entry: TensorEntry) -> None:
    """Raises CheckpointError if ``chunk`` (on the CPU) holds NaN or Inf.

    In every IEEE format the patterns of NaN and Inf are the largest ones of their sign, so two integer maxima find them
    exactly; fp8 (e4m3fn) has no Inf, and what stands for it here is its only NaN. isfinite takes about 40 times as long (longer
    than the read itself), and torch's own sum or maximum spreads a chunk over all cores and then waits for the slowest: twice
    the load time on a busy machine.
    """
    if not chunk.is_floating_point() or not chunk.numel():
        return
    bits = chunk.view(SAME_SIZE_INTEGER[chunk.dtype]).numpy()
    infinity = FP8_NAN if bits.itemsize == 1 else (
        int(torch.tensor(math.inf, dtype=chunk.dtype).view(SAME_SIZE_INTEGER[chunk.dtype])))
    unsigned = bits.view(f"u{bits.itemsize}")
    if bits.max() >= infinity or unsigned.max() >= infinity + (1 << (8 * bits.itemsize - 1)):
        # fp8 has no isfinite of its own, and fp32 would make Inf of what fp64 holds.
        bad = int(chunk.numel() - (chunk.float() if bits.itemsize == 1 else chunk).isfinite().sum())
        raise CheckpointError(f"{entry.file}: '{name}', stored as {_dtype(entry.dtype)}, has NaN or Inf in {bad} of "
                              f"{chunk.numel()} values as {_dtype(chunk.dtype)}, expected none: the file is damaged; download "
                              f"it again")
