"""One edit inside a real ComfyUI with the bundled checkpoint: seconds by node, and the memory it adds to an empty ComfyUI.

``python -m comfyui_hywu.benchmarks.comfyui [--record]`` runs the shipped one-photo graph twice in one server; the second run
has another instruction and another seed, with the models loaded, and is the one that is reported.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import psutil

from ..tests.comfy.demo import GRAPH, PHOTO, node_of
from ..tests.comfy.server import ComfyServer
from .record import record


def memory(server: ComfyServer) -> int:
    """Bytes that the server and its children keep in memory."""
    process = psutil.Process(server.process.pid)
    return sum(each.memory_info().rss for each in (process, *process.children(recursive=True)))


def main() -> None:
    """Run, print, and record if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write the figures to benchmarks/results/")
    options = parser.parse_args()
    graph = json.loads(GRAPH.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        server = ComfyServer(Path(folder))
        graph[node_of(graph, "LoadImage")]["inputs"]["image"] = PHOTO.name
        shutil.copy(PHOTO, server.folder("input") / PHOTO.name)
        with server:
            empty, peak, seconds = memory(server), 0, {}
            for instruction, seed in (("make it brighter", 0), ("make it look like winter", 1)):
                graph[node_of(graph, "PrimitiveStringMultiline")]["inputs"]["value"] = instruction
                for kind in ("HYWUThink", "HYWUConditionEncoder", "HYImageSampler"):
                    graph[node_of(graph, kind)]["inputs"]["seed"] = seed
                marks: list[tuple[float, str | None, int]] = []

                def note(message: dict, marks=marks) -> None:
                    if message["type"] == "executing":
                        marks.append((time.perf_counter(), message["data"].get("node"), memory(server)))

                run = server.run(graph, note)
                if run.status != "success":
                    raise SystemExit(f"the graph ended with {run.status}: {run.error}")
                seconds = {graph[node]["class_type"]: after - began
                           for (began, node, _), (after, _, _) in zip(marks, marks[1:], strict=False) if node}
                peak = max(peak, *(held for _, _, held in marks))
            peak = max(peak, memory(server))
    for kind, value in seconds.items():
        print(f"{kind:24s} {value:7.3f} s")
    total, added = sum(seconds.values()), (peak - empty) / 1e9
    print(f"{'warm edit':24s} {total:7.3f} s; {added:.2f} GB above an empty ComfyUI ({empty / 1e9:.2f} GB)")
    if options.record:
        record("comfyui-hywu-mini", {"seconds": seconds, "edit": total, "added_gb": added, "empty_gb": empty / 1e9})


if __name__ == "__main__":
    main()
