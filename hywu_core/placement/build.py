"""From a plan to a backbone that is loaded and placed: memory for every part where the plan puts it, filled from the files.

Owns the order of loading, and packing while loading (a matrix at a time: there is never a second copy of a layer); giving the
memory back and loading again. The plan is ``plan.py``'s, what happens when a layer's turn comes ``streaming.py``'s.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from ...kernels.experts import TOKENS_AT_ONCE, choose
from ..backbone.adapted import Adapted, Experts
from ..backbone.layer import DecoderLayer, MixtureOfExperts
from ..backbone.model import Backbone
from ..backbone.stage import Stage
from ..checkpoint.formats import Codec
from ..checkpoint.load import (
    MB,
    TICK_BYTES,
    UNUSED_VISION_HEAD,
    Reading,
    check_names,
    materialise,
    read_tensors,
    refuse_foreign_formats,
    usable_device,
)
from ..checkpoint.packed import Packed, PackedWeight, find_packed
from ..checkpoint.shards import Shards
from ..checkpoint.slots import slots
from ..config import BackboneConfig
from ..errors import RequestError
from ..progress import Tick, silent
from .plan import Peak, Plan, StagePlan
from .request import Request
from .sizes import RANK
from .slab import SlabLayout, adapted_modules, compute_layout, packed_layout, stored_layout
from .stored import InMemory, OnDisk, new_slab
from .streaming import Streamed, Streaming
from .visits import Absent, absent, put_back, reading, visiting

# A place of parts that this process does not hold, beside devices and "disk"; layers that no stage has are not held either.
ELSEWHERE = "elsewhere"
# The plan's parts and their submodules; "small" is everything else but the layers.
PARTS = {"wte": ("model.wte",), "lm_head": ("lm_head", "model.ln_f"), "vision": ("vision_model", "vision_aligner"),
         "vae": ("vae",), "small": ()}


def whole(config: BackboneConfig, dtype: torch.dtype, device: torch.device | str) -> Plan:
    """The plan of who plans nothing: everything on one device, as the files have it."""
    name, nothing = str(torch.device(device)), Peak(str(device), 0, "", {}, {})
    return Plan(
        format="bf16", dtype=dtype, stages=(StagePlan(name, 0, config.num_hidden_layers),), home=name,
        places=dict.fromkeys(PARTS, name), visits={}, generator=None, waves=False, expert_tokens=TOKENS_AT_ONCE,
        request=Request(), lengths=None, peaks=(), ram=nothing, seconds={}, reason="not planned")


class Placed:
    """A backbone in its places: loaded, released for others and loaded again, by the same plan or another one.

    backbone: built on ``meta``. It may be used while ``loaded`` is true; a released one refuses to run. ``begun``: a load was
    cancelled, and what it had read is kept for the next one.
    """

    def __init__(self, backbone: Backbone, shards: Shards, plan: Plan):
        """Raises CheckpointError if names, shapes or dtypes do not match; nothing has been read then."""
        self.backbone, self.plan, self.loaded = backbone, plan, False
        self._files = find_packed(shards)
        refuse_foreign_formats(self._files.plain)
        published = {name: place for name, place in slots(backbone).items() if _owner(name) not in self._files.weights}
        check_names(published, self._files.plain, UNUSED_VISION_HEAD)
        self._slabs: list[tuple[torch.device, int]] = []
        self._loading: _Loading | None = None

    @property
    def begun(self) -> bool:
        return self._loading is not None

    @torch.inference_mode(False)
    @torch.no_grad()
    def load(self, on_tick: Tick = silent) -> None:
        """Bring everything to where the plan puts it; what is in memory already is moved and not read again.

        on_tick counts MB; what it raises (a cancel) passes through. Then what was read and packed so far stays, and the next
        call goes on with the rest, unless the plan has changed or ``release`` has given it back.

        Raises:
            CheckpointError: a file is cut off, was changed or holds NaN or Inf; what was read is released, as after any error.
            RequestError: a device that is not there; layers that stay on disk in another format than the files'.
        """
        backbone, plan = self.backbone, self.plan
        for name in {stage.device for stage in plan.stages}:
            usable_device(name)
        if self.loaded or (self._loading is not None and self._loading.plan is not plan):
            self.release()
        ticking = False

        def tick(*arguments) -> None:
            nonlocal ticking
            ticking = True
            on_tick(*arguments)
            ticking = False

        try:
            if self._loading is None:
                self._begin()
            self._loading.run(tick)
            for stage in self._loading.stages:
                choose(stage.device, plan.dtype)
        except BaseException:
            if not ticking:
                self.release()
            raise
        backbone.stages, self._loading = tuple(self._loading.stages), None
        backbone.waves, backbone.home = plan.waves, torch.device(plan.home)
        self._set_visits()
        self.loaded = True

    def _begin(self) -> None:
        """Memory for everything, and what is to be read into it."""
        self._loading = loading = _Loading(self._files, self.plan, absent((self.backbone,)))
        loading.places |= self._rest()
        for part in self.plan.stages:
            stage = Stage(self.backbone.model.layers[part.first : part.first + part.layers], part.first)
            streaming = self._place_layers(stage, part, loading)
            stage.present, stage.rest, stage.resident = streaming.present, streaming.rest, streaming.resident
            loading.stages.append(stage)

    def release(self) -> None:
        """Give back what the layers hold, on devices and in RAM, and keep all else in RAM; a load that was begun, whole."""
        released = Stage(self.backbone.model.layers, 0)
        released.present = _refuse_to_run
        if self._loading is not None:
            put_back(self._loading.before)  # or half-read memory would count as loaded next time
            self.backbone.stages = (*self.backbone.stages, *self._loading.stages)
            self._loading = None
        for stage in self.backbone.stages:
            stage.rest()
            # What streams into a stage refers to it: without this the memory would wait for the garbage collector.
            stage.present, stage.rest = released.present, released.rest
        for _, module in self.backbone.adapted_modules():
            module.leave()
        for tensor in (*self.backbone.parameters(), *self.backbone.buffers()):
            if not tensor.is_meta:
                tensor.data = tensor.data.cpu()
        # Parts that stay on disk come from there without the model, too: a VAE that somebody else decodes with.
        visits = {part: visit for part, visit in self.backbone.visits.items() if self.plan.places[part] == "disk"}
        self.backbone.stages, self.backbone.waves, self.backbone.visits = (released,), False, visits
        self._slabs.clear()
        self.loaded = False

    def nbytes(self, device: torch.device) -> int:
        """What the weights hold on a device now, buffers that come and go not counted."""
        rest = sum(parameter.nbytes for module in self.backbone.modules() if not isinstance(module, Adapted)
                   for parameter in module.parameters(recurse=False) if parameter.device == device)
        return rest + sum(nbytes for where, nbytes in self._slabs if where == device)

    def _rest(self) -> dict[str, torch.Tensor]:
        """Bring all but the layers' slabs to their devices; returns what is still to be read."""
        there = {name for name, place in slots(self.backbone).items() if not place.is_meta}
        for path, module in self.backbone.named_modules():
            device = self._where(path)
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if device is not None and not tensor.is_meta and tensor.device != device:
                    tensor.data = tensor.data.to(device)
        materialise(self.backbone, self._where)
        return {name: place for name, place in slots(self.backbone).items() if not place.is_meta and name not in there}

    def _where(self, path: str) -> torch.device | None:
        """The device of the submodule ``path``'s own parameters; None for adapted weights, which get their memory in slabs, and
        for what stays on disk or is elsewhere."""
        if isinstance(self.backbone.get_submodule(path), Adapted):
            return None
        if path.startswith("model.layers."):
            layer = int(path.split(".")[2])
            here = [stage.device for stage in self.plan.stages if stage.first <= layer < stage.first + stage.layers]
            return torch.device(here[0]) if here else None
        place = self.plan.places[next((part for part, paths in PARTS.items() if path.startswith(paths)), "small")]
        return None if place in ("disk", ELSEWHERE) else torch.device(place)

    def _place_layers(self, stage: Stage, part: StagePlan, loading: "_Loading") -> Streaming:
        """Memory for the stage's layers: bound for good where they compute, else kept in stored form, brought at their turn."""
        device, streams = torch.device(part.device), {}
        for index, layer in enumerate(stage.layers):
            number, dtype = stage.first + index, layer.input_layernorm.weight.dtype
            stored, streamed = loading.layout(number, layer, dtype), stage.first + index in part.streamed
            if isinstance(layer.mlp, MixtureOfExperts):
                layer.mlp.experts.tokens_at_once = self.plan.expert_tokens
            if streamed and part.streamed_from == "disk":
                kept = loading.on_disk(number, layer, stored)
            else:
                home = torch.device("cpu") if streamed else device
                kept = InMemory(stored, new_slab(stored.nbytes, home, copied_to=device))
                self._slabs.append((home, stored.nbytes))
                loading.into_memory(number, layer, kept, device)
            if streamed or stored.packed:
                streams[index] = Streamed(layer, kept, compute_layout(layer, dtype, RANK))
            else:
                for path, module in adapted_modules(layer):
                    module.place(kept.views[path], for_good=True)
        return Streaming(stage, streams, part.ring, experts_on_host=part.experts_on_host)

    def _set_visits(self) -> None:
        backbone, plan = self.backbone, self.plan
        for part, paths in PARTS.items():
            modules = {path: backbone.get_submodule(path) for path in paths or _small(backbone)}
            if plan.places[part] == "disk":
                backbone.visits[part] = partial(reading, modules, self._files.shards, backbone.home)
            elif part in plan.visits:
                backbone.visits[part] = partial(visiting, tuple(modules.values()), torch.device(plan.visits[part]))


