"""How many edits a minute a cluster does for how many users, simulated from the plan's seconds and bytes.

Owns ``Service`` (stages, generator and towers as numbers), ``simulate``, which passes requests through them event by event, and
the table of docs/cluster.md, where the assumptions stand. What a stage takes and holds says ``placement/``.

``python -m comfyui_hywu.benchmarks.cluster_simulation`` prints the table; ``--write`` puts it between the markers of the page.
"""

import argparse
import functools
import heapq
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..hywu_core.config import BackboneConfig, GeneratorConfig
from ..hywu_core.generator.sizes import generator_sizes
from ..hywu_core.placement import activations, memory, search, seconds
from ..hywu_core.placement.devices import parse_devices
from ..hywu_core.placement.request import Request, lengths
from ..hywu_core.placement.sizes import GeneratorSizes, model_sizes
from .record import between

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "cluster.md"
CONFIGS = [ROOT / "tests" / "data" / "real-config" / f"{name}.config.json" for name in ("hunyuanimage3-instruct", "hy-wu")]
RATE, LATENCY = 25e9 / 8, 0.5e-3  # of a message between two processes: bytes/s of the network, seconds that Ray adds
GOLDEN = (5**0.5 - 1) / 2  # its multiples fill an interval evenly from the first on
GPUS, USERS, PAUSES, STAGES, SPREAD = (1, 2, 4, 8, 16, 32, 64), (1, 10, 50, 200), (0.0, 60.0), range(1, 9), 0.5
CROWD = 50  # users on one service
CARDS = (("h100", "bf16"), ("h100", "fp8"), ("h100", "int4"), ("4090", "int4"))


@dataclass(frozen=True)
class Pass:
    """Seconds of a pass on each stage, and of each of its hops: from stage to stage and from the last to the first."""

    stages: tuple[float, ...]
    hop: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.stages) + len(self.stages) * self.hop


