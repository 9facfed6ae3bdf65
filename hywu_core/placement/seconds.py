"""How long each phase of an edit takes on given devices: the larger of arithmetic, memory traffic and what comes over the link.

Owns the arithmetic and the shares of the peak rates that a run is expected to reach. Predictions are for choosing between plans
and for telling people what to expect; ``benchmarks/`` measure.
"""

from dataclasses import dataclass

from . import activations
from .devices import Device
from .memory import CPU, DISK, VISITS, Choice, Task

# Goals: of peak arithmetic, of a memory's bandwidth at one token, of a link that is prefetched over.
ARITHMETIC, BANDWIDTH, LINK = 0.65, 0.6, 0.85
# Memory traffic of unpacking in units of the compute form: what ``checkpoint/formats.py`` writes and reads on the way. fp8 goes
# through the compute dtype once, int4 through indices, a table and a rotation, int8 through fp32.
UNPACKING = {"fp8": 3, "int8": 8, "int4": 7}


@dataclass(frozen=True)
class StageSeconds:
    """Of one stage. think: reading the prompt and all its tokens. encode: the prefill for the condition. shared: what the rows
    of the first denoise pass have in common. tail, step: the rest of it and a later pass, all rows at once; row_tail, row_step:
    one row."""

    think: float = 0.0
    encode: float = 0.0
    shared: float = 0.0
    tail: float = 0.0
    step: float = 0.0
    row_tail: float = 0.0
    row_step: float = 0.0


def link(device: Device, source: str, ram: Device) -> float:
    """Bytes/s at which waiting layers reach a device."""
    speed = device.link if device.kind == "cpu" or source == "ram" else min(device.link, ram.link)
    return speed * LINK


def stage_seconds(task: Task, choice: Choice, index: int, layers: int, resident: int) -> StageSeconds:
    """What a stage of ``layers`` layers on worker ``index`` takes, ``resident`` of them stored there."""
    lengths, rows = task.lengths, task.request.rows
    tail = lengths.whole - lengths.shared

    def passing(rows: int, length: int, keys: int, lora: bool = True) -> float:
        return pass_seconds(task, choice, index, layers, resident, rows, length, keys, lora)

    if not layers:
        return StageSeconds()
    think = 0.0
    if lengths.thought:
        think = passing(1, lengths.prompt, lengths.prompt, False)
        think += lengths.thought * token_seconds(task, choice, index, layers, resident)
    tail_step = passing(rows, tail, lengths.whole), passing(rows, lengths.canvas, lengths.whole)
    one_row = (passing(1, tail, lengths.whole), passing(1, lengths.canvas, lengths.whole)) if rows == 2 else tail_step
    return StageSeconds(
        think, passing(1, lengths.condition, lengths.condition, False),
        passing(1, lengths.shared, lengths.shared) if lengths.shared else 0.0, *tail_step, *one_row)


