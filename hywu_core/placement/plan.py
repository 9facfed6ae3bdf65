"""The plan: what of a model lies where and when, how much each device will hold, and how long an edit will take.

Owns the frozen ``Plan`` that loading and streaming follow, and ``plan``, a pure function from sizes, devices and a request to
it, or to an error that says what is missing where and what would fit. How it is found is ``search.py``'s, its text
``table.py``'s.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch

from ..errors import PlacementError, RequestError
from . import search, seconds
from .devices import Device
from .memory import CPU, DISK, HERE, VISITS, Items, Task, held, peak, ram_items
from .request import Lengths, Request, lengths
from .sizes import FORMATS, PLAIN, GeneratorSizes, ModelSizes

AUTO = "auto"
# How much faster than another format one has to be to be taken before it: fp8 and int8 change pictures little, int4 more.
WORTH = {"bf16": 1.0, "fp8": 1.0, "int8": 1.0, "int4": 1.5}
ALTERNATIVES = 3
SMALLER = ("1024x768", "768x1024")  # the table's smallest buckets that are not far from square


@dataclass(frozen=True)
class StagePlan:
    """A run of layers on a device.

    layers: how many from layer ``first`` on. streamed: which of them (numbers in the backbone) wait in ``streamed_from`` ("ram"
    or "disk") and come through a ring of ``ring`` buffers; all others are stored on the device. compute_buffer: whether there
    is one into which each layer is unpacked. experts_on_host: the CPU computes a streamed layer's experts for single tokens.
    """

    device: str
    first: int
    layers: int
    streamed: tuple[int, ...] = ()
    streamed_from: str = "ram"
    ring: int = 0
    compute_buffer: bool = False
    experts_on_host: bool = False


@dataclass(frozen=True)
class GeneratorPlan:
    """mode: "resident" on the device; "shared": kept in ``kept`` ("ram" or "disk") and brought there whole for its turn;
    "streamed": brought block by block."""

    device: str
    mode: str
    kept: str


@dataclass(frozen=True)
class Peak:
    """The most that a device holds, in which phase, of what (bytes), and what is free there; ``phases``: every phase's sum."""

    device: str
    free: int
    phase: str
    items: Mapping[str, int]
    phases: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.items.values())


@dataclass(frozen=True)
class Plan:
    """Where everything lies.

    format: of the layers' stored form ("bf16": as computed). places: "wte", "lm_head", "vision", "vae", "small" -> the device
    where the part lives; visits: those of them that come to another device for the time they are used. Sequences begin and end
    on ``home``. waves: the two rows pass the stages one behind the other. expert_tokens: how many tokens' expert work is done
    at once (``kernels/experts.py``). Ring and compute buffers have to be given back for pictures, generator and decoding.
    seconds: of each phase and their "total" and one denoise "step". reason: why this format.
    """

    format: str
    dtype: torch.dtype
    stages: tuple[StagePlan, ...]
    home: str
    places: Mapping[str, str]
    visits: Mapping[str, str]
    generator: GeneratorPlan | None
    waves: bool
    expert_tokens: int
    request: Request
    lengths: Lengths
    peaks: tuple[Peak, ...]
    ram: Peak
    seconds: Mapping[str, float]
    reason: str
    notes: tuple[str, ...] = field(default=())

    @property
    def streamed(self) -> int:
        """How many layers are streamed."""
        return sum(len(stage.streamed) for stage in self.stages)


def plan(
    sizes: ModelSizes,
    devices: tuple[Device, ...],
    request: Request,
    *,
    format: str = AUTO,
    generator: GeneratorSizes | None = None,
    streaming: str = "disk",
) -> Plan:
    """The fastest plan that fits.

    Args:
        devices: GPUs in their order, the computer's memory last (``devices.py``).
        format: of the layers; "auto" takes the files' own if it fits without streaming from disk, else the one that is fastest,
            where 4 bits have to be half as fast again as 8.
        streaming: how far away layers may lie: "none" (all on devices), "ram" or "disk".

    Raises:
        PlacementError: it does not fit: the shortage, and three things that would fit; or an argument that is none.
    """
    if format not in (AUTO, *FORMATS):
        raise PlacementError(f"there is no format {format!r}: choose {AUTO} or one of {', '.join(FORMATS)}")
    if format not in (AUTO, *sizes.forms()):
        raise PlacementError(f"these files are {sizes.own_form} already and cannot be made {format}: plan with "
                             f"{sizes.own_form}, or use the published folder")
    if streaming not in search.STREAMING:
        raise PlacementError(f"streaming {streaming!r} is none of {', '.join(search.STREAMING)}")
    task = Task(sizes, generator, request, lengths(sizes.config, request), devices)
    found = _arranged(task, format, streaming)
    if found is None:
        raise PlacementError(_refusal(task, format, streaming))
    return _plan(task, *found)