@dataclass(frozen=True)
class Service:
    """What serves a number of users together, in seconds and bytes.

    prompt, first: the pass that reads the prompt, the first denoise pass; token, encode, step: the others. tokens, steps: how
    many. pictures, generate, decode: of towers and generator; generator_on, tower_on: numbers of the devices that they share
    with a stage, one that no stage has for a device of their own. slices: after each of so many parts of its work the generator
    lets others on its device. free: of each stage's device without requests; request: what one holds there while it thinks or
    denoises; most: how many may do so, whatever they hold. cores: how many devices can work at once (None: all).
    """

    prompt: Pass
    token: Pass
    encode: Pass
    first: Pass
    step: Pass
    tokens: int
    steps: int
    pictures: float = 0.0
    generate: float = 0.0
    decode: float = 0.0
    generator_on: int = 0
    tower_on: int = 0
    slices: int = 1
    free: tuple[int, ...] = (1 << 60,)
    request: tuple[int, ...] = (1,)
    most: int = 16
    cores: int | None = None

    @property
    def devices(self) -> int:
        return max(len(self.step.stages), self.generator_on + 1, self.tower_on + 1)

    @property
    def at_once(self) -> int:
        """How many requests may think or denoise."""
        return min(self.most, *(max(0, free // one) for free, one in zip(self.free, self.request, strict=True)))

    @property
    def passes(self) -> list[tuple[str, Pass, int]]:
        """A request's passes in their order: of which kind, and how many."""
        counts = {"prompt": min(self.tokens, 1), "token": self.tokens, "encode": 1, "first": 1, "step": self.steps - 1}
        return [(kind, getattr(self, kind), count) for kind, count in counts.items()]

    @property
    def solo(self) -> float:
        """Of a request that is alone."""
        return self.pictures + self.generate + self.decode + sum(count * each.total for _, each, count in self.passes)

    @property
    def loads(self) -> tuple[float, ...]:
        """What one request asks of every device."""
        loads = [0.0] * self.devices
        for _, each, count in self.passes:
            for stage, took in enumerate(each.stages):
                loads[stage] += count * took
        loads[self.tower_on] += self.pictures + self.decode
        loads[self.generator_on] += self.generate
        return tuple(loads)

    @property
    def bottleneck(self) -> float:
        """The least seconds between two finished requests, however many users there are; infinite if not one fits."""
        held = self.solo - self.pictures - self.generate - self.decode - self.encode.total - self.token.hop - self.step.hop
        return max(*self.loads, sum(self.loads) / (self.cores or math.inf), held / self.at_once if self.at_once else math.inf)


@dataclass(frozen=True)
class Result:
    """per_minute: edits, by the work that the busiest device did, so one that the measured time cuts counts in part. mean_s and
    p95_s (of 95 in 100): from sending to the picture. utilisation: of devices. finished: edits of each user since the start."""

    per_minute: float
    mean_s: float
    p95_s: float
    utilisation: tuple[float, ...]
    finished: tuple[int, ...]


ARRIVE, DONE, SEND = range(3)


@functools.cache
def simulate(service: Service, users: int | tuple[int, ...], pause_s: float = 0.0, *, edits: int | None = None,
             spread: float = 0.0, tokens_first: bool = False) -> Result:
    """Users who send an edit, wait for it, pause and send the next.

    Args:
        users: how many, or of each how many edits it has under way at a time.
        edits: that finish in the measured time, which begins when as many have finished as are under way at a time.
        spread: thinking is as much longer or shorter than the service's, evenly spread, by a fixed sequence.
        tokens_first: a device takes passes of one token before all others, instead of what came first.
    """
    parallel = (1,) * users if isinstance(users, int) else users
    sent, at_once, cores = sum(parallel), service.at_once, service.cores or math.inf
    if not sent or not at_once:
        raise ValueError(f"{sent} requests, of which {at_once} fit into memory at a time: both have to be 1 or more")
    edits = edits or max(sent, 24)
    program, gates, loop = _program(service)
    order, stations = itertools.count(), service.devices
    working, queues, busy = [False] * stations, [[] for _ in range(stations)], [0.0] * stations
    turns, finished, latencies, waiting = [0] * len(parallel), [0] * len(parallel), [], []
    running = held = turn = done = began = now = 0

    def sending(number: int, user: int, at: float) -> tuple:
        """A request: its place in the program, its user, when it was sent, tokens that it will think."""
        tokens = round(service.tokens * (1 + spread * (2 * (number * GOLDEN % 1) - 1)))
        return at, next(order), SEND, [0, user, at, tokens]

    def start(station: int, request: list) -> None:
        nonlocal running
        working[station], running = True, running + 1
        took = program[request[0]][1]
        busy[station] += took
        heapq.heappush(events, (now + took, next(order), DONE, request))

    everybody = (user for user, count in enumerate(parallel) for _ in range(count))
    events = [sending(number, user, (service.solo + pause_s) * number / sent) for number, user in enumerate(everybody)]
    while done < sent + edits:
        now, number, kind, request = heapq.heappop(events)
        if kind == ARRIVE:
            station, _, _, token = program[request[0]]
            if working[station] or running >= cores:
                heapq.heappush(queues[station], (not (token and tokens_first), number, request))
            else:
                start(station, request)
            continue
        way = 0.0
        if kind == DONE:
            station, _, way, _ = program[request[0]]
            working[station], running = False, running - 1
            if cores < math.inf:  # whoever has waited longest of those whose station is free
                free = [each for each, ahead in enumerate(queues) if ahead and not working[each]]
                station = min(free, key=lambda each: queues[each][0][:2], default=station)
            if queues[station]:
                start(station, heapq.heappop(queues[station])[2])
            if request[0] == loop.stop - 1 and request[3] > 2:
                request[0], request[3] = loop.start, request[3] - 1
            else:
                request[0] += 1
                held -= gates.get(request[0]) == "out"
        if request[0] == len(program):
            done += 1
            finished[request[1]] += 1
            latencies.append(now - request[2])
            heapq.heappush(events, sending(sent + done, request[1], now + pause_s))
            if done == sent:
                began, busy[:] = now, [0.0] * stations
        elif gates.get(request[0]) == "in":
            waiting.append(request)
        else:
            heapq.heappush(events, (now + way, next(order), ARRIVE, request))
        while waiting and held < at_once:  # the user who was let in least recently
            admitted = min(waiting, key=lambda request: turns[request[1]])
            waiting.remove(admitted)
            held, turn = held + 1, turn + 1
            turns[admitted[1]] = turn
            heapq.heappush(events, (now, next(order), ARRIVE, admitted))
    measured = sorted(latencies[sent:])
    used = tuple(min(1.0, each / (now - began)) for each in busy)
    share, load = max(zip(used, service.loads, strict=True), key=lambda pair: pair[1])
    return Result(60 * share / load, sum(measured) / edits, measured[math.ceil(0.95 * edits) - 1], used, tuple(finished))


def _program(service: Service) -> tuple[list[tuple[int, float, float, bool]], dict[int, str], range]:
    """A request's visits as (station, seconds, seconds on the way to the next, whether of one token); before which it needs
    memory ("in") and has given it back ("out"); and which are repeated for every token but the first."""
    visits, gates, loop = [(service.tower_on, service.pictures, 0.0, False)], {}, range(-1, -1)
    for kind, each, count in service.passes:
        if kind == "encode" and service.tokens:
            gates[len(visits)] = "out"
        if kind == "first":
            visits += [(service.generator_on, service.generate / service.slices, 0.0, False)] * service.slices
        if kind in ("prompt", "first") and count:
            gates[len(visits)] = "in"
        if kind == "token" and count > 1:
            loop, count = range(len(visits) + len(each.stages), len(visits) + 2 * len(each.stages)), 2
        visits += [(stage, took, each.hop, kind == "token") for stage, took in enumerate(each.stages)] * count
    gates[len(visits)] = "out"
    return [*visits, (service.tower_on, service.decode, 0.0, False)], gates, loop


def service_of(task: memory.Task, found: search.Arrangement, generator: GeneratorSizes) -> Service:
    """What a plan's search has found as a service, rows together in every pass, the desk on the home device.

    generator: if the plan is without one, it has another card of its own.
    """
    sizes, many, choice, own = task.sizes, task.lengths, found.choice, task.generator is None
    at = [(index, *pair) for index, pair in enumerate(zip(found.layers, found.resident, strict=True)) if pair[0]]
    took = [seconds.stage_seconds(task, choice, *stage) for stage in at]
    token = [seconds.token_seconds(task, choice, *stage) for stage in at]
    home = [float(index == choice.home) for index, _, _ in at]
    edge, head = seconds.edge_seconds(task, choice), seconds.head_seconds(task, choice)
    writing, writer = task, choice
    if own:
        writing = replace(task, generator=generator, devices=(*task.workers, task.workers[0], task.ram))
        writer = replace(choice, generator="resident", writer=len(task.workers))

    def passing(stages, tokens: int, ends: float = 0.0) -> Pass:
        hop = LATENCY * (len(at) + 1) / len(at) + (activations.states(sizes, tokens) / RATE if len(at) > 1 else 0.0)
        return Pass(tuple(each + ends * here for each, here in zip(stages, home, strict=True)), hop)

    free, request = zip(*(_room(task, choice, *stage) for stage in at), strict=True)
    rows, split = task.request.rows, many.whole - many.shared
    return Service(
        prompt=passing([stage.think - many.thought * each for stage, each in zip(took, token, strict=True)], many.prompt),
        token=passing(token, 1, head), encode=passing([stage.encode for stage in took], many.condition),
        first=passing([stage.shared + stage.tail for stage in took], many.shared + rows * split, edge),
        step=passing([stage.step for stage in took], rows * many.canvas, edge), tokens=many.thought, steps=task.request.steps,
        pictures=seconds.picture_seconds(task, choice), generate=seconds.write_seconds(writing, writer),
        decode=seconds.decode_seconds(task, choice), tower_on=home.index(1.0),
        generator_on=len(at) if own else [index for index, _, _ in at].index(choice.writer), slices=generator.blocks,
        free=free, request=request)


def _room(task: memory.Task, choice: memory.Choice, index: int, layers: int, resident: int) -> tuple[int, int]:
    """Bytes of a device that requests may share, and what one takes: keys and values, its shard of the LoRA, at home its
    encoded pictures and condition."""
    sizes, many, states = task.sizes, task.lengths, 0
    if index == choice.home:
        states = activations.source_tokens(sizes, task.request.pictures, many) + activations.states(sizes, many.condition)
    others = max(sum(nbytes for name, nbytes in items.items() if name not in ("KV", "LoRA"))
                 for items in memory.held(task, choice, index, layers, resident).values())
    kv = max(activations.kv_layer(sizes, task.request.rows, many.whole), activations.thinking_kv(sizes, many)[1])
    return search.usable(task.workers[index]) - others + states, layers * (kv + sizes.lora) + states


def service_of_measured(stages: Mapping[str, Sequence[float]], trips: Mapping[str, float], *, desk: float, tokens: int,
                        steps: int, at_once: int, **rest) -> Service:
    """A real service, every part in a process of its own, from timings of one request alone. Its devices are the desk, the
    stages, the generator, the towers.

    Args:
        stages: "prompt", "token", "encode", "first", "step" -> seconds of such a pass on each stage. Where "prompt" and "first"
            are missing, "encode" and "step" stand for them.
        trips: the same -> seconds of the whole pass, the desk's own ``desk`` included.
        at_once: how many requests may think or denoise.
        rest: further fields of ``Service``: pictures, generate, decode, cores.
    """
    instead = {"prompt": "encode", "first": "step"}
    timed = {kind: kind if kind in stages else instead[kind] for kind in ("prompt", "token", "encode", "first", "step")}
    passes = {kind: Pass((desk, *stages[of]), max(0.0, trips[of] - desk - sum(stages[of])) / (len(stages[of]) + 1))
              for kind, of in timed.items()}
    count = len(stages["step"]) + 1
    return Service(**passes, tokens=tokens, steps=steps, most=at_once, generator_on=count, tower_on=count + 1, **rest)


@functools.cache
def fitting(card: str, form: str) -> tuple[Service, ...]:
    """Services of the published model on so many stages, with a generator beside one of them or on a card of its own."""
    backbone, writer = (json.loads(path.read_text()) for path in CONFIGS)
    sizes, generator = model_sizes(BackboneConfig.from_dict(backbone), torch.bfloat16), generator_sizes(
        GeneratorConfig.from_dict(writer))
    tasks = [memory.Task(sizes, writer, Request(), lengths(sizes.config, Request()), parse_devices(f"{count}x{card}"))
             for count, writer in itertools.product(STAGES, (generator, None))]
    found = [service_of(task, arranged, generator) for task in tasks if (arranged := search.find(task, form, "none"))]
    return tuple(service for service in found if service.at_once)


def rate(service: Service, services: int, users: int, pause_s: float, tokens_first: bool = False) -> float:
    """Edits a minute of equal services, users spread evenly over them; there is a queue at each long before ``CROWD``."""
    fewer, more = divmod(users, services)
    return sum(count * simulate(service, min(each, CROWD), pause_s, spread=SPREAD, tokens_first=tokens_first).per_minute
               for count, each in ((more, fewer + 1), (services - more, fewer)) if count and each)


def table() -> str:
    """For every number of cards the services that could do most if their busiest devices were never idle."""
    users = [(count, first) for first in (False, True) for count in (USERS if not first else USERS[-1:])]
    head = ("cards", "services", "at once", "could do", "pause, s", *(
        f"{count} user{'s' * (count > 1)}{', tokens first' * first}" for count, first in users))
    lines = [head, ["---"] * len(head)]
    for (card, form), gpus in itertools.product(CARDS, GPUS):
        found = [(gpus // service.devices, service) for service in fitting(card, form) if service.devices <= gpus]
        if not found:
            lines.append((f"{gpus} {card}, {form}", "does not fit", *[""] * (len(head) - 2)))
            continue
        services, service = max(found, key=lambda pair: pair[0] / pair[1].bottleneck)
        stages, own = len(service.step.stages), service.devices - len(service.step.stages)
        name = f"{services} x ({stages}{f' + {own}' * (own > 0)})"
        for pause in PAUSES:
            rates = [(count, rate(service, services, count, pause, first)) for count, first in users]
            lines.append((f"{gpus} {card}, {form}", name, services * service.at_once,
                          f"{60 * services / service.bottleneck:.3g}", f"{pause:.0f}",
                          *(f"{each:.3g} ({60 * count / each - pause:.0f} s)" for count, each in rates)))
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into docs/cluster.md")
    text = table()
    print(text)
    if parser.parse_args().write:
        PAGE.write_text(between(PAGE.read_text(), "simulation", text))


if __name__ == "__main__":
    main()
