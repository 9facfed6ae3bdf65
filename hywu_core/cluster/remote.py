"""A request's own view of a backbone whose stages are actors: the same walk through the stages, one hop from actor to actor.

Owns waiting for actors (with cancel, time-out and an error that names who died), the stage that stands for an actor, and the
session that opens and closes a request on all stages. The desk only ever sees the last stage's result.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import copy
from typing import Any

import ray
import torch
from ray import exceptions as lost

from ..backbone.mask import CanvasSight
from ..backbone.model import Backbone
from ..backbone.stage import Rope
from ..errors import ClusterError, HYWUError
from .admission import Admission
from .wire import PartsLost, opened, parcel

CHECK_S = 0.1  # how often one who waits for an actor looks whether he was cancelled
CPU = torch.device("cpu")


class Actor:
    """An actor of the service, by what it is called in errors. Its layers, if it is a stage: ``first``, ``count``."""

    def __init__(self, handle: Any, name: str, patience_s: float, first: int = 0, count: int = 0):
        self.handle, self.name, self.patience_s, self.first, self.count = handle, name, patience_s, first, count
        self.where = ""
        self.direct = False  # whether it sends and reads directly, see ``direct.py``
        self.is_loading = False  # it was seen dead or was started again, and has not answered since
        self.is_doubted = False  # the next stage could not read from it, and it has not answered since

    def start(self, method: str, *arguments: Any, returns: int = 1) -> Any:
        """Call a method and do not wait: the reference of what it will return."""
        return getattr(self.handle, method).options(num_returns=returns).remote(*arguments)

    def wait(self, reference: Any, check: Callable[[], None]) -> Any:
        """What a call has returned; check is called every tenth of a second and may raise.

        Raises: what the method raised, if it is one of ours; PartsLost if an argument is gone; ClusterError if the actor died,
            is not there or took longer than its patience, after which it is started again.
        """
        self.done(reference, check)
        try:
            return ray.get(reference)
        except lost.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, HYWUError):
                raise cause from None
            if isinstance(cause, torch.OutOfMemoryError):
                raise ClusterError(f"{self} ran out of memory ({str(cause).splitlines()[0]}): ask for a smaller size or fewer "
                                   "pictures, or let fewer requests run at once") from None
            if isinstance(cause, lost.RayError):
                raise self._died(cause) from None
            raise ClusterError(f"{self} failed with {type(cause).__name__}: {str(cause)[:400]}") from None
        except lost.RayError as error:
            raise self._died(error) from None

    def done(self, reference: Any, check: Callable[[], None]) -> None:
        """Wait until a call has come to its end, whatever that is. Raises ClusterError beyond the actor's patience."""
        began = time.monotonic()
        while not ray.wait([reference], timeout=CHECK_S)[0]:
            check()
            if time.monotonic() - began > self.patience_s:
                self._start_again()
                raise ClusterError(f"{self} has not answered for {self.patience_s:.0f} s and is started again: run the request "
                                   "again; if it keeps happening look at the log of its node")

    def call(self, method: str, *arguments: Any, check: Callable[[], None] = lambda: None) -> Any:
        return self.wait(self.start(method, *arguments), check)

    def ready(self, loading_s: float, on_wait: Callable[[], None]) -> dict[str, Any]:
        """What it says of itself, once it is up: one that was started again loads its weights first, for at most ``loading_s``.
        on_wait is called meanwhile and may raise.

        Raises: ClusterError if it does not come up.
        """
        began, reference, reason = time.monotonic(), self.start("hello"), "no answer"
        while True:
            if ray.wait([reference], timeout=CHECK_S)[0]:
                try:
                    said = ray.get(reference)
                    self.where = f" (node {said['node']}, process {said['pid']})"
                    self.is_loading, self.is_doubted, self.direct = False, False, said.get("direct", False)
                    return said
                except lost.RayError as error:
                    if "creation task" in str(error):  # then it is not started again
                        raise ClusterError(f"{self.name} could not be started: {_last_line(error)}") from None
                    reason, self.is_loading = str(error).splitlines()[0], True
                    time.sleep(CHECK_S)
                    reference = self.start("hello")
            waited = time.monotonic() - began
            if not self.is_loading and waited > self.patience_s:
                self._start_again()
                began = time.monotonic()
            elif waited > loading_s:
                raise ClusterError(f"{self.name} is not up after {loading_s:.0f} s ({reason}): look at `ray status` and at the "
                                   "log of its node, then start the service again with `hywu serve`")
            on_wait()

    def __str__(self) -> str:
        return self.name + self.where

    def _start_again(self) -> None:
        self.is_loading = True
        ray.kill(self.handle, no_restart=False)

    def _died(self, error: Exception) -> ClusterError:
        if isinstance(error, lost.ObjectLostError):
            return PartsLost(f"what {self} needs lay in a process that has died ({type(error).__name__}): run the request "
                             "again")
        self.is_loading = True
        return ClusterError(f"{self} died or cannot be reached while the request was under way "
                            f"({type(error).__name__}); it is started again and loads its weights, run the request again")


def _last_line(error: Exception) -> str:
    """What a traceback that came as text ends with, without the path of the error's class."""
    line = [line for line in str(error).splitlines() if line.strip()][-1].strip()
    head, colon, rest = line.partition(": ")
    return f"{head.rpartition('.')[2]}: {rest}" if colon else line