def pass_seconds(
    task: Task, choice: Choice, index: int, layers: int, resident: int, rows: int, length: int, keys: int, lora: bool
) -> float:
    """One pass of many tokens: streamed layers arrive while others compute."""
    if not layers:
        return 0.0
    sizes, device, config = task.sizes, task.workers[index], task.sizes.config
    tokens = rows * length
    flops = 2 * sizes.chosen_values() * tokens
    flops += 4 * rows * length * keys * config.num_attention_heads * config.attention_head_dim
    # Every further piece reads the routed experts' weights once more.
    traffic = sizes.computed_layer() * (1 + (tokens - 1) // choice.expert_tokens)
    unpacking = 0.0
    if sizes.packed(choice.form):
        unpacking = UNPACKING[choice.form] * sizes.computed_layer() / (device.bandwidth * BANDWIDTH)
    one = max(flops / (device.flops * ARITHMETIC), traffic / (device.bandwidth * BANDWIDTH)) + unpacking
    if lora and sizes.packed(choice.form) and device.kind != "cpu":
        one += sizes.lora / (device.link * LINK)  # lands in the compute buffer at each layer's turn
    arriving = (layers - resident) * (sizes.stored_layer(choice.form) + (sizes.lora if lora else 0))
    return max(layers * one, arriving / link(device, choice.source, task.ram))


def token_seconds(task: Task, choice: Choice, index: int, layers: int, resident: int) -> float:
    """One token of thinking: its experts are known only when it comes, so what has to travel is waited for."""
    sizes, device = task.sizes, task.workers[index]
    near = sizes.chosen()
    if sizes.packed(choice.form):
        near += UNPACKING[choice.form] * sizes.chosen()
    near += activations.kv_layer(sizes, 1, task.lengths.condition)
    seconds = layers * near / (device.bandwidth * BANDWIDTH)
    far = layers - resident
    if far:
        speed = link(device, choice.source, task.ram)
        dense = sizes.chosen(choice.form, routed=False) / speed
        seconds += far * (dense + min(few_experts(task, choice, index).values()))
    return seconds


def few_experts(task: Task, choice: Choice, index: int) -> dict[str, float]:
    """Seconds for a streamed layer's experts of one token by what can be done with them: "travel", or "cpu" computes them."""
    sizes = task.sizes
    routed = sizes.chosen(choice.form, routed=True)
    ways = {"travel": routed / link(task.workers[index], choice.source, task.ram)}
    # The CPU works on plain weights only, and only where they lie in its memory.
    if not sizes.packed(choice.form) and choice.source == "ram" and task.workers[index].kind != "cpu":
        ways["cpu"] = routed / (task.ram.bandwidth * BANDWIDTH)
    return ways


def picture_seconds(task: Task, choice: Choice) -> float:
    """Encoding all source pictures."""
    if not task.request.pictures:
        return 0.0
    sizes, lengths, home = task.sizes, task.lengths, task.workers[choice.home]
    values = sizes.vision / sizes.dtype.itemsize
    flops = 2 * values * sizes.config.vit_max_num_patches + 2 * sizes.patch_values * lengths.cells
    one = flops / (home.flops * ARITHMETIC) + _vae(task, choice, sizes.encoder_flops)
    came = sum(choice.places.items(sizes, VISITS).values()) / (home.link * LINK)
    came += sum(choice.places.items(sizes, DISK).values()) / (task.ram.link * LINK)
    return task.request.pictures * one + came


def decode_seconds(task: Task, choice: Choice) -> float:
    visits = task.sizes.vae / (task.workers[choice.home].link * LINK) if choice.places.vae in (VISITS, DISK) else 0.0
    return _vae(task, choice, task.sizes.decoder_flops) + visits


def _vae(task: Task, choice: Choice, flops: float) -> float:
    device = task.ram if choice.places.vae == CPU else task.workers[choice.home]
    return flops * task.lengths.height * task.lengths.width / (device.flops * ARITHMETIC)


def edge_seconds(task: Task, choice: Choice) -> float:
    """Beginning and end of a denoise step: patch embedder and final layer."""
    sizes, home = task.sizes, task.workers[choice.home]
    flops = 2 * task.lengths.cells * (sizes.patch_values + task.request.rows * sizes.final_values)
    return flops / (home.flops * ARITHMETIC)


def head_seconds(task: Task, choice: Choice) -> float:
    """Scores of one token."""
    device = task.ram if choice.places.lm_head == CPU else task.workers[choice.home]
    return task.sizes.lm_head / (device.bandwidth * BANDWIDTH)


def write_seconds(task: Task, choice: Choice) -> float:
    """The generator's turn, its way to the device included."""
    generator = task.generator
    if generator is None or choice.writer is None:
        return 0.0
    device, condition = task.workers[choice.writer], task.lengths.condition
    width, tokens = generator.width, generator.tokens
    # Three attentions of four products (the cross one's keys and values on the condition) and a feed-forward four times as
    # wide.
    flops = 2 * width**2 * (tokens * (4 + 4 + 2 + 8) + 2 * condition)
    flops += 4 * tokens * width * (generator.row + condition + generator.layers)
    block = flops / (device.flops * ARITHMETIC)
    came = device.link if device.kind == "cpu" else (min(device.link, task.ram.link) if choice.kept == "disk" else device.link)
    if choice.generator == "streamed":
        arrives = generator.block / (came * LINK)
        return arrives + generator.blocks * max(block, arrives)
    return generator.blocks * block + (generator.total / (came * LINK) if choice.generator == "shared" else 0.0)
