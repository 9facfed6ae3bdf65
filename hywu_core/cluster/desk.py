"""The desk: the one actor that clients talk to. It takes requests as plain bytes, runs each in a thread and says how far it is.

Owns tickets (a request from ``submit`` to its last ``poll``), cancelling and forgetting those whose client has gone, and what
``hywu status`` shows. It holds word embeddings, output head and embedders, where sequences begin and end; layers, towers and
generator are other actors. Its methods never raise: an error is part of the answer, as text.
"""

import functools
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch

from ..config import GenerationConfig
from ..errors import ClusterError, HYWUError
from ..handle import ModelHandle
from ..json_fields import read_json
from ..placement.plan import Plan
from ..text.system_prompt import read_system_prompts
from ..text.tokenizer import Tokenizer
from .address import NAMESPACE
from .admission import Admission
from .part import Part, code_digest, load_share
from .remote import CHECK_S, Actor
from .steps import Steps, tower_call
from .tower_actor import Standing, towers_elsewhere
from .wire import PROTOCOL, pack, unpack

ABANDONED_S = 15.0  # a request whose client has not asked for so long is cancelled
READY_AGAIN_S = 2.0  # parts that have answered this recently are taken to be up
LONGEST_POLL_S = 2.0
MAX_TICKETS = 256


