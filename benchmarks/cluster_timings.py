"""Seconds of an edit: of its steps, and on a real cluster of its passes on every stage, as ``cluster_simulation`` wants them.

Owns the timing of one edit and the prediction for a crowd. A cluster's desk cannot be looked into from outside, so the process
that runs ``timings`` joins Ray and is the request's desk itself, of the same code, with the stages, towers and generator of the
service. ``cluster.py`` runs it in a process of its own and sets the prediction beside what it has measured.
"""

import inspect
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from PIL import Image
from torch import nn

from ..hywu_core.cluster.address import Address
from ..hywu_core.cluster.client import client_of
from ..hywu_core.condition import encode
from ..hywu_core.edit import decode
from ..hywu_core.generator.handle import write_lora
from ..hywu_core.handle import load_model
from ..hywu_core.lora.attach import inject
from ..hywu_core.sampling.denoise import sample
from ..hywu_core.think import think
from .cluster_simulation import Service, service_of_measured, simulate

ROOT = Path(__file__).resolve().parent.parent
MINI, PHOTO = ROOT / "models" / "hywu-mini", ROOT / "tests" / "data" / "photo.jpg"
THREADS, STEPS, TOKENS = 1, 4, 32  # of each part and of who measures; of an edit; most that it thinks
ROUNDS, REPEATS = 3, 8  # of the request; of each of its passes
PATIENCE_S, INSTRUCTION = 120.0, "make it warmer"


@dataclass(frozen=True, eq=False)
class Done:
    """An edit. picture: if it was decoded; tokens: that it thought."""

    latent: torch.Tensor
    picture: Image.Image | None
    seconds: dict[str, float]
    tokens: int


def one(model, generator, photo: Image.Image, instruction: str, seed: int, thinks: bool, decodes: bool) -> Done:
    """An edit with the seconds of its steps."""
    seconds, tokens, last = {}, 0, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal last
        seconds[name], last = time.perf_counter() - last, time.perf_counter()

    def tick(done: int, total: int, latent) -> None:
        nonlocal tokens
        tokens = max(tokens, done)

    text = think(model, [photo], instruction, seed=seed, max_new_tokens=TOKENS, on_tick=tick) if thinks else ""
    lap("think")
    condition = encode(model, [photo], instruction, text, seed=seed)
    lap("encode")
    lora = write_lora(generator, condition)
    lap("generate")
    latent = sample(inject(model, lora), condition, steps=STEPS, seed=seed)
    lap("sample")
    picture = decode(model, latent) if decodes else None
    lap("decode")
    return Done(latent, picture, seconds, tokens)


def worked() -> tuple[float, float]:
    """Seconds that all processors together have worked for this process and its children, and for others."""
    machine, me = psutil.cpu_times(), psutil.Process()
    spent = [each.cpu_times() for each in (me, *me.children(recursive=True))]
    ours = sum(each.user + each.system for each in spent)
    return ours, sum(machine) - machine.idle - getattr(machine, "iowait", 0.0) - ours


def nothing(*said: Any) -> None:
    """Takes whatever is told."""


@dataclass
class Notes:
    """Of passes, in turn: when one left and when its numbers were here (``marks``), and what each stage took of it (``busy``,
    with ``repeats`` only). A stage is then asked for the same pass so often again, all at once: what lies between its results
    is what it takes, and no hop."""

    repeats: int = 0
    marks: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    def rows(self, stages: int) -> list[tuple[float, ...]]:
        """Seconds of each pass since the last call, and on each stage; what lay between passes goes to ``gaps``."""
        out, back, busy = self.marks[::2], self.marks[1::2], self.busy
        self.marks, self.busy = [], []
        self.gaps += [begin - end for begin, end in zip(out[1:], back, strict=False)]
        trips = [end - begin for begin, end in zip(out, back, strict=True)]
        return list(zip(trips, *(busy[stage::stages] for stage in range(stages) if busy), strict=True))


def first_and_later(rows: Sequence[Sequence[float]], later: int) -> tuple[list[float], list[float]]:
    """All passes before the last ``later`` added up, and the median of these."""
    cut = len(rows) - later
    return [sum(column) for column in zip(*rows[:cut], strict=True)], [
        statistics.median(column) for column in zip(*rows[cut:], strict=True)]


class Watched:
    """An actor of the service, its passes noted."""

    def __init__(self, actor: Any, notes: Notes):
        self.actor, self.notes, self.passing = actor, notes, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.actor, name)

    def start(self, method: str, *arguments: Any, returns: int = 1) -> Any:
        if method != "run":
            return self.actor.start(method, *arguments, returns=returns)
        if self.first == 0:
            self.notes.marks.append(time.perf_counter())
        self.passing = self.actor.start(method, *arguments)
        if self.notes.repeats:
            self.actor.done(self.passing, nothing)
            began = time.perf_counter()
            for again in [self.actor.start(method, *arguments) for _ in range(self.notes.repeats)]:
                self.actor.done(again, nothing)
            self.notes.busy.append((time.perf_counter() - began) / self.notes.repeats)
        return self.passing

    def wait(self, reference: Any, check: Callable[[], None]) -> Any:
        result = self.actor.wait(reference, check)
        if reference is self.passing:
            self.notes.marks.append(time.perf_counter())
        return result


