"""``hywu serve`` and ``hywu status``: a model that is up on a cluster for everybody, and how it is doing.

Owns arguments and text; the service is ``cluster/service.py``'s.
"""

import argparse
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

BUNDLED = Path(__file__).resolve().parent.parent / "models" / "hywu-mini"


def serve_parser() -> tuple[argparse.ArgumentParser, Any]:
    parser = argparse.ArgumentParser(
        prog="hywu serve", description="Bring a model up on a Ray cluster and keep it up until this is stopped (Ctrl-C). "
                                       "Without --address the cluster is this machine alone, reachable from itself only.")
    parser.add_argument("--address", help="HOST:PORT of a running Ray cluster that this machine belongs to, or auto; #NAME "
                                          "behind it names the service (default: start one on 127.0.0.1)")
    parser.add_argument("--model", type=Path, default=BUNDLED / "backbone",
                        help="backbone folder, at the same path on every node (default: the bundled one)")
    parser.add_argument("--generator", type=Path, default=BUNDLED / "generator",
                        help="generator folder (default: the bundled one)")
    parser.add_argument("--no-generator", action="store_true", help="serve the backbone alone")
    parser.add_argument("--format", default="auto", choices=("auto", "bf16", "fp8", "int8", "int4"),
                        help="of the layers on GPUs (default: auto)")
    parser.add_argument("--size", default="1:1", help="of pictures that room is planned for (default: 1:1)")
    parser.add_argument("--stages", type=int, default=1, help="on machines without a GPU: how many processes share the layers")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"),
                        help="what to compute in (default: float32 without a GPU, else the checkpoint's)")
    parser.add_argument("--threads", type=int, default=0, help="of each part on a CPU; the last digits of results hang on it "
                                                               "(default: as many as torch takes here)")
    parser.add_argument("--at-once", type=int, default=16, help="most requests on the stages at a time (default: 16)")
    parser.add_argument("--patience", type=float, default=300.0,
                        help="seconds after which a part that does not answer is started again (default: 300)")
    parser.add_argument("--transport", default="store", choices=("store", "nixl"),
                        help="how activations go from stage to stage: through Ray's object store, or by NIXL from memory to "
                             "memory (pip install nixl on every node) (default: store)")
    parser.add_argument("--detach", action="store_true", help="leave the service up on the cluster and end; needs --address")
    parser.add_argument("--stop", action="store_true", help="take the service at --address down")
    return parser, _serve


def _serve(options: argparse.Namespace) -> None:
    from .errors import RequestError

    if (options.stop or options.detach) and not options.address:
        raise RequestError("--stop and --detach are about a service on a cluster that lives on by itself: give its --address")
    if not 1 <= options.at_once <= 1024 or not options.patience >= 1 or not 0 <= options.threads <= 1024 or (
            options.stages < 1):
        raise RequestError(f"--at-once {options.at_once}, --patience {options.patience:g}, --threads {options.threads}, "
                           f"--stages {options.stages}: give 1 to 1024, at least 1 second, 0 to 1024, and at least 1")
    from .cluster.address import Address, environment, on_loopback, require_ray

    require_ray()
    if options.address:
        address = Address.parse(options.address)
        os.environ.update(environment(address))  # before Ray is imported
    else:
        on_loopback()
    from .cluster import service
    from .cluster.connection import start_here

    if not options.address:
        address = start_here(2 * options.stages + 2)
    if options.stop:
        print("taken down" if service.stop(address) else f"there was no service {address.service!r}")
        return
    # Ended by whoever started it as by Ctrl-C, from here on: what is up so far goes down again.
    signal.signal(signal.SIGTERM, _interrupt)
    service.start(address, service.wanted(options), lambda text: print(text, file=sys.stderr, flush=True))
    name = "" if address.service == "hywu" else f"#{address.service}"
    print(f"serving {options.model} at {address.ray}{name}", flush=True)
    if options.detach:
        return
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        service.stop(address)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def status_parser() -> tuple[argparse.ArgumentParser, Any]:
    parser = argparse.ArgumentParser(
        prog="hywu status", description="Parts, memory, requests and queue of a service on a cluster.")
    parser.add_argument("--address", default="auto", help="as for `hywu edit --cluster` (default: auto)")
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    return parser, _status


def _status(options: argparse.Namespace) -> None:
    from .cluster.client import client_of

    said = client_of(options.address).status()
    print(json.dumps(said, indent=1) if options.json else text_of(said))


def text_of(said: dict[str, Any]) -> str:
    """``Desk.status`` as lines."""
    lines = [f"{said['served']}"]
    for part in said["parts"]:
        memory = part.get("memory", {})
        held = f"{memory.get('ram', 0) / 1e9:.2f} GB"
        if "gpu" in memory:
            held += f", GPU {memory['gpu'] / 1e9:.1f} of {memory['gpu_total'] / 1e9:.1f} GB"
        where = f"node {part.get('node', '?')}  process {part.get('pid', '?')}"
        lines.append(f"  {part['name']:<32} {part['state']:<16} {where}  {held}")
    room = [f"{held / 1e9:.2f} of {there / 1e9:.2f} GB" for held, there in zip(said["held"], said["capacity"], strict=True)]
    lines.append(f"  {said['running']} at work, {said['waiting']} waiting; held by requests: {', '.join(room)}")
    for request in said["requests"]:
        far = f"{request['done']} of {request['total']}" if request["total"] else ""
        spent = f"{request['seconds']:.1f} s"
        lines.append(f"    {request['step']:<10} user {request['user'][:8]}  {far:<12} {spent:<8} {request['note']}")
    return "\n".join(lines)
