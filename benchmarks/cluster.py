"""The bundled checkpoint on a real Ray cluster of this machine: speed beside one process, faults, memory over many edits.

Owns what docs/cluster.md says was measured. ``python -m comfyui_hywu.benchmarks.cluster`` starts `hywu serve` with three stages
on loopback and measures (1) an edit here, there, and 8 users at once, every latent bit for bit what it is here, (2) what
``cluster_simulation`` predicts from one request's timings, (3) kill -9 of every kind of part in every phase that uses it, (4)
memory over ``--edits`` small edits. ``--write`` puts the figures into results/ and between the markers of the page. A part has
one thread, as has this process, so that digits agree and a core is what the simulation takes it for.
"""

import argparse
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image

from ..hywu_core.cluster.address import Address, on_loopback
from ..hywu_core.cluster.client import Client, client_of
from ..hywu_core.condition import encode
from ..hywu_core.errors import ClusterError
from ..hywu_core.generator.handle import load_generator, write_lora
from ..hywu_core.handle import load_model
from ..hywu_core.lora.attach import inject
from ..hywu_core.progress import silent
from ..hywu_core.sampling.denoise import sample
from ..hywu_core.think import think
from ..tests.cluster.conftest import serve, stop
from .cluster_timings import MINI, PHOTO, ROOT, STEPS, THREADS, TOKENS, Done, one, predicted, service_of, timings, worked
from .record import between, machine, record

PAGE, BEGIN, END = ROOT / "docs" / "cluster.md", "<!-- measured -->", "<!-- end of measured -->"
STAGES, USERS, EACH = 3, 8, 5
EDITS = ("make it warmer", "turn it gray", "invert the colours", "make it darker", "blur it")
ARMS = {"edit": (False, False), "edit, decode": (False, True), "think, edit": (True, False),
        "think, edit, decode": (True, True)}  # whether it thinks, and decodes the latent
# Phase -> the parts that it uses.
FAULTS = {"think": ("stage 1", "the VAE", "the desk"), "encode": ("stage 1", "the VAE", "the desk"),
          "generate": ("the weight generator", "the desk"), "sample": ("stage 1", "the desk")}
PATIENCE_S, AGAIN_S, STORE = 120.0, 0.2, "the object store"


@contextmanager
def serving(log: Path) -> Iterator[tuple[str, psutil.Process]]:
    """`hywu serve` as long as the block runs: its address and process."""
    process, where = serve(log, "--stages", str(STAGES), "--at-once", str(USERS), "--threads", str(THREADS))
    try:
        yield where, psutil.Process(process.pid)
    finally:
        stop(process)


# ---- (1) edits here, there, and many there at once

def jobs(user: int) -> list[tuple[str, int]]:
    """A user's instructions, which no other has, and seeds."""
    return [(f"{text}, {user + 1} times", user) for text in EDITS[:EACH]]


def crowd(where: str, photo: Image.Image, arm: tuple[bool, bool]) -> tuple[dict[str, float], list[Done]]:
    """All users' edits at once: seconds of it and of processors, ours and others', and what came of them."""
    clients = [Client(Address.parse(where)) for _ in range(USERS)]
    handles = [(client.model(), client.generator()) for client in clients]
    with ThreadPoolExecutor(USERS) as users:
        before = time.perf_counter(), *worked()
        found = list(users.map(lambda user: [one(*handles[user], photo, *job, *arm) for job in jobs(user)], range(USERS)))
        took = [now - then for now, then in zip((time.perf_counter(), *worked()), before, strict=True)]
        return dict(zip(("wall_s", "ours_s", "others_s"), took, strict=True)), [done for own in found for done in own]