@contextmanager
def _refuse_to_run(index: int, tokens: int) -> Iterator[None]:
    raise RequestError("the model was unloaded to make room for others: load it again")
    yield


def _small(backbone: Backbone) -> list[str]:
    known = [path for paths in PARTS.values() for path in paths]
    return [name for name, _ in backbone.named_children() if name != "model" and name not in known]


def _owner(name: str) -> tuple[str, str]:
    """(module, parameter) of a published tensor name, as ``Packed.weights`` is keyed: experts count as their stack."""
    module, _, parameter = name.rpartition(".")
    stack, found, rest = module.partition(".mlp.experts.")
    return (stack + ".mlp.experts", rest.partition(".")[2]) if found else (module, parameter)


class _Loading:
    """What is to be read, collected first: tensors that go to their places in the order of the files, then what is packed.

    Also what belongs to a load that has not ended: its plan, its stages, and what was on meta ``before``.
    """

    def __init__(self, files: Packed, plan: Plan, before: Absent):
        self._files, self.plan, self.before = files, plan, before
        self.stages: list[Stage] = []
        self.places: dict[str, torch.Tensor] = {}
        self._matrices: deque[tuple[str, Codec, dict[str, torch.Tensor], torch.device]] = deque()
        self._reading: Reading | None = None
        self._packed = 0  # bytes of matrices that are done

    def layout(self, number: int, layer: DecoderLayer, dtype: torch.dtype) -> SlabLayout:
        """The files' own form of a layer if it is packed there, else the plan's."""
        codecs = {}
        for path, module in adapted_modules(layer):
            for name in module.ROOMS:
                if (weight := self._weight(number, path, name)) is not None:
                    codecs[path, name] = weight.codec
        return packed_layout(layer, dtype, codecs) if codecs else stored_layout(layer, dtype, RANK, self.plan.format)

    def into_memory(self, number: int, layer: DecoderLayer, kept: InMemory, device: torch.device) -> None:
        """Read a layer into its slab; what is packed here is packed on ``device``."""
        for path, module in adapted_modules(layer):
            views = kept.views[path]
            for name in module.ROOMS:
                weight, codec = self._weight(number, path, name), kept.layout.codecs.get((path, name))
                if weight is not None:
                    self.places |= {stored: views[f"{name}.{field}"] for field, stored in weight.names.items()}
                elif codec is not None:
                    fields = {field: views[f"{name}.{field}"] for field in codec.fields(tuple(getattr(module, name).shape))}
                    for source, expert in _sources(number, path, module, name).items():
                        own = fields if expert is None else {field: view[expert] for field, view in fields.items()}
                        self._matrices.append((source, codec, own, device))
                else:
                    whole = views[name][tuple(slice(size) for size in getattr(module, name).shape)]
                    for source, expert in _sources(number, path, module, name).items():
                        self.places[source] = whole if expert is None else whole[expert]

    def on_disk(self, number: int, layer: DecoderLayer, layout: SlabLayout) -> OnDisk:
        """The layer's sources in the files. Raises RequestError if it would have to be packed on every visit."""
        sources = {}
        for path, module in adapted_modules(layer):
            for name in module.ROOMS:
                weight = self._weight(number, path, name)
                if weight is not None:
                    sources |= {(path, f"{name}.{field}"): [stored] for field, stored in weight.names.items()}
                elif (path, name) in layout.codecs:
                    raise RequestError(f"layers that stay on disk must be there as {self.plan.format} already: run `hywu "
                                       f"convert` to {self.plan.format} once and load that folder")
                else:
                    sources[path, name] = list(_sources(number, path, module, name))
        return OnDisk(layout, self._files.shards, sources)

    def run(self, on_tick: Tick) -> None:
        """Read everything that is missing; ticks in MB over both parts."""
        entries = self._files.shards.entries
        if self._reading is None:
            self._reading, self.places = Reading(self.places, self._files.shards), {}
        left = sum(entries[source].nbytes for source, *_ in self._matrices)
        total = -(-(self._reading.total + self._packed + left) // MB)
        self._reading.run(lambda done, _, latent: on_tick(done + self._packed // MB, total, latent))
        while self._matrices:
            source, codec, fields, device = self._matrices[0]
            entry, before = entries[source], self._reading.total + self._packed
            matrix = torch.empty(entry.shape, dtype=entry.dtype)
            read_tensors({source: matrix}, self._files.shards)
            for field, packed in codec.pack(matrix.to(device)).items():
                fields[field].copy_(packed)
            self._matrices.popleft()
            self._packed += entry.nbytes
            if (before + entry.nbytes) // TICK_BYTES > before // TICK_BYTES:
                on_tick((before + entry.nbytes) // MB, total, None)
        on_tick(total, total, None)

    def _weight(self, number: int, path: str, name: str) -> PackedWeight | None:
        return self._files.weights.get((f"model.layers.{number}.{path}", name))


def _sources(number: int, path: str, module: Adapted, name: str) -> dict[str, int | None]:
    """The published tensors of one weight, each with its expert's number in the stack, or None for a weight of its own."""
    where = f"model.layers.{number}.{path}."
    if not isinstance(module, Experts):
        return {where + name: None}
    return {f"{where}{expert}.{name}.weight": expert for expert in range(len(getattr(module, name)))}
