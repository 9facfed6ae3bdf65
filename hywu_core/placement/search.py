"""Finds the fastest arrangement that fits: over all choices of places, and for each over all ways to cut the layers.

Owns the search; bytes are ``memory.py``'s, seconds ``seconds.py``'s. Exact, so that more memory never makes a plan slower:
every choice whose bound (all layers resident, no memory counted) beats the best found so far is cut in the best way it can be.
(Where RAM is what runs out, the one other cut that is tried streams the fewest layers.)

How layers are cut: with n of them a device keeps as many as fit. What an edit takes is a sum over devices (one after the
other), or with waves a sum and the slowest device once more, so a recurrence over devices finds the best cut, once for each
value that the slowest may have.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from . import seconds
from .activations import EXPERT_TOKENS
from .devices import Device
from .memory import CPU_LEVELS, LEVELS, Choice, Task, held, peak, ram_items

# Of what is free on a GPU: blocks that the allocator cannot hand out whole, and the libraries' workspaces.
HEADROOM = 0.03
STREAMING = ("none", "ram", "disk")
FAR = 1e12  # seconds; no plan takes as long


@dataclass(frozen=True)
class Arrangement:
    """A choice and how the layers are cut: of each worker its number of layers and how many of them are resident."""

    choice: Choice
    layers: tuple[int, ...]
    resident: tuple[int, ...]
    total_seconds: float


@dataclass(frozen=True)
class Shortage:
    """The device that lacks most in the arrangement that needs least, and its bytes."""

    device: Device
    phase: str
    needed: int
    usable: int


def usable(device: Device) -> int:
    """Bytes that a plan may fill."""
    return device.free if device.kind == "cpu" else int(device.free * (1 - HEADROOM))


def find(task: Task, form: str, source: str) -> Arrangement | None:
    """The fastest arrangement in one format whose streamed layers wait in ``source`` ("none": there are none)."""
    tables = _Tables(task)
    ranked = []
    for order, choice in enumerate(choices(task, form, source)):
        ranked.append((_fixed(task, choice) + tables.bound(choice), order, choice))
    best: Arrangement | None = None
    for bound, _, choice in sorted(ranked, key=lambda item: item[:2]):
        if best is not None and bound >= best.total_seconds:
            break
        found = tables.cut(choice, source)
        if found is not None and (best is None or found.total_seconds < best.total_seconds):
            best = found
    return None if best is None else _with_a_third_buffer(task, best)


def choices(task: Task, form: str, source: str) -> Iterator[Choice]:
    """Everything that can be decided besides the cut, the simplest first; of equal devices only the first is tried."""
    workers = task.workers
    alone = workers[0].kind == "cpu"
    waiting = "ram" if source == "none" else source
    kinds = {replace(device, name=""): index for index, device in reversed(list(enumerate(workers)))}
    for places in CPU_LEVELS if alone else LEVELS:
        for tokens in EXPERT_TOKENS:
            for home in sorted(kinds.values()):
                base = Choice(form, places, home, expert_tokens=tokens, source=waiting)
                waves = (1, 2) if len(workers) > 1 and task.request.rows == 2 else (1,)
                for writer in _writers(task, base, alone):
                    yield from (replace(writer, waves=count) for count in waves)


def _writers(task: Task, base: Choice, alone: bool) -> Iterator[Choice]:
    if task.generator is None:
        yield base
        return
    workers = task.workers
    # Of equal devices one without the home's parts has more room.
    classes = {(replace(device, name=""), index == base.home): index for index, device in enumerate(workers)}
    for writer in sorted(classes.values()):
        yield replace(base, generator="resident", writer=writer)
        for mode in ("shared", "streamed"):
            for kept in ("disk",) if alone else ("ram", "disk"):
                yield replace(base, generator=mode, writer=writer, kept=kept)


def _fixed(task: Task, choice: Choice) -> float:
    """Seconds that do not depend on the cut."""
    return (seconds.picture_seconds(task, choice) + seconds.write_seconds(task, choice) + seconds.decode_seconds(task, choice)
            + task.request.steps * seconds.edge_seconds(task, choice)
            + task.lengths.thought * seconds.head_seconds(task, choice))


# Seconds by the square of a stage's layers: of cuts that take the same time, the even one.
EVEN = 1e-6


class _Tables:
    """Memory and seconds of every worker for every number of layers in one format and source, kept while one search lasts."""

    def __init__(self, task: Task):
        self._task, self._count = task, task.sizes.layers
        self._kinds = [replace(device, name="") for device in task.workers]  # equal devices share what is worked out
        self._seconds: dict[tuple, tuple[float, float, float]] = {}
        self._bounds: dict[tuple, float] = {}
        self._rooms: dict[tuple, list[int]] = {}

    def bound(self, choice: Choice) -> float:
        """The least that passing the layers can take: as if all memory were free."""
        key = (choice.expert_tokens, choice.waves)
        if key not in self._bounds:
            counts = range(self._count + 1)
            costs = np.array([[self._cost(choice, index, n, n) for n in counts] for index in range(len(self._task.workers))])
            self._bounds[key] = _best_cut(costs, choice.waves)[0]
        return self._bounds[key]

    def cut(self, choice: Choice, source: str) -> Arrangement | None:
        """The best cut under a choice, None if there is none."""
        task = self._task
        resident = np.array([self._resident(choice, index, source) for index in range(len(task.workers))])
        costs = np.full((*resident.shape, 3), FAR)
        for index, layers in zip(*np.nonzero(resident >= 0), strict=True):
            costs[index, layers] = self._cost(choice, index, int(layers), int(resident[index, layers]))
        streamed = np.arange(self._count + 1) - resident
        found = self._checked(choice, costs, resident, streamed)
        if found is None and task.workers[0].kind != "cpu" and source == "ram":
            # Too much for RAM: first of all as few streamed layers as can be.
            dear = costs + (streamed * FAR / 1e6)[..., None] * np.array([1, 1, 0])
            found = self._checked(choice, dear, resident, streamed)
        return found

    def _checked(self, choice: Choice, costs: np.ndarray, resident: np.ndarray, streamed: np.ndarray) -> Arrangement | None:
        task = self._task
        total, cut = _best_cut(costs, choice.waves)
        if total >= FAR:
            return None
        kept = tuple(int(resident[index, layers]) for index, layers in enumerate(cut))
        if task.workers[0].kind != "cpu" and not fits_in_ram(task, choice, sum(cut) - sum(kept)):
            return None
        times = [self._cost(choice, index, *pair) for index, pair in enumerate(zip(cut, kept, strict=True))]
        total = sum(time[choice.waves - 1] for time in times) + (max(time[2] for time in times) if choice.waves == 2 else 0.0)
        return Arrangement(choice, cut, kept, _fixed(task, choice) + total)

    def _resident(self, choice: Choice, index: int, source: str) -> list[int]:
        """Of every number of layers how many can be resident, -1 where even streaming them all does not fit."""
        home, writes = index == choice.home, index == choice.writer
        key = (self._kinds[index], choice.expert_tokens, choice.waves, home and choice.places, writes and choice.generator)
        if key not in self._rooms:
            self._rooms[key] = self._counted(choice, index, source)
        return self._rooms[key]

    def _counted(self, choice: Choice, index: int, source: str) -> list[int]:
        task, room = self._task, usable(self._task.workers[index])
        whole = _straight(lambda n: held(task, choice, index, n, n), (1, 2))
        partly = [_straight(lambda n, r=r: held(task, choice, index, n, r), (3, 4)) for r in (0, 1)]
        most = [0 if peak(held(task, choice, index, 0, 0))[1] <= room else -1]
        for n in range(1, self._count + 1):
            if all(start + n * each <= room for start, each in whole.values()):
                most.append(n)
                continue
            if source == "none":
                most.append(-1)
                continue
            fits = n - 1
            for phase, (start, each) in partly[0].items():
                needed = start + n * each
                more = sum(partly[1][phase]) - sum(partly[0][phase])  # by a resident layer
                if needed > room:
                    fits = -1
                elif more > 0:
                    fits = min(fits, int((room - needed) // more))
            most.append(fits)
        return most

    def _cost(self, choice: Choice, index: int, layers: int, resident: int) -> tuple[float, float, float]:
        """Seconds of a stage in an edit: with all rows at once; with waves, what adds up, and what the slowest costs once
        more."""
        key = (self._kinds[index], choice.expert_tokens, layers, resident)
        if key not in self._seconds:
            stage, later = seconds.stage_seconds(self._task, choice, index, layers, resident), self._task.request.steps - 1
            before, row = stage.think + stage.encode + stage.shared, stage.row_tail + later * stage.row_step
            even = EVEN * layers**2
            self._seconds[key] = (before + stage.tail + later * stage.step + even, before + row + even, row)
        return self._seconds[key]


def _straight(phases, points: tuple[int, int]) -> dict[str, tuple[float, float]]:
    """Bytes of each phase as (start, each layer's): they grow in a straight line with the number of layers."""
    first, second = ({phase: sum(items.values()) for phase, items in phases(n).items()} for n in points)
    return {phase: (first[phase] - points[0] * (second[phase] - first[phase]), second[phase] - first[phase]) for phase in first}


def _best_cut(costs: np.ndarray, waves: int) -> tuple[float, tuple[int, ...]]:
    """costs (workers, layers + 1, 3) to the least seconds and the layers of each worker."""
    if waves == 1:
        return _recurrence(costs[:, :, 0])
    slowest, count = costs[:, :, 2], costs.shape[1] - 1
    best: tuple[float, tuple[int, ...]] = (FAR, ())
    least = _recurrence(costs[:, :, 1])[0]
    for cap in np.unique(slowest[slowest < FAR]):
        if least + cap >= best[0]:
            break
        within = slowest <= cap
        # Enough layers for everybody together, before the recurrence is asked.
        if (np.arange(count + 1) * within).max(1).sum() < count:
            continue
        total, cut = _recurrence(np.where(within, costs[:, :, 1], FAR))
        if total + cap < best[0]:
            best = (total + cap, cut)
    return best


def _recurrence(costs: np.ndarray) -> tuple[float, tuple[int, ...]]:
    """costs (workers, layers + 1): which cut of all layers costs least in sum."""
    workers, count = costs.shape[0], costs.shape[1] - 1
    totals = np.full(count + 1, FAR)
    totals[0] = 0.0
    index = np.arange(count + 1)[:, None] - np.arange(count + 1)  # what the others have, by (all so far, mine)
    taken = []
    for worker in range(workers):
        sums = np.where(index >= 0, totals[np.maximum(index, 0)] + costs[worker], FAR)
        taken.append(sums.argmin(1))
        totals = sums.min(1)
    if totals[count] >= FAR:
        return FAR, ()
    cut, left = [], count
    for worker in reversed(range(workers)):
        cut.append(int(taken[worker][left]))
        left -= cut[-1]
    return float(totals[count]), tuple(reversed(cut))


def fits_in_ram(task: Task, choice: Choice, streamed: int) -> bool:
    return sum(ram_items(task, choice, streamed).values()) <= usable(task.ram)


def _with_a_third_buffer(task: Task, found: Arrangement) -> Arrangement:
    """A third ring buffer smooths what the link delivers; it is worth memory that nothing else wants."""
    choice = replace(found.choice, ring=3)
    for index, (layers, resident) in enumerate(zip(found.layers, found.resident, strict=True)):
        if peak(held(task, choice, index, layers, resident))[1] > usable(task.workers[index]):
            return found
    return replace(found, choice=choice)


def shortage(task: Task, form: str, source: str) -> Shortage:
    """What is missing where, in the arrangement that comes nearest: layers cut evenly, as many streamed as may be."""
    workers, count = task.workers, task.sizes.layers
    free = [usable(device) for device in workers]
    ends = [count * sum(free[:index]) // sum(free) for index in range(len(free) + 1)]
    layers = [end - begin for begin, end in zip(ends, ends[1:], strict=False)]
    least: Shortage | None = None
    for choice in choices(task, form, source):
        worst: Shortage | None = None
        for index, device in enumerate(workers):
            phase, needed = peak(held(task, choice, index, layers[index], layers[index] if source == "none" else 0))
            if worst is None or needed - usable(device) > worst.needed - worst.usable:
                worst = Shortage(device, phase, needed, usable(device))
        if workers[0].kind != "cpu":
            needed = sum(ram_items(task, choice, 0 if source == "none" else count).values())
            if needed - usable(task.ram) > worst.needed - worst.usable:
                worst = Shortage(task.ram, "loading", needed, usable(task.ram))
        if least is None or worst.needed - worst.usable < least.needed - least.usable:
            least = worst
    return least