def _answering(method: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """What the method returns, or {"error": ...}: the classes of this package need not be known where the client is."""
    @functools.wraps(method)
    def answered(*arguments: Any) -> dict[str, Any]:
        try:
            return method(*arguments)
        except HYWUError as error:
            return {"error": (type(error).__name__, str(error))}
        except Exception as error:  # the answer to what is no request of ours; a desk has nobody else to tell
            return {"error": ("ClusterError", f"{method.__name__}: not understood ({type(error).__name__}); client and cluster "
                                              "need the same version of this pack")}

    return answered


class Cancelled(Exception):
    """Ends a request's thread; nobody is told."""


@dataclass(eq=False)
class Ticket:
    """A request. ``version`` grows with every change that a client might want to see."""

    step: str
    user: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    version: int = 0
    done: int = 0
    total: int = 0
    latent: bytes | None = None
    note: str = ""
    answer: dict[str, Any] | None = None
    asked: float = field(default_factory=time.monotonic)
    began: float = field(default_factory=time.monotonic)
    stop: threading.Event = field(default_factory=threading.Event)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def tick(self, done: int, total: int, latent: torch.Tensor | None) -> None:
        self._change(done=done, total=total, note="", **({} if latent is None else {"latent": pack({"latent": latent})}))
        self.check()

    def note_(self, text: str) -> None:
        if text != self.note:
            self._change(note=text)

    def check(self) -> None:
        """Raises Cancelled."""
        if self.stop.is_set():
            raise Cancelled

    def finish(self, answer: dict[str, Any]) -> None:
        self._change(answer=answer, note="")

    def _change(self, **values: Any) -> None:
        with self.changed:
            for name, value in values.items():
                setattr(self, name, value)
            self.version += 1
            self.changed.notify_all()


class _Report:
    """A ticket as ``steps.Report``."""

    def __init__(self, ticket: Ticket, desk: "Desk"):
        self.tick, self.note, self.check = ticket.tick, ticket.note_, ticket.check
        self.all_up = lambda: desk._all_up(ticket.check, ticket.note_)


class Desk(Part):
    """folder: of the backbone. stages: (actor's name, what it is called, first layer, layers); tower, writer: (actor's name,
    what it is called). capacity: bytes that requests may hold on each stage. at_once: requests on the stages at a time."""

    def __init__(self, name: str, folder: str, plan: Plan, stages: Sequence[tuple[str, str, int, int]],
                 tower: tuple[str, str], writer: tuple[str, str] | None, generator_folder: str, capacity: Sequence[int],
                 at_once: int, patience_s: float, loading_s: float, threads: int = 0):
        path = Path(folder)
        placed, fingerprint = load_share(folder, plan)
        backbone, config = placed.backbone, placed.backbone.config
        super().__init__(name, fingerprint, threads)
        self._served, self._served_generator, self._loading_s = folder, generator_folder, loading_s
        self._started = uuid.uuid4().hex

        def found(actor: str, called: str, first: int = 0, count: int = 0) -> Actor:
            return Actor(ray.get_actor(actor, namespace=NAMESPACE), called, patience_s, first, count)

        self._stages, self._tower = [found(*stage) for stage in stages], found(*tower)
        self._writer = None if writer is None else found(*writer)
        self._raw = {"config": read_json(path / "config.json"), "generation": read_json(path / "generation_config.json"),
                     "generator": read_json(Path(generator_folder) / "config.json") if generator_folder else None}
        self._writer_fingerprint = ""
        towers_elsewhere(backbone, tower_call(self._tower, lambda: None))
        model = ModelHandle(Standing(backbone), Tokenizer.from_folder(path, config), config,
                            GenerationConfig.from_folder(path, config), read_system_prompts(path), fingerprint)
        self._admission = Admission(tuple(capacity), at_once)
        self._steps = Steps(model, self._stages, self._tower, self._writer, self._admission)
        self._tickets: dict[str, Ticket] = {}
        self._known: dict[str, dict[str, Any]] = {}
        self._up_at = float("-inf")
        self._checking = threading.Lock()
        for stage in self._stages:
            stage.start("close_all")
        threading.Thread(target=self._forget_abandoned, daemon=True, name="hywu-abandoned").start()

    @property
    def _actors(self) -> list[Actor]:
        return [*self._stages, self._tower, *([self._writer] if self._writer else [])]

    # ---- what clients call

    @_answering
    def introduce(self) -> dict[str, Any]:
        """What a client needs to know: the configurations as JSON, fingerprints, layers of each stage, versions."""
        self._all_up(lambda: None)
        return self._raw | {
            "protocol": PROTOCOL, "started": self._started, "served": self._served,
            "served_generator": self._served_generator, "fingerprint": self._identity.weights,
            "generator_fingerprint": self._writer_fingerprint,
            "dtype": str(self._steps.model.backbone.dtype).removeprefix("torch."),
            "layers": [(stage.first, stage.count) for stage in self._stages]}

    @_answering
    def submit(self, message: bytes, parts: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """A new request: {"step", "user", "arguments", "loras"} packed, and of each LoRA the references of its parts."""
        asked = unpack(message)
        if not isinstance(asked, dict):
            raise ClusterError(f"a request is a mapping, {type(asked).__name__} came: client and cluster need the same version")
        step, user, arguments, loras = (asked.get(key) for key in ("step", "user", "arguments", "loras"))
        if not (isinstance(step, str) and isinstance(user, str) and isinstance(arguments, dict) and isinstance(loras, tuple)
                and all(isinstance(lora, dict) for lora in loras) and len(user) <= 100):
            raise ClusterError("a request is a step, a user, arguments and LoRAs: client and cluster need the same version")
        if len(self._tickets) >= MAX_TICKETS:
            raise ClusterError(f"{len(self._tickets)} requests are at the cluster, {MAX_TICKETS} is the most: try again later")
        ticket = Ticket(step, user)
        self._tickets[ticket.id] = ticket
        threading.Thread(target=self._run, args=(ticket, arguments, loras, parts), daemon=True,
                         name=f"hywu-{step[:20]}-{ticket.id[:6]}").start()
        return {"ticket": ticket.id}

    @_answering
    def poll(self, ticket: str, version: int, wait_s: float) -> dict[str, Any]:
        """How far a request is, as soon as that is not ``version`` any more; with its ``answer`` at the end, once."""
        found = self._tickets.get(ticket)
        if found is None:
            raise ClusterError(f"the cluster does not know the request {ticket[:8]} (any more): its desk was started again or "
                               "the client was silent for too long; run it again")
        found.asked = time.monotonic()
        with found.changed:
            found.changed.wait_for(lambda: found.version != version, min(wait_s, LONGEST_POLL_S))
            said = {"version": found.version, "done": found.done, "total": found.total, "note": found.note,
                    "latent": found.latent, "answer": found.answer}
            found.latent = None
        found.asked = time.monotonic()
        if said["answer"] is not None:
            self._tickets.pop(ticket, None)
        return said

    def cancel(self, ticket: str) -> None:
        """Stop a request; what it holds is given back as soon as the pass that it is in has ended."""
        found = self._tickets.pop(ticket, None)
        if found is not None:
            found.stop.set()

    @_answering
    def status(self) -> dict[str, Any]:
        """Parts with their memory, requests with their steps, the queue."""
        asked = [(actor, actor.start("hello")) for actor in self._actors]
        answered, _ = ray.wait([reference for _, reference in asked], num_returns=len(asked), timeout=2.0)
        parts = [{"name": self._identity.name, "state": "up"} | super().hello()]
        for actor, reference in asked:
            said, state = self._known.get(actor.name, {}), "busy or loading"
            if reference in answered:
                try:
                    said, state = ray.get(reference), "up"
                except ray.exceptions.RayError as error:
                    state = f"down ({type(error).__name__})"
            parts.append(said | {"name": actor.name, "state": state})
        now = time.monotonic()
        return {"served": self._served, "parts": parts,
                "waiting": self._admission.waiting(), "running": self._admission.running,
                "held": list(self._admission.held), "capacity": list(self._admission.capacity),
                "requests": [{"step": ticket.step, "user": ticket.user, "done": ticket.done, "total": ticket.total,
                              "note": ticket.note, "seconds": now - ticket.began} for ticket in list(self._tickets.values())]}
    # ---- behind them

    def _run(self, ticket: Ticket, arguments: dict, loras: Sequence[dict], parts: Sequence[Sequence[Any]]) -> None:
        report = _Report(ticket, self)
        try:
            report.all_up()
            result, written = self._steps.do(ticket.step, ticket.id, ticket.user, arguments, loras, parts, report)
            ticket.finish({"result": pack(result), "parts": written})
        except Cancelled:
            pass
        except HYWUError as error:
            ticket.finish({"error": (type(error).__name__, str(error))})
        except Exception as error:  # the thread's end: whatever it is, the client has to hear of it
            traceback.print_exc()
            text = f"{self._identity} failed with {type(error).__name__}: {str(error)[:400]}"
            ticket.finish({"error": ("ClusterError", text)})

    def _all_up(self, check: Callable[[], None], note: Callable[[str], None] = lambda text: None) -> None:
        """Wait until every part answers, and is of the same code and weights."""
        while not self._checking.acquire(timeout=CHECK_S):
            check()
        try:
            if time.monotonic() - self._up_at < READY_AGAIN_S and not any(
                    actor.is_loading or actor.is_doubted for actor in self._actors):
                return
            for actor in self._actors:
                def on_wait(actor: Actor = actor) -> None:
                    note(f"waiting for {actor.name} of the cluster, which is busy or loads its weights")
                    check()

                self._agree(actor, actor.ready(self._loading_s, on_wait))
            self._up_at = time.monotonic()
        finally:
            self._checking.release()

    def _agree(self, actor: Actor, said: dict[str, Any]) -> None:
        if said["code"] != code_digest():
            raise ClusterError(f"{actor} runs other code ({said['code']}) than the desk on node {self._identity.node} "
                               f"({code_digest()}): install the same version of this pack on every node and start it again")
        if actor is self._writer:
            self._writer_fingerprint = said["weights"]
        elif said["weights"] != self._identity.weights:
            raise ClusterError(f"{actor} has loaded the backbone {said['weights']}, the desk on node {self._identity.node} "
                               f"{self._identity.weights}: the folders differ, copy the same checkpoint to every node")
        self._known[actor.name] = said

    def _forget_abandoned(self) -> None:
        while True:
            time.sleep(1.0)
            for ticket in list(self._tickets.values()):
                if time.monotonic() - ticket.asked > ABANDONED_S:
                    ticket.stop.set()
                    self._tickets.pop(ticket.id, None)
