"""Cancel in the middle of every stage: it stops within a tick or two, leaves nothing attached, and the next run is right."""

import numpy as np
import pytest
from comfyui_hywu.tests.comfy.graphs import only, pixels, small_graph

STEPS = 12


def graph_for_cancel() -> dict:
    graph = small_graph("edit_one_photo")
    graph[only(graph, "HYWUThink")]["inputs"]["max_new_tokens"] = 40
    graph[only(graph, "HYImageSampler")]["inputs"]["steps"] = STEPS
    return graph


@pytest.fixture(scope="module")
def expected(server) -> np.ndarray:
    """The picture of a run that nobody disturbed."""
    graph = graph_for_cancel()
    server.forget()
    return pixels(server, server.run(graph), only(graph, "SaveImage"))


@pytest.mark.parametrize("stage", ["HYWUThink", "HYWUConditionEncoder", "HYWUWeightGenerator", "HYImageSampler"])
def test_cancel_stops_within_a_tick_and_the_next_run_is_right(server, expected, stage):
    graph = graph_for_cancel()
    node = only(graph, stage)
    server.forget()
    ticks = {"at cancel": 0, "total": 0}

    def cancel_at_second_tick(message):
        data = message["data"]
        if message["type"] != "progress" or data["node"] != node:
            return
        ticks["total"] = data["max"]
        if data["value"] >= 2 and not ticks["at cancel"]:
            server.interrupt()
            ticks["at cancel"] = data["value"]

    run = server.run(graph, cancel_at_second_tick)
    assert run.status == "interrupted"
    stopped, = run.of_type("execution_interrupted")
    assert stopped["node_id"] == node, f"stopped in {stopped['node_type']}"
    values = [data["value"] for data in run.of_type("progress") if data["node"] == node]
    assert max(values) < ticks["total"], "the stage had finished before it was cancelled"
    assert not [node for node in run.executed if graph[node]["class_type"] == "SaveImage"]

    again = server.run(graph)
    assert np.array_equal(pixels(server, again, only(graph, "SaveImage")), expected)
    # Nothing of the cancelled run's LoRA is left in the backbone: the plain picture differs from the adapted one.
    graph[only(graph, "HYWULoRAInjector")]["inputs"]["strength"] = 0.0
    plain = pixels(server, server.run(graph), only(graph, "SaveImage"))
    assert (plain != expected).any()


def test_ticks_after_a_cancel_are_few(server, expected):
    """Counted while sampling, whose ticks (one a layer, milliseconds apart) come fastest."""
    graph = graph_for_cancel()
    node = only(graph, "HYImageSampler")
    graph[node]["inputs"]["seed"] = 7  # not what is cached
    counts = {"answered": None, "ticks": 0}

    def cancel_once(message):
        if message["type"] != "progress" or message["data"]["node"] != node:
            return
        counts["ticks"] += 1
        if counts["answered"] is None and message["data"]["value"] >= 2:
            server.interrupt()
            counts["answered"] = counts["ticks"]

    run = server.run(graph, cancel_once)
    assert run.status == "interrupted"
    # An upper bound: ticks that were sent while the cancel was on its way are counted too. A step alone has 24.
    assert counts["ticks"] - counts["answered"] <= 12, counts
