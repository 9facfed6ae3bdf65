"""The shipped graph against a cluster, through ComfyUI's API and its front end: `placement` differs, the picture does not."""

import json
import shutil
import time

import numpy as np
import pytest
from comfyui_hywu.hywu_core.cluster.client import client_of
from comfyui_hywu.tests.cluster.conftest import serve, stop
from comfyui_hywu.tests.comfy import test_browser as front_end
from comfyui_hywu.tests.comfy.graphs import DATA, GRAPHS, node_ids, only, pixels
from comfyui_hywu.tests.comfy.server import Refused


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    # One thread, as the server of these tests has it: more give other last digits.
    process, found = serve(tmp_path_factory.mktemp("serve") / "log", "--stages", "3", "--threads", "1")
    yield found
    stop(process)


def graph(placement: str, instruction: str = "make it warmer", name: str = "edit_one_photo") -> dict:
    found = json.loads((GRAPHS / f"{name}.json").read_text(encoding="utf-8"))
    found[only(found, "PrimitiveStringMultiline")]["inputs"]["value"] = instruction
    for loader in ("HYWUModelLoader", "HYWUGeneratorLoader"):
        for node in node_ids(found, loader):
            found[node]["inputs"]["placement"] = placement
    return found


def test_the_picture_is_the_same(server, address):
    local, remote = graph("local"), graph(address)
    here = pixels(server, server.run(local), only(local, "SaveImage"))
    run = server.run(remote)
    assert np.array_equal(pixels(server, run, only(remote, "SaveImage")), here)
    for stage in ("HYWUThink", "HYWUConditionEncoder", "HYImageSampler"):
        assert run.ticks.get(only(remote, stage), 0) > 1, stage
    assert run.previews >= 1
    # Nothing runs twice while nothing changes, on a cluster either.
    assert only(remote, "HYImageSampler") not in server.run(remote).executed
    again = graph(address)
    again[only(again, "HYWULoRAInjector")]["inputs"]["strength"] = 0.5
    run = server.run(again)
    assert run.status == "success" and only(again, "HYWUThink") not in run.executed


def test_a_lora_of_the_cluster_is_looked_into(server, address):
    remote = graph(address, name="inspect_lora")
    inspect = only(remote, "HYWUInspectLoRA")
    remote[inspect]["inputs"]["model"] = [only(remote, "HYWUModelLoader"), 0]
    remote["900"] = {"class_type": "PreviewAny", "inputs": {"source": [inspect, 3]}}
    run = server.run(remote)
    assert run.status == "success", run.error
    assert "the backbone is on a cluster" in str(run.history["outputs"]["900"])


def test_what_is_wrong_is_said(server, address):
    with pytest.raises(Refused, match="HOST:PORT"):
        server.run(graph("rack"))
    other = graph(address)
    other[only(other, "HYWUModelLoader")]["inputs"]["backbone"] = "somebody/else"
    run = server.run(other)
    assert run.status == "error" and "asks for somebody/else" in run.error and "hywu-mini/backbone" in run.error
    run = server.run(graph("127.0.0.1:9"))
    assert run.status == "error" and "no Ray cluster can be used at 127.0.0.1:9" in run.error


def test_a_cancel_frees_the_cluster(server, address):
    remote = graph(address, "make it colder")
    remote[only(remote, "HYImageSampler")]["inputs"]["steps"] = 400

    def cancel(message):
        data = message["data"]
        if message["type"] == "progress" and data["node"] == only(remote, "HYImageSampler") and data["value"] >= 2:
            server.interrupt()

    assert server.run(remote, cancel).status == "interrupted"
    deadline = time.monotonic() + 10
    while (said := client_of(address).status())["running"] or any(said["held"]):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_graph_runs_from_the_browser(server, address):
    shutil.copy(DATA / "photo.jpg", server.folder("input") / "example.png")
    with front_end.running_browser("no graph is tried in a browser against a cluster") as browser:
        page = front_end.open_page(browser, server)
        front_end.load(page, front_end.workflow("edit_one_photo"))
        page.evaluate("""address => {
            for (const node of window.app.graph.nodes.filter(n => ['HYWUModelLoader', 'HYWUGeneratorLoader'].includes(n.type)))
                node.widgets.find(w => w.name === 'placement').value = address;
        }""", address)
        page.evaluate(front_end.WATCH)
        front_end.fit_view(page)
        page.evaluate("() => window.app.queuePrompt(0)")
        page.wait_for_function("() => window.seen.ended", timeout=120 * front_end.SECONDS)
        seen = page.evaluate("() => window.seen")
        assert seen["ended"] == "success" and front_end.alerts(page) == []
        page.wait_for_function(front_end.PICTURES, timeout=30 * front_end.SECONDS)
        front_end.SHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=front_end.SHOTS / "cluster.png")
        page.close()
