"""What every part of a service is and says of itself: where it runs, of which code and weights it is, what it holds.

Owns the identity of a part and the digest of the code. The parts themselves are ``stage_actor.py``, ``tower_actor.py``,
``writer_actor.py`` and ``desk.py``; each is a process of Ray's, made from plain arguments only.
"""

import functools
import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..backbone.model import build_backbone
from ..checkpoint.fingerprint import backbone_fingerprint
from ..checkpoint.shards import open_shards
from ..config import BackboneConfig
from ..placement.build import Placed
from ..placement.plan import Plan

URGENT_IN_A_ROW = 16
Result = TypeVar("Result")
PACKAGE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Identity:
    """name: of the part, in words ("stage 2, layers 6 to 8"). weights: the fingerprint of what it has loaded. code: digest."""

    name: str
    node: str
    pid: int
    code: str
    weights: str

    def __str__(self) -> str:
        return f"{self.name} (node {self.node}, process {self.pid})"


@functools.cache
def code_digest() -> str:
    """12 hex digits over the core and the kernels: parts of one service must compute the same."""
    digest = hashlib.sha256()
    for folder in ("hywu_core", "kernels"):
        for path in sorted((PACKAGE / folder).rglob("*.py")):
            digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


class Part:
    """Base of the actors."""

    def __init__(self, name: str, weights: str, threads: int):
        import ray  # here, because clients import the modules that stand for parts, and not Ray

        if threads:
            torch.set_num_threads(threads)
        self._turn = Turn()
        self._worker = ThreadPoolExecutor(1, "hywu-worker", lambda: torch.set_grad_enabled(False))
        self._identity = Identity(name, ray.util.get_node_ip_address(), os.getpid(), code_digest(), weights)

    def work(self, work: Callable[..., Result], *arguments: Any, urgent: bool = False) -> Result:
        """What ``work`` returns, done when it is its turn, without gradients, and always in the same thread: Ray calls an
        actor's methods in as many threads as may be under way, and torch keeps buffers for each that has ever computed."""
        with self._turn.taken(urgent):
            return self._worker.submit(work, *arguments).result()

    def hello(self) -> dict[str, Any]:
        """Who it is, and the memory of its process and its GPU in bytes."""
        import psutil

        memory = {"ram": psutil.Process().memory_info().rss}
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            memory |= {"gpu": total - free, "gpu_total": total}
        return asdict(self._identity) | {"memory": memory}


def load_share(folder: str, plan: Plan) -> tuple[Placed, str]:
    """What ``plan`` holds of a backbone folder, loaded, and the fingerprint of the whole. Raises as ``handle.load_model``."""
    config, shards = BackboneConfig.from_folder(Path(folder)), open_shards(Path(folder))
    placed = Placed(build_backbone(config, plan.dtype), shards, plan)
    placed.load()
    return placed, backbone_fingerprint(shards)


class Turn:
    """One at a time: whoever is urgent first, but not more than ``URGENT_IN_A_ROW`` before one who is not; equals in the order
    in which they came."""

    def __init__(self):
        self._lines: tuple[deque, deque] = (deque(), deque())  # urgent, not urgent
        self._changed, self._taken, self._in_a_row = threading.Condition(), False, 0

    @contextmanager
    def taken(self, urgent: bool = False) -> Iterator[None]:
        line, mine = self._lines[not urgent], object()
        with self._changed:
            line.append(mine)
            self._changed.wait_for(lambda: not self._taken and self._next() is mine)
            line.popleft()
            self._taken, self._in_a_row = True, self._in_a_row + 1 if urgent else 0
        try:
            yield
        finally:
            with self._changed:
                self._taken = False
                self._changed.notify_all()

    def _next(self) -> object:
        urgent, others = self._lines
        return urgent[0] if urgent and (not others or self._in_a_row < URGENT_IN_A_ROW) else others[0]