def _arranged(task: Task, format: str, streaming: str) -> tuple[search.Arrangement, str] | None:
    """The arrangement and the reason for its format."""
    forms, near = _forms(task, format), _near(task, streaming)
    own = search.find(task, forms[0], near)
    if own is not None:
        if format != AUTO:
            return own, "as asked"
        return own, "the files' own form fits without reading layers from disk" + _faster(task, own, near)
    others = {form: found for form in forms[1:] if (found := search.find(task, form, near)) is not None}
    if others:
        form = min(others, key=lambda form: others[form].total_seconds * WORTH[form])
        times = ", ".join(f"{form} {found.total_seconds:.0f} s" for form, found in others.items())
        return others[form], f"{forms[0]} does not fit into devices and RAM; an edit in {times}"
    if streaming == "disk":
        # Only what the files hold: packing on every visit would cost more than reading.
        form = task.sizes.own_form
        found = search.find(task, form, "disk") if form in forms else None
        if found is not None:
            return found, "the files' own form, because no format fits into devices and RAM" if format == AUTO else "as asked"
    return None


def _faster(task: Task, own: search.Arrangement, near: str) -> str:
    """What another format would take where the own one has to be streamed and another is clearly faster."""
    if sum(own.layers) == sum(own.resident):
        return ""
    others = {form: found for form in task.sizes.forms()[1:] if (found := search.find(task, form, near)) is not None}
    faster = [f"{found.total_seconds:.0f} s in {form}" for form, found in others.items()
              if 1.2 * found.total_seconds < own.total_seconds]
    return f"; an edit takes {own.total_seconds:.0f} s, {', '.join(faster)} (--format)" if faster else ""


def _forms(task: Task, format: str) -> tuple[str, ...]:
    return task.sizes.forms() if format == AUTO else (format,)


def _near(task: Task, streaming: str) -> str:
    """Where layers may wait without a disk: on a machine without a GPU they are in RAM when they are resident."""
    return "none" if streaming == "none" or task.workers[0].kind == "cpu" else "ram"


def _plan(task: Task, found: search.Arrangement, reason: str) -> Plan:
    sizes, choice, workers = task.sizes, found.choice, task.workers
    stages, first = [], 0
    for index, (layers, resident) in enumerate(zip(found.layers, found.resident, strict=True)):
        if layers:
            stages.append(_stage(task, found, index, first, layers, resident))
        first += layers
    home = workers[choice.home].name
    where = {HERE: home, CPU: "cpu", VISITS: "cpu", DISK: "disk"}
    places = {name: where[getattr(choice.places, name)] for name in choice.places.__dataclass_fields__}
    generator = None
    if choice.writer is not None:
        generator = GeneratorPlan(workers[choice.writer].name, choice.generator, choice.kept)
    peaks = tuple(_peak(device, held(task, choice, index, layers, resident)) for index, (device, layers, resident) in enumerate(
        zip(workers, found.layers, found.resident, strict=True)))
    ram = peaks[0] if workers[0].kind == "cpu" else _peak(
        task.ram, {"edit": ram_items(task, choice, sum(found.layers) - sum(found.resident))})
    return Plan(
        format=choice.form, dtype=sizes.dtype, stages=tuple(stages), home=home, places=MappingProxyType(places),
        visits=MappingProxyType({name: home for name in choice.places.visitors}), generator=generator, waves=choice.waves == 2,
        expert_tokens=choice.expert_tokens, request=task.request, lengths=task.lengths, peaks=peaks, ram=ram,
        seconds=MappingProxyType(_seconds(task, found)), reason=reason, notes=tuple(_notes(task, found)))