class Travelling:
    """Hidden states on their way through the stages: what an actor's pass will return. ``to`` waits and brings it
    here."""

    def __init__(self, actor: Actor, reference: Any, before: "Travelling | None", check: Callable[[], None],
                 on_layer: Callable[[int], None]):
        self.reference = reference
        self._actor, self._before, self._check, self._on_layer = actor, before, check, on_layer

    def to(self, device: torch.device) -> torch.Tensor:
        """Raises: as ``Actor.wait``, for the first stage on the way that failed."""
        self._arrive()
        try:
            return opened(self._actor.wait(self.reference, self._check), device)
        except HYWUError:
            if self._before is not None:
                self._before.blame()  # a failed stage fails all behind it
            raise

    def blame(self) -> None:
        """Raises what ``to`` does, and brings nothing. What came through so far may still have died with what it holds."""
        if self._before is not None:
            self._before.blame()
        self._actor.wait(self.reference, self._check)
        self._actor.is_doubted = True

    def _arrive(self) -> None:
        if self._before is not None:
            self._before._arrive()
        self._actor.done(self.reference, self._check)
        for layer in range(self._actor.first, self._actor.first + self._actor.count):
            self._on_layer(layer)


class Session:
    """A request on the stages, from its first cache to ``close``.

    loras: (header, a reference for each stage's part) of each. slots: how many more slots its cache will need than it asks for,
    so that it never has to ask again for memory that others may hold by then.
    """

    def __init__(self, request: str, user: str, stages: Sequence[Actor], admission: Admission, check: Callable[[], None],
                 on_place: Callable[[int], None], all_up: Callable[[], None], bytes_of: Callable[[int, int, int, bool], int],
                 loras: Sequence[tuple] = (), lora_bytes: Sequence[int] = (), slots: int = 0):
        self.request, self.user, self.stages, self.check = request, user, stages, check
        self._admission, self.on_place, self._all_up, self._bytes = admission, on_place, all_up, bytes_of
        self._loras, self._lora_bytes, self._slots = loras, lora_bytes or [0] * len(stages), slots
        self._aside: tuple[tuple, int, Any] = ((None,) * 3, -1, None)
        self._held = ExitStack()
        self._opening: list[tuple[Actor, Any]] = []

    def open(self, rows: int, capacity: int) -> None:
        """Wait for room, and open on all stages; once."""
        if self._opening:
            return
        capacity += self._slots
        need = [self._bytes(stage.count, rows, capacity, stage.direct) + own
                for stage, own in zip(self.stages, self._lora_bytes, strict=True)]
        self._held.enter_context(self._admission.admitted(self.user, need, self.on_place))
        self._all_up()  # a part may have died while this request waited
        headers = [header for header, _ in self._loras]
        own = zip(*(parts for _, parts in self._loras), strict=True) if self._loras else [()] * len(self.stages)
        for stage, parts in zip(self.stages, own, strict=True):
            self._opening.append((stage, stage.start("open", self.request, rows, capacity, headers, *parts)))
        for stage, reference in self._opening:
            stage.wait(reference, self.check)

    def close(self) -> torch.Tensor | None:
        """Give back what it holds everywhere; returns (N, E) int64 routed tokens, None where a stage is gone. Never raises for
        a stage that died: what it held is gone with it."""
        counts = []
        with self._held:
            # An opening that nobody has waited for ends before it is closed.
            for stage, reference in self._opening:
                try:
                    stage.done(reference, lambda: None)
                    counts.append(opened(stage.call("close", self.request), CPU))
                except ClusterError:
                    continue
            self._opening = []
        return torch.cat(counts) if counts and len(counts) == len(self.stages) else None

    def view(self, backbone: Backbone) -> Backbone:
        """The desk's backbone with this request's stages; modules are shared."""
        mine = copy(backbone)
        mine.stages = tuple(RemoteStage(self, index) for index in range(len(self.stages)))
        return mine

    def aside(self, rope: Rope, mask: torch.Tensor | CanvasSight | None, positions_L: torch.Tensor | None, length: int) -> Any:
        """What all stages of a pass get beside the hidden states, put once where all can fetch it."""
        given = (rope[0], mask, positions_L)
        last, last_length, reference = self._aside
        if length != last_length or any(one is not other for one, other in zip(given, last, strict=True)):
            sight = isinstance(mask, CanvasSight)
            plain = mask.causal_SK if sight else mask
            reference = ray.put({
                "cos": parcel(rope[0]), "sin": parcel(rope[1]), "mask": None if plain is None else parcel(plain),
                "keys": mask.keys if sight else None, "length": length,
                "positions": None if positions_L is None else parcel(positions_L)})
            self._aside = (given, length, reference)
        return reference


class RemoteCache:
    """Stands for an actor's cache: it has to know how far it is used."""

    def __init__(self):
        self.length = 0

    def reserve(self, length: int) -> None:
        self.length = max(self.length, length)


class RemoteStage:
    """Stands for an actor in a backbone's row of stages."""

    device = CPU

    def __init__(self, session: Session, index: int):
        self._session, self._actor = session, session.stages[index]
        self._next = session.stages[index + 1] if index + 1 < len(session.stages) else None

    def rest(self) -> None:
        """Actors rest by themselves."""

    def new_cache(self, rows: int, capacity: int) -> RemoteCache:
        self._session.open(rows, capacity)
        return RemoteCache()

    def run(self, hidden: torch.Tensor | Travelling, rope: Rope, mask: torch.Tensor | CanvasSight | None,
            cache: RemoteCache | None, positions_L: torch.Tensor | None, on_layer: Callable[[int], None]) -> Travelling:
        """As ``Stage.run``, but only started: the next stage's call waits for it, and whoever wants the numbers."""
        session, actor = self._session, self._actor
        aside = session.aside(rope, mask, positions_L, 0 if cache is None else cache.length)
        before = hidden if isinstance(hidden, Travelling) else None
        given = parcel(hidden) if before is None else before.reference
        directly = self._next is not None and actor.direct and self._next.direct
        reference = actor.start("run", session.request if cache is not None else None, given, aside, directly)
        return Travelling(actor, reference, before, session.check, on_layer)