def timings(where: str) -> dict[str, Any]:
    """Of one request alone. This process joins Ray and is the request's desk: the same steps, the cluster's other parts."""
    from ..hywu_core.cluster import connection, remote, service, steps, tower_actor, wire
    from ..hywu_core.cluster.admission import Admission

    torch.set_num_threads(THREADS)
    address, notes, photo, towers = Address.parse(where), Notes(), Image.open(PHOTO), []
    layers = [(own.start, len(own)) for own in client_of(where).layers]
    connection.connected(address)
    stages = [Watched(remote.Actor(service.find(address, "stage", number), "stage", PATIENCE_S, *own), notes)
              for number, own in enumerate(layers)]
    tower, writer = (remote.Actor(service.find(address, kind), kind, PATIENCE_S) for kind in ("tower", "writer"))

    def call(method: str, *arguments: Any) -> Any:
        began = time.perf_counter()
        result = steps.tower_call(tower, nothing)(method, *arguments)
        towers.append(time.perf_counter() - began)
        return result

    model = load_model(MINI / "backbone", dtype=torch.float32)
    model.backbone.vae = tower_actor.RemoteVAE(model.config.vae, torch.float32, call)
    model.backbone.vision_model, model.backbone.vision_aligner = tower_actor.RemoteVision(call), nn.Identity()
    model.backbone.visits |= dict.fromkeys(("vae", "vision"), lambda: nullcontext(torch.device("cpu")))
    desk = steps.Steps(model, stages, tower, writer, Admission((1 << 60,) * len(stages), 1))

    def do(step: Callable, loras: Sequence = (), parts: Sequence = (), **given: Any) -> tuple[dict[str, Any], list]:
        named = list(inspect.signature(step).parameters.values())[1:]
        arguments = {each.name: each.default for each in named if each.name != "on_tick"} | given
        report = SimpleNamespace(tick=nothing, note=nothing, check=nothing, all_up=nothing)
        return desk.do(step.__name__, uuid.uuid4().hex, "timing", arguments, loras, parts, report)

    def once(repeats: int) -> dict[str, Any]:
        notes.repeats, notes.gaps, found = repeats, [], {}
        text = do(think, pictures=(photo,), instruction=INSTRUCTION, max_new_tokens=TOKENS)[0]["text"]
        rows = notes.rows(len(stages))
        found["prompt"], found["token"] = first_and_later(rows, len(rows) - 1)
        towers.clear()
        condition = do(encode, pictures=(photo,), instruction=INSTRUCTION, thinking=text)[0]["condition"]
        found["pictures"], (found["encode"],) = [sum(towers)], notes.rows(len(stages))
        began = time.perf_counter()
        packed, parts = do(write_lora, condition=condition)
        found["generate"], header = [time.perf_counter() - began], wire.unpack(bytes(packed["packed"].numpy()))
        lora = {name: header[name] for name in ("rank", "alpha", "rank_weights")} | {"strength": 1.0}
        latent = do(sample, [lora], [parts], condition=condition, steps=STEPS)[0]["latent"]
        found["first"], found["step"] = first_and_later(notes.rows(len(stages)), STEPS - 1)
        call("vae_decode", latent)
        return found | {"decode": towers[-1:], "gap": [statistics.mean(notes.gaps)]}

    plain, repeated = [once(0) for _ in range(1 + ROUNDS)][1:], once(REPEATS)
    first = {kind: statistics.median(each[kind][0] for each in plain) for kind in plain[0]}
    parts = {name: first.pop(name) for name in ("gap", "pictures", "generate", "decode")}
    return parts | {"trips": {kind: took + parts["gap"] for kind, took in first.items()},
                    "stages": {kind: repeated[kind][1:] for kind in first}}


def service_of(timed: dict[str, Any], thinks: bool, decodes: bool, tokens: int, at_once: int, cores: int) -> Service:
    """The service that was timed, for such edits; pictures are encoded once more for thinking."""
    return service_of_measured(
        timed["stages"], timed["trips"], desk=timed["gap"], tokens=tokens if thinks else 0, steps=STEPS, at_once=at_once,
        pictures=timed["pictures"] * (1 + thinks), generate=timed["generate"], decode=timed["decode"] * decodes, cores=cores)


def predicted(service: Service, users: int) -> float:
    """Seconds an edit of so many users."""
    return 60 / simulate(service, users, edits=40).per_minute