def _stage(task: Task, found: search.Arrangement, index: int, first: int, layers: int, resident: int) -> StagePlan:
    choice, far = found.choice, layers - resident
    # Spread evenly, so that one arrives while resident ones compute.
    streamed = tuple(first + (2 * number + 1) * layers // (2 * far) for number in range(far))
    ways = seconds.few_experts(task, choice, index)
    return StagePlan(
        task.workers[index].name, first, layers, streamed, choice.source if far else "ram", choice.ring if far else 0,
        task.sizes.packed(choice.form), far > 0 and min(ways, key=ways.get) == "cpu")


def _peak(device: Device, phases: dict[str, Items]) -> Peak:
    phase, _ = peak(phases)
    items = {name: nbytes for name, nbytes in phases[phase].items() if nbytes}
    return Peak(device.name, device.free, phase, MappingProxyType(items),
                MappingProxyType({name: sum(each.values()) for name, each in phases.items()}))


def _seconds(task: Task, found: search.Arrangement) -> dict[str, float]:
    choice, later = found.choice, task.request.steps - 1
    stages = [seconds.stage_seconds(task, choice, index, *pair)
              for index, pair in enumerate(zip(found.layers, found.resident, strict=True))]
    if choice.waves == 2:
        rows = [stage.row_tail + later * stage.row_step for stage in stages]
        passes = sum(rows) + max(rows)
        steps = [stage.row_step for stage in stages]
        step = sum(steps) + max(steps)
    else:
        passes, step = sum(stage.tail + later * stage.step for stage in stages), sum(stage.step for stage in stages)
    edge = seconds.edge_seconds(task, choice)
    phases = {
        "pictures": seconds.picture_seconds(task, choice),
        "think": sum(stage.think for stage in stages) + task.lengths.thought * seconds.head_seconds(task, choice),
        "encode": sum(stage.encode for stage in stages),
        "generate": seconds.write_seconds(task, choice),
        "denoise": sum(stage.shared for stage in stages) + passes + task.request.steps * edge,
        "decode": seconds.decode_seconds(task, choice)}
    return phases | {"total": sum(phases.values()), "step": step + edge}


def _notes(task: Task, found: search.Arrangement) -> Iterator[str]:
    choice, sizes = found.choice, task.sizes
    if choice.form != sizes.own_form:
        yield f"the files are {sizes.own_form}, packed at every loading; `hywu convert --format {choice.form}` does it once"
    if choice.source == "disk" and sum(found.layers) > sum(found.resident):
        yield "layers are read from disk on every pass: more memory or a converted folder is what makes this faster"
    if choice.generator in ("shared", "streamed") and choice.kept == "disk":
        yield "the generator is read from disk for every edit"


def _refusal(task: Task, format: str, streaming: str) -> str:
    """What is missing where, and what would fit."""
    near = "disk" if streaming == "disk" and task.workers[0].kind == "cpu" else _near(task, streaming)
    short = min((search.shortage(task, form, near) for form in _forms(task, format)),
                key=lambda short: short.needed - short.usable)
    request, missing = task.request, short.needed - short.usable
    asked = f"{request.size} with {_pictures(request.pictures)} and {'guidance' if request.rows == 2 else 'one row'}"
    text = (f"{asked} does not fit: {short.device.name} would need {gb(short.needed)} ({short.phase}) and has "
            f"{gb(short.usable)} to give, {gb(missing)} too little.")
    found = _alternatives(task, format, streaming)
    if found:
        return text + " What would fit: " + "; ".join(found) + "."
    return text + f" Nothing smaller fits either: {short.device.name} needs {gb(missing)} more free memory."


def _alternatives(task: Task, format: str, streaming: str) -> list[str]:
    """The nearest things that fit, each planned in full."""
    found: list[str] = []
    fitting: set[str] = set()
    for words, sizes, request, form, far in _neighbours(task, format, streaming):
        if any(alone in words for alone in fitting):
            continue  # less of what fits already
        try:
            near = Task(sizes, task.generator, request, lengths(sizes.config, request), task.devices)
        except (PlacementError, RequestError):
            continue  # a size or a number of tokens that this backbone does not know
        arranged = _arranged(near, form, far)
        if arranged is not None:
            fitting.add(words)
            found.append(f"{words} ({arranged[0].choice.form}, about {arranged[0].total_seconds:.0f} s an edit)")
        if len(found) == ALTERNATIVES:
            break
    return found


def _neighbours(task: Task, format: str, streaming: str) -> Iterator[tuple[str, ModelSizes, Request, str, str]]:
    """Requests beside this one, the least changed first: another format or place, then less at once, then both together."""
    sizes, request = task.sizes, task.request
    if format != AUTO:
        for form in sizes.forms():
            if form != format:
                yield f"--format {form}", sizes, request, form, streaming
    for far in search.STREAMING[search.STREAMING.index(streaming) + 1:]:
        yield f"streaming from {far}", sizes, request, format, far
    if streaming == "disk" and sizes.own_form == PLAIN:
        for form in sizes.forms()[1:]:
            yield (f"a folder made by `hywu convert --format {form}`, its layers read from disk", replace(sizes, own_form=form),
                   request, form, streaming)
    smaller = [("no guidance (one row)", {"rows": 1})] if request.rows == 2 else []
    smaller += [(_pictures(count), {"pictures": count}) for count in reversed(range(request.pictures))]
    smaller += [(f"size {size}", {"size": size}) for size in SMALLER[:1] if request.size not in SMALLER]
    if request.thinking:
        smaller.append(("no thinking", {"thinking": 0}))
    for words, changes in smaller:
        yield words, sizes, replace(request, **changes), format, streaming
    for first, (words, changes) in enumerate(smaller):
        for others, more in smaller[first + 1:]:
            if changes.keys() != more.keys():
                yield f"{words} and {others}", sizes, replace(request, **changes, **more), format, streaming
    least = replace(request, rows=1, pictures=0, thinking=0, size=SMALLER[0])
    yield "one row, no picture, no thinking, size 1024x768", sizes, least, format, streaming
    yield "the same in 4 bits", sizes, least, "int4" if "int4" in sizes.forms() else format, "disk"


def _pictures(count: int) -> str:
    return "no picture" if count == 0 else f"{count} picture{'' if count == 1 else 's'}"


def gb(nbytes: float) -> str:
    """Bytes as text, in units of 10⁹."""
    return f"{nbytes / 1e9:.1f} GB"
