"""A good citizen: ComfyUI's buttons release our memory, the graph goes on as if nothing had been, and the plan is shown.

What the API cannot show is tested inside ComfyUI's process: ``inside_memory.py`` and ``inside_vae.py``, whose tests are
reported here one by one.
"""

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from comfyui_hywu.tests.comfy.fetch import fetch_comfyui, find_comfyui
from comfyui_hywu.tests.comfy.graphs import only, pixels, small_graph

HERE = Path(__file__).parent
INSIDE = (HERE / "inside_memory.py", HERE / "inside_vae.py")
NAMES = [name for file in INSIDE for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)]


# ---- through the API


def log_since(server, start: int) -> str:
    return server.log.read_bytes()[start:].decode(errors="replace")


@pytest.mark.parametrize("form", [None, "auto", "bf16", "int8"])
def test_after_unload_models_the_next_run_is_the_same(server, form):
    """Also that graphs from before there was a format still run (None), and that the sampler alone brings the backbone back."""
    graph = small_graph("edit_one_photo")
    loader, sampler, save = only(graph, "HYWUModelLoader"), only(graph, "HYImageSampler"), only(graph, "SaveImage")
    if form is not None:
        graph[loader]["inputs"]["format"] = form
    first_seed = graph[sampler]["inputs"]["seed"]
    first = pixels(server, server.run(graph), save)
    graph[sampler]["inputs"]["seed"] = first_seed + 1
    assert (pixels(server, server.run(graph), save) != first).any()
    start = server.log.stat().st_size
    server.post("/free", {"unload_models": True})
    graph[sampler]["inputs"]["seed"] = first_seed
    run = server.run(graph)
    assert np.array_equal(pixels(server, run, save), first)
    assert loader not in run.executed and sampler in run.executed
    said = log_since(server, start)
    assert said.count("HY-WU: unloaded the backbone") == said.count("HY-WU: loading the backbone again") == 1


def test_formats_differ_a_little(server):
    graph = small_graph("edit_one_photo")
    loader, save = only(graph, "HYWUModelLoader"), only(graph, "SaveImage")
    pictures = {}
    for form in ("bf16", "int8", "int4"):
        graph[loader]["inputs"]["format"] = form
        pictures[form] = pixels(server, server.run(graph), save)
    assert len({picture.tobytes() for picture in pictures.values()}) == 3


def test_a_finished_latent_is_decoded_without_the_backbone(server):
    graph = small_graph("edit_one_photo")
    decode, save = only(graph, "VAEDecode"), only(graph, "HYImageSampler")
    assert server.run(graph).status == "success"
    start = server.log.stat().st_size
    server.post("/free", {"unload_models": True})
    graph["90"] = {"class_type": "VAEDecode", "inputs": graph[decode]["inputs"]}
    graph["91"] = {"class_type": "SaveImage", "inputs": {"images": ["90", 0], "filename_prefix": "again"}}
    run = server.run(graph)
    assert pixels(server, run, "91").std() > 0 and save not in run.executed
    assert "loading the backbone again" not in log_since(server, start)


def test_the_loader_shows_its_plan_in_the_node(server):
    server.forget()
    graph = small_graph("edit_one_photo")
    run = server.run(graph)
    said, = run.texts[only(graph, "HYWUModelLoader")]
    for word in ("format     bf16", "layers      0-23 on cpu", "generator  resident on cpu", "peak", "seconds"):
        assert word in said, said


def test_free_memory_forgets_everything_and_the_next_run_is_the_same(server):
    graph = small_graph("edit_one_photo")
    save = only(graph, "SaveImage")
    first = pixels(server, server.run(graph), save)
    server.forget()
    run = server.run(graph)
    assert only(graph, "HYWUModelLoader") in run.executed and np.array_equal(pixels(server, run, save), first)


# ---- inside the process


@pytest.fixture(scope="module")
def inside(tmp_path_factory) -> dict[str, str]:
    """Test name -> what failed, "" for nothing, of one run of ``INSIDE``."""
    comfyui = find_comfyui() or fetch_comfyui()
    report = tmp_path_factory.mktemp("inside") / "report.xml"
    result = subprocess.run(
        [sys.executable, str(HERE / "inside.py"), str(comfyui), *map(str, INSIDE), "-q", "-rA", "-p", "no:cacheprovider",
         f"--junitxml={report}"],
        capture_output=True, text=True, cwd=HERE, timeout=900)
    assert report.is_file(), result.stdout[-3000:] + result.stderr[-3000:]
    found: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        wrong = [part.text or part.get("message", "") for part in case if part.tag in ("failure", "error", "skipped")]
        name = case.get("name").partition("[")[0]
        found[name] = "\n".join(filter(None, (found.get(name, ""), *wrong)))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_inside_comfyui(inside, name):
    assert name in inside
    assert not inside[name], inside[name]