def speed(where: str, photo: Image.Image) -> dict[str, Any]:
    local = load_model(MINI / "backbone", dtype=torch.float32), load_generator(MINI / "generator", dtype=torch.float32)
    there, figures = (client_of(where).model(), client_of(where).generator()), {}
    for name, arm in ARMS.items():
        thinks, decodes = arm
        if not decodes:  # every job alone, here; the first user's with a picture
            solo = [one(*local, photo, *job, thinks, user == 0) for user in range(USERS) for job in jobs(user)]
        one(*there, photo, *jobs(0)[0], *arm)
        alone = [one(*there, photo, *job, *arm) for job in jobs(0)]
        wall, together = crowd(where, photo, arm)
        for here, other in zip([*solo[:EACH], *solo], [*alone, *together], strict=True):
            assert torch.equal(here.latent, other.latent) and here.tokens == other.tokens
            assert other.picture is None or here.picture is None or other.picture.tobytes() == here.picture.tobytes()
        steps = [step for step in solo[0].seconds if (step != "think" or thinks) and (step != "decode" or decodes)]
        here, lone = ({step: min(done.seconds[step] for done in own[:EACH]) for step in steps} for own in (solo, alone))
        count, an_edit = len(together), wall["wall_s"] / len(together)
        figures[name] = wall | {
            "here": here, "cluster": lone, "here_s": sum(here.values()), "cluster_s": sum(lone.values()), "edits": count,
            "tokens": sum(done.tokens for done in together) / count, "an_edit_s": an_edit,
            "ratio": sum(lone.values()) / an_edit, "mean_wait_s": sum(sum(done.seconds.values()) for done in together) / count}
        print(name, figures[name], flush=True)
    return figures


# ---- (3) faults

def phases(photo: Image.Image, condition: Any, lora: Any) -> dict[str, Callable]:
    """Phase -> (client, tick, whether it has to last) -> something that can be compared."""
    def thinking(client: Client, tick: Callable, long: bool) -> Any:
        return think(client.model(), [photo], "a red ball on a table", seed=1, max_new_tokens=500 if long else 8,
                     temperature=1.5, on_tick=tick)

    def encoding(client: Client, tick: Callable, long: bool) -> Any:
        return encode(client.model(), [photo], EDITS[0], seed=3, on_tick=tick).hidden_SD.numpy().tobytes()

    def generating(client: Client, tick: Callable, long: bool) -> Any:
        return write_lora(client.generator(), condition, tick).digest

    def sampling(client: Client, tick: Callable, long: bool) -> Any:
        steps = 500 if long else STEPS
        return sample(inject(client.model(), lora), condition, steps=steps, seed=1, on_tick=tick).numpy().tobytes()

    return {"think": thinking, "encode": encoding, "generate": generating, "sample": sampling}


def fault(where: str, phase: str, name: str, run: Callable) -> dict[str, Any]:
    """One part killed in one phase. In a short phase it is killed as soon as the phase has begun, else after two ticks."""
    wanted, after = run(client_of(where), silent, False), 2 if phase in ("think", "sample") and name != "the VAE" else 0
    for _ in range(5):
        client, killed = client_of(where), None
        pid = next(part["pid"] for part in client.status()["parts"] if part["name"].startswith(name))

        def tick(done: int, total: int, latent: Any, pid: int = pid) -> None:
            nonlocal killed
            if killed is None and done >= after:
                os.kill(pid, signal.SIGKILL)
                killed = time.perf_counter()

        error, refused = None, []
        try:
            run(client, tick, True)
        except ClusterError as raised:
            error, failed = str(raised), time.perf_counter()
        while True:
            try:
                assert run(client_of(where), silent, False) == wanted
                break
            except ClusterError as raised:
                if killed is None or time.perf_counter() - killed > PATIENCE_S:
                    raise
                refused.append(str(raised))
                time.sleep(AGAIN_S)
        works = time.perf_counter()
        while not all(part["state"] == "up" for part in client_of(where).status()["parts"]):
            time.sleep(AGAIN_S)
        if error is not None:
            break  # else it was over before the signal came
    else:
        raise RuntimeError(f"{phase} was over five times before {name} could be killed in it")
    return {"phase": phase, "killed": name, "error": error, "error_s": failed - killed, "works_s": works - killed,
            "refused": len(refused)}


