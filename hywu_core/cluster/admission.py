"""Who may begin: requests wait until every stage has room for them, and users take turns.

Owns the order and the sums. Who waits longest is not next if he has had his turn: among waiting users the one who was let in
least recently is first, and none overtakes him because his own request is smaller (or large ones would wait for ever).
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..errors import RequestError

LOOK_AGAIN_S = 0.1  # how often one who waits asks whether he has been cancelled


@dataclass(eq=False)
class _Waiting:
    user: str
    need: tuple[int, ...]
    arrived: int  # the number of the turn when it came


@dataclass
class Admission:
    """capacity: bytes that requests may hold on each stage, all together. at_once: how many may run, whatever they hold."""

    capacity: Sequence[int]
    at_once: int
    held: list[int] = field(init=False)
    running: int = field(default=0, init=False)

    def __post_init__(self):
        self.held = [0] * len(self.capacity)
        self._waiting: list[_Waiting] = []
        self._turns: dict[str, int] = {}  # user -> the number of the turn in which he was last let in
        self._turn = 0
        self._order: list[_Waiting] | None = None  # as long as nothing changes
        self._changed = threading.Condition()

    @contextmanager
    def admitted(self, user: str, need: Sequence[int], on_place: Callable[[int], None]) -> Iterator[None]:
        """Wait for room of ``need`` bytes on each stage, and hold it while the block runs.

        on_place is called with the place in the queue (1: next) when it changes and every tenth of a second, and may raise.

        Raises: RequestError for more than there is when nobody else is there.
        """
        for stage, (needed, there) in enumerate(zip(need, self.capacity, strict=True)):
            if needed > there:
                raise RequestError(f"the request needs {needed / 1e9:.2f} GB on stage {stage} of the cluster, requests have "
                                   f"{there / 1e9:.2f} GB there: ask for a smaller size, fewer pictures or less thinking")
        with self._changed:
            me = _Waiting(user, tuple(need), self._turn)
            self._waiting.append(me)
            self._order = None
            try:
                while not self._is_next(me):
                    place = self.order().index(me) + 1
                    self._changed.release()
                    try:
                        on_place(place)
                    finally:
                        self._changed.acquire()
                    if not self._is_next(me):
                        self._changed.wait(LOOK_AGAIN_S)
                self._add(me.need, 1)
                self._turn += 1
                self._turns[user] = self._turn
            finally:
                self._waiting.remove(me)
                self._order = None
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._add(me.need, -1)
                self._changed.notify_all()

    def order(self) -> list[_Waiting]:
        """Those who wait, in the order in which they will be let in as things are.

        Somebody new counts as let in when he came, or a row of new names would keep an old one waiting for ever.
        """
        if self._order is not None:
            return self._order
        # Whose turn is long past is no better known than somebody new.
        oldest = min((waiting.arrived for waiting in self._waiting), default=self._turn)
        self._turns = {user: number for user, number in self._turns.items() if number >= oldest}
        turns, turn = dict(self._turns), self._turn
        left, order = list(self._waiting), []
        while left:
            # Before those of the turn in which he came, behind those who have waited longer; of equals the first to come.
            first = min(left, key=lambda waiting: turns.get(waiting.user, waiting.arrived - 0.5))
            left.remove(first)
            order.append(first)
            turn += 1
            turns[first.user] = turn
        self._order = order
        return order

    def waiting(self) -> int:
        with self._changed:
            return len(self._waiting)

    def _is_next(self, me: _Waiting) -> bool:
        fits = all(held + needed <= there for held, needed, there in zip(self.held, me.need, self.capacity, strict=True))
        return self.running < self.at_once and fits and self.order()[0] is me

    def _add(self, need: Sequence[int], sign: int) -> None:
        self.running += sign
        self.held = [held + sign * needed for held, needed in zip(self.held, need, strict=True)]
