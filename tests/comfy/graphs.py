"""The API-format graphs of the tests: read, cut down to the random checkpoints, compared by the pictures they save."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from .server import ComfyServer, Run

ROOT = Path(__file__).resolve().parents[2]
GRAPHS = ROOT / "tests" / "graphs"
DATA = ROOT / "tests" / "data"


def small_graph(name: str, checkpoint: str = "deep") -> dict:
    """An API graph of ``tests/graphs`` on a random checkpoint, cut down to few steps and tokens and a square picture."""
    graph = json.loads((GRAPHS / f"{name}.json").read_text(encoding="utf-8"))
    for node in graph.values():
        inputs = node["inputs"]
        if node["class_type"] == "HYWUModelLoader":
            inputs["backbone"] = f"{checkpoint}/base"
        if node["class_type"] == "HYWUGeneratorLoader":
            inputs["generator"] = f"{checkpoint}/pg"
        if node["class_type"] == "HYWUThink":
            inputs["max_new_tokens"] = 12
        if node["class_type"] in ("HYImageSampler", "HYWULoRAAB"):
            # A random backbone proposes any size, the table's 1024 x 768 among them.
            inputs |= {"steps": 3, "size": "1:1"}
    return graph


def node_ids(graph: dict, class_type: str) -> list[str]:
    return [key for key, node in graph.items() if node["class_type"] == class_type]


def only(graph: dict, class_type: str) -> str:
    """The id of the only node of a type."""
    found, = node_ids(graph, class_type)
    return found


def pixels(server: ComfyServer, run: Run, node: str) -> np.ndarray:
    """What a Save Image node wrote: (h, w, 3) uint8."""
    assert run.status == "success", run.error
    path, = server.outputs(run, node)
    return np.asarray(Image.open(path).convert("RGB"))
