"""How much a device holds in each phase of an edit under one choice of places.

Owns ``Choice``, everything that a plan decides besides which layers lie where, and the sums; decides nothing.

Phases follow each other, so a device needs as much as its largest one. Ring and compute buffer are there while tokens pass the
layers (read, think, encode, denoise) and have to be given back for the others (pictures, generate, decode), which get their
room.
"""

from dataclasses import dataclass

from . import activations
from .devices import Device
from .request import Lengths, Request
from .sizes import GeneratorSizes, ModelSizes

PHASES = ("pictures", "read", "think", "encode", "generate", "denoise", "decode")
# Python, torch with its libraries, transformers, diffusers and ComfyUI, in the computer's memory; measured at 1.4 to 2.5 GB.
PROCESS = 2_500_000_000
# Blocks of the generator that are on the device at once when it is streamed: one that works, one that arrives.
BLOCKS_AT_ONCE = 2

HERE, VISITS, CPU, DISK = "device", "visits", "cpu", "disk"
Items = dict[str, int]


@dataclass(frozen=True)
class Places:
    """Where what is not a layer lies: "device" (the home device), "visits" (in RAM, comes there for its turn), "cpu" (in RAM,
    and works there), "disk" (on a machine without a GPU: read when needed). small: embedders, patch embedder, final layer."""

    wte: str = HERE
    lm_head: str = HERE
    vision: str = HERE
    vae: str = HERE
    small: str = HERE

    @property
    def visitors(self) -> tuple[str, ...]:
        """Parts that come to the home device for their turn."""
        return tuple(name for name in self.__dataclass_fields__ if getattr(self, name) == VISITS)

    def items(self, sizes: ModelSizes, *kinds: str) -> Items:
        """Bytes of the parts in places of these kinds."""
        return {name: getattr(sizes, name) for name in self.__dataclass_fields__ if getattr(self, name) in kinds}


# From comfortable to what is left when memory is short; each frees more of the home device than the one before it.
LEVELS = (
    Places(),
    Places(wte=CPU),
    Places(wte=CPU, vision=VISITS, vae=VISITS),
    Places(wte=CPU, vision=VISITS, vae=VISITS, lm_head=CPU),
    Places(wte=CPU, vision=VISITS, vae=CPU, lm_head=CPU),
)
CPU_LEVELS = (Places(), Places(wte=DISK), Places(wte=DISK, vision=DISK, vae=DISK))


@dataclass(frozen=True)
class Choice:
    """home, writer: numbers of the devices where sequences begin and where the generator works (None: there is none).

    generator: "resident", "shared" (comes whole for its turn) or "streamed" (block by block), and is kept in "ram" or on "disk"
    otherwise. source: where streamed layers wait. waves: 2 if the rows pass the stages one behind the other.
    """

    form: str
    places: Places
    home: int = 0
    ring: int = 2
    expert_tokens: int = activations.EXPERT_TOKENS[0]
    generator: str | None = None
    writer: int | None = None
    kept: str = "ram"
    source: str = "ram"
    waves: int = 1


@dataclass(frozen=True)
class Task:
    """What a plan is made for: sizes, request and what follows from them."""

    sizes: ModelSizes
    generator: GeneratorSizes | None
    request: Request
    lengths: Lengths
    devices: tuple[Device, ...]

    @property
    def workers(self) -> tuple[Device, ...]:
        """The devices that layers can run on: the GPUs, or the CPU if there is none."""
        return self.devices[:-1] or self.devices

    @property
    def ram(self) -> Device:
        return self.devices[-1]


def held(task: Task, choice: Choice, index: int, layers: int, resident: int) -> dict[str, Items]:
    """What worker ``index`` holds in each phase with ``layers`` layers, ``resident`` of them stored there: phase -> item ->
    bytes."""
    sizes, device = task.sizes, task.workers[index]
    always = _always(task, choice, index, layers, resident)
    buffers: Items = {}
    if layers > resident:
        buffers["ring"] = choice.ring * sizes.stored_layer(choice.form)
    if layers and sizes.packed(choice.form):
        buffers["compute buffer"] = sizes.computed_layer()
    home = index == choice.home
    phases: dict[str, Items] = {}
    if home and task.request.pictures:
        phases["pictures"] = always | _pictures(task, choice)
    if layers or home:
        if task.lengths.thought:
            reading, thinking = _think(task, choice, device, layers, home)
            phases |= {"read": always | buffers | reading, "think": always | buffers | thinking}
        phases["encode"] = always | buffers | _encode(task, choice, device, layers, home)
        phases["denoise"] = always | buffers | _denoise(task, choice, device, layers, resident, home)
    if index == choice.writer:
        phases["generate"] = always | _generate(task, choice)
    if home:
        phases["decode"] = always | _visiting_vae(task, choice)
    if device.kind == "cpu":
        beside = ram_items(task, choice, 0)
        phases = {phase: beside | items for phase, items in phases.items()}
    return {phase: phases[phase] for phase in PHASES if phase in phases} or {"denoise": always}


def ram_items(task: Task, choice: Choice, streamed: int) -> Items:
    """What the computer's memory holds beside layers that run there, with ``streamed`` layers waiting for GPUs."""
    sizes = task.sizes
    items = {"process": PROCESS} | choice.places.items(sizes, CPU, VISITS)
    if streamed and choice.source == "ram":
        items["waiting layers"] = streamed * sizes.stored_layer(choice.form)
    if task.workers[0].kind != "cpu":
        # A copy in pinned memory of what is put on a layer that comes, or is unpacked, for its turn.
        items["waiting LoRA"] = (sizes.layers if sizes.packed(choice.form) else streamed) * sizes.lora
    if task.generator is not None:
        if choice.generator in ("shared", "streamed") and choice.kept == "ram":
            items["waiting generator"] = task.generator.total
        items["LoRA value"] = task.generator.written
    return items