# ---- (4) memory

def processes(client: Client, serve: psutil.Process) -> dict[str, int]:
    """Of the parts, of Ray's own, and of the client with the process that has joined for it."""
    found = {part["name"].split(" (")[0]: part["pid"] for part in client.status()["parts"]}
    found |= {child.name(): child.pid for child in serve.children() if child.name() in ("raylet", "gcs_server")}
    link = next(child.pid for child in psutil.Process().children() if any("link_process" in word for word in child.cmdline()))
    return found | {"the client": os.getpid(), "its link": link}


def stored(where: str) -> float:
    """Bytes in Ray's object store; for a process that may join. Nodes tell the head once a second."""
    import ray

    from ..hywu_core.cluster import connection

    connection.connected(Address.parse(where))
    time.sleep(2.5)
    return ray.cluster_resources()["object_store_memory"] - ray.available_resources()["object_store_memory"]


def memory(where: str, serve: psutil.Process, photo: Image.Image, edits: int, in_store: Callable[[], float]) -> dict[str, Any]:
    client, seen = client_of(where), {}
    model, generator, looks = client.model(), client.generator(), sorted({20, edits // 2, edits})
    for number in range(1, edits + 1):
        condition = encode(model, [photo], EDITS[number % len(EDITS)], seed=number)
        sample(inject(model, write_lora(generator, condition)), condition, steps=1, seed=number)
        if number in looks:
            of = {}
            for name, pid in processes(client, serve).items():
                process = psutil.Process(pid)
                now = process.memory_info()
                of[name] = {"rss": now.rss, "shared": now.shared, "threads": process.num_threads()}
            seen[number] = {"store": in_store(), "processes": of}
    return {"edits": edits, "seen": seen}


def growth(seen: dict[int, dict[str, Any]], since: int, until: int) -> dict[str, float]:
    """Bytes of RSS that an edit adds to each process, and to the object store."""
    first, last, edits = seen[since], seen[until], until - since
    own = {name: (last["processes"][name]["rss"] - first["processes"][name]["rss"]) / edits for name in first["processes"]}
    return own | {STORE: (last["store"] - first["store"]) / edits}


# ---- all of it

def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [head, ["---"] * len(head), *rows])


def _plainly(error: str) -> str:
    """The first words of an error, without addresses."""
    return re.sub(r" \(node.*?\)| 127\.0\.0\.1:\d+", "", error)[:75]


def page(figures: dict[str, Any]) -> str:
    on, seen, spans = figures["machine"], figures["memory"]["seen"], figures["memory"]["growth"]
    speeds = table(("", "here, s", "alone on the cluster, s (predicted)", f"{USERS} users at once, s an edit (predicted)",
                    "measured over predicted throughput", "throughput over one at a time",
                    "processors' seconds an edit (predicted)", "cores that others took"), [
        (name, f"{of['here_s']:.2f}", f"{of['cluster_s']:.2f} ({of['predicted_alone_s']:.2f})",
         f"{of['an_edit_s']:.2f} ({of['predicted_s']:.2f})", f"{of['predicted_s'] / of['an_edit_s']:.2f}",
         f"{of['ratio']:.2f}", f"{of['ours_s'] / of['edits']:.2f} ({of['predicted_work_s']:.2f})",
         f"{of['others_s'] / of['wall_s']:.2f}") for name, of in figures["speed"].items()])
    faults = table(("phase", "killed", "error", "after, s", "the next works after, s", "refused until then"), [
        (of["phase"], of["killed"], f"{_plainly(of['error'])} ...", f"{of['error_s']:.1f}", f"{of['works_s']:.1f}",
         of["refused"])
        for of in figures["faults"]])
    rows = [(name, *(f"{look['processes'][name]['rss'] / 1e6:.0f}" for look in seen.values()),
             *(f"{of[name] / 1e3:.1f}" for of in spans.values())) for name in next(iter(seen.values()))["processes"]]
    rows.append((STORE, *(f"{look['store'] / 1e6:.1f}" for look in seen.values()),
                 *(f"{of[STORE] / 1e3:.1f}" for of in spans.values())))
    memories = table(("", *(f"MB after {look}" for look in seen), *(f"kB an edit, {span}" for span in spans)), rows)
    return f"""\
{figures['date']}: {on['processor']}, {on['cores']} cores, torch {on['torch']}, Ray {figures['ray']}. The bundled checkpoint in
{STAGES} stages on loopback; each part has {THREADS} thread, as has the process "here".

An edit is encoding, writing the LoRA and {STEPS} steps; thinking, where it is, has {TOKENS} tokens at most. Users are
threads of one process with {EACH} edits each; figures of one alone are the smallest of {EACH}. All latents are bit for bit
those of the same edits here. Predicted is what `cluster_simulation` makes of one request's timings, each part taking one
of the machine's cores; it leaves out Ray's own processes and the users', which are on the same cores here.

{speeds}

kill -9, one user at work; seconds from the signal.

{faults}

Resident memory of processes over {figures['memory']['edits']} edits of one step, the first of a new service, and bytes in
Ray's object store.

{memories}"""


def put(page: str, text: str) -> str:
    """The page with the text between its markers, at its end if it has none."""
    if BEGIN not in page:
        page = f"{page.rstrip()}\n\n## Measured\n\n{BEGIN}\n{END}\n"
    return between(page, "measured", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into docs/cluster.md and benchmarks/results/")
    parser.add_argument("--edits", type=int, default=200, help="of the measurement of memory (default: 200)")
    options = parser.parse_args()
    if options.edits < 60:
        parser.error(f"--edits {options.edits}: give 60 or more, the first 20 only warm up")
    on_loopback()
    torch.set_num_threads(THREADS)
    figures = {"date": date.today().isoformat(), "ray": version("ray"), "machine": machine()}
    with (tempfile.TemporaryDirectory() as folder, serving(Path(folder) / "log") as (where, serve),
          ProcessPoolExecutor(1, get_context("spawn"), initializer=on_loopback) as joined):
        figures |= measured(where, serve, options.edits, lambda work: joined.submit(work, where).result())
    print(page(figures))
    if options.write:
        PAGE.write_text(put(PAGE.read_text(), page(figures)))
        record("cluster-hywu-mini", figures)


def measured_memory(where: str, serve: psutil.Process, photo: Image.Image, edits: int, elsewhere: Callable) -> dict[str, Any]:
    found = memory(where, serve, photo, edits, lambda: elsewhere(stored))
    found["growth"] = {f"{since} to {until}": growth(found["seen"], since, until) for since, until in (
        (20, edits), (edits // 2, edits))}
    print(found["growth"], flush=True)
    return found


def measured(where: str, serve: psutil.Process, edits: int, elsewhere: Callable[[Callable], Any]) -> dict[str, Any]:
    photo = Image.open(PHOTO)
    found: dict[str, Any] = {"memory": measured_memory(where, serve, photo, edits, elsewhere)}
    found |= {"speed": speed(where, photo), "timings": elsewhere(timings)}
    for name, of in found["speed"].items():
        service = service_of(found["timings"], *ARMS[name], round(of["tokens"]), USERS, os.cpu_count())
        of |= {"predicted_s": predicted(service, USERS), "predicted_alone_s": predicted(service, 1),
               "predicted_work_s": sum(service.loads)}
    print(found, flush=True)
    client = client_of(where)
    condition = encode(client.model(), [photo], EDITS[0], seed=3)
    runs = phases(photo, condition, write_lora(client.generator(), condition))
    found["faults"] = []
    for phase, parts in FAULTS.items():
        for name in parts:
            found["faults"].append(fault(where, phase, name, runs[phase]))
            print(found["faults"][-1], flush=True)
    return found


if __name__ == "__main__":
    main()
