"""``make demo``: the shipped one-photo graph, in a real ComfyUI, on a CC0 photo, with the bundled small checkpoint.

Starts ComfyUI on a free loopback port with folders of its own, queues the graph through its API, copies the PNG to ``output/``,
prints where it is and stops what it started, on Ctrl-C and errors too.
"""

import argparse
import json
import shutil
import signal
import sys
import time
from pathlib import Path

from .fetch import ROOT
from .server import ComfyServer

GRAPH = ROOT / "tests" / "graphs" / "edit_one_photo.json"
PHOTO = ROOT / "tests" / "data" / "photo.jpg"
BASE = ROOT / ".cache" / "demo"


def node_of(graph: dict, class_type: str) -> str:
    """The id of the only node of a type."""
    found, = [key for key, node in graph.items() if node["class_type"] == class_type]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__.splitlines()[0])
    parser.add_argument("--instruction", help="another instruction than the graph's")
    parser.add_argument("--photo", type=Path, default=PHOTO)
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "demo.png")
    arguments = parser.parse_args()
    # A plain SIGTERM would end Python without running the `with` block that stops the server.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    graph = json.loads(GRAPH.read_text(encoding="utf-8"))
    server = ComfyServer(BASE)
    photo = server.folder("input") / arguments.photo.name
    shutil.copy(arguments.photo, photo)
    graph[node_of(graph, "LoadImage")]["inputs"]["image"] = photo.name
    if arguments.instruction:
        graph[node_of(graph, "PrimitiveStringMultiline")]["inputs"]["value"] = arguments.instruction

    instruction = graph[node_of(graph, "PrimitiveStringMultiline")]["inputs"]["value"]
    print("starting ComfyUI ...", flush=True)
    started = time.monotonic()
    with server:
        print(f"ComfyUI answers at {server.url} after {time.monotonic() - started:.0f} s; running {GRAPH.name}", flush=True)
        started = time.monotonic()

        def show(message: dict) -> None:
            if message["type"] == "executing" and message["data"].get("node"):
                print(f"  {graph[message['data']['node']]['class_type']}", flush=True)

        run = server.run(graph, show)
        if run.status != "success":
            print(f"the graph ended with {run.status}: {run.error}\n{server.tail()}", file=sys.stderr)
            return 1
        picture, = server.outputs(run, node_of(graph, "SaveImage"))
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, arguments.out)
    print(f"done in {time.monotonic() - started:.1f} s; ComfyUI is stopped")
    print(f"instruction: {instruction}\nsource {arguments.photo}\nedited {arguments.out.resolve()}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