def peak(phases: dict[str, Items]) -> tuple[str, int]:
    """The phase that needs most, and how much."""
    totals = {phase: sum(items.values()) for phase, items in phases.items()}
    worst = max(totals, key=totals.get)
    return worst, totals[worst]


def _always(task: Task, choice: Choice, index: int, layers: int, resident: int) -> Items:
    sizes = task.sizes
    items = {"layers": resident * sizes.stored_layer(choice.form) + layers * sizes.rest} if layers else {}
    if index == choice.home:
        items |= choice.places.items(sizes, HERE)
    if index == choice.writer and choice.generator == "resident":
        items["generator"] = task.generator.total
    return items


def _pictures(task: Task, choice: Choice) -> Items:
    """Tower, VAE and patch embedder take their turns; those that visit are there for theirs only."""
    sizes, lengths, places = task.sizes, task.lengths, choice.places
    turns = [("vision", places.vision, activations.vision(sizes)), ("small", HERE, activations.embedding(sizes, lengths))]
    if places.vae != CPU:
        turns.append(("vae", places.vae, activations.vae(sizes, lengths)))
    needs = [(getattr(sizes, name) if place in (VISITS, DISK) else 0, work) for name, place, work in turns]
    visitor, work = max(needs, key=sum)
    return {"visitor": visitor, "activations": work + activations.source_tokens(sizes, task.request.pictures, lengths)}


def _think(task: Task, choice: Choice, device: Device, layers: int, home: bool) -> tuple[Items, Items]:
    """While the prompt is read, and while tokens come one by one, when there is little else than the growing cache."""
    first, grown = activations.thinking_kv(task.sizes, task.lengths)
    sources = activations.source_tokens(task.sizes, task.request.pictures, task.lengths) if home else 0
    return ({"KV": layers * first, "activations": _prefill(task, choice, device, task.lengths.prompt, home)},
            {"KV": layers * grown, "activations": sources})


def _encode(task: Task, choice: Choice, device: Device, layers: int, home: bool) -> Items:
    return {"activations": _prefill(task, choice, device, task.lengths.condition, home)}


def _prefill(task: Task, choice: Choice, device: Device, length: int, home: bool) -> int:
    """One row without a LoRA: embeddings (at home), the input of a layer, the layer; or the embedders."""
    sizes = task.sizes
    here = activations.states(sizes, length) + activations.sight(sizes, length, length, length)
    if home:
        here += activations.states(sizes, length) + activations.source_tokens(sizes, task.request.pictures, task.lengths)
    return here + activations.layer(
        sizes, 1, length, length, choice.expert_tokens, lora=False, masked=True, composed=device.kind == "cpu")


def _denoise(task: Task, choice: Choice, device: Device, layers: int, resident: int, home: bool) -> Items:
    sizes, lengths, rows = task.sizes, task.lengths, task.request.rows
    at_once, waiting = (1, 1) if choice.waves == 2 else (rows, 0)
    tail = lengths.whole - lengths.shared

    def work(rows: int, length: int, keys: int, masked: bool) -> int:
        return activations.states(sizes, (rows + waiting) * length) + activations.layer(
            sizes, rows, length, keys, choice.expert_tokens, lora=True, masked=masked, composed=device.kind == "cpu")

    first = work(at_once, tail, lengths.whole, True)
    if lengths.shared:
        first = max(first, work(1, lengths.shared, lengths.shared, True))
    first += activations.sight(sizes, lengths.whole, lengths.whole if home else tail, lengths.whole)
    later = work(at_once, lengths.canvas, lengths.whole, False) + activations.sight(sizes, lengths.whole, 1, lengths.whole)
    held = 0
    if home:
        # The embeddings of all rows wait for the first pass's end, the canvas is a row of its own.
        first += activations.states(sizes, rows * lengths.whole + lengths.canvas)
        edge = max(activations.embedding(sizes, lengths), activations.velocity(sizes, rows, lengths))
        later = max(later + activations.states(sizes, lengths.canvas), edge)
        held = activations.source_tokens(sizes, task.request.pictures, lengths)
        held += activations.states(sizes, lengths.condition)
    # Layers that are computed where they lie keep the sides of the LoRA that have no room; the others land theirs at their
    # turn.
    in_place = 0 if sizes.packed(choice.form) else resident
    lora = in_place * sizes.lora_beside + (sizes.lora if layers > in_place else 0)
    kv = layers * activations.kv_layer(sizes, rows, lengths.whole)
    return {"LoRA": lora, "KV": kv, "activations": max(first, later) + held}


def _generate(task: Task, choice: Choice) -> Items:
    generator = task.generator
    came = {"shared": generator.total, "streamed": generator.rest + BLOCKS_AT_ONCE * generator.block}.get(choice.generator, 0)
    return {"visitor": came, "activations": activations.writing(generator, task.lengths.condition)}


def _visiting_vae(task: Task, choice: Choice) -> Items:
    if choice.places.vae == CPU:
        return {}
    visitor = task.sizes.vae if choice.places.vae in (VISITS, DISK) else 0
    return {"visitor": visitor, "activations": activations.vae(task.sizes, task.lengths)}
