"""The nodes that look into LoRAs, in a running ComfyUI: what they send, and that they agree with each other and the sampler."""

import json

import numpy as np
import pytest
from comfyui_hywu.tests.comfy.graphs import only, pixels, small_graph
from PIL import Image

INSPECT = "20"


def view_graph(kind: str, inputs: dict, pictures: dict[str, int], texts: dict[str, int]) -> dict:
    """The edit graph with a node ``INSPECT`` of a kind; its pictures are saved and its texts shown under the given ids."""
    graph = small_graph("edit_one_photo")
    lora, model = [only(graph, "HYWUWeightGenerator"), 0], [only(graph, "HYWUModelLoader"), 0]
    sockets = {"LORA": lora, "MODEL": model, "VAE": [model[0], 1], "CONDITION": [only(graph, "HYWUConditionEncoder"), 0],
               "SAMPLE": [only(graph, "HYImageSampler"), 0]}
    graph[INSPECT] = {"class_type": kind, "inputs": {
        name: sockets.get(value, value) if isinstance(value, str) else value for name, value in inputs.items()}}
    for node, slot in pictures.items():
        graph[node] = {"class_type": "SaveImage", "inputs": {"images": [INSPECT, slot], "filename_prefix": f"view/{kind}"}}
    for node, slot in texts.items():
        graph[node] = {"class_type": "PreviewAny", "inputs": {"source": [INSPECT, slot]}}
    return graph


def text_of(run, node: str) -> str:
    return run.history["outputs"][node]["text"][0]


@pytest.fixture(scope="module")
def inspected(server):
    graph = view_graph("HYWUInspectLoRA", {"lora": "LORA", "model": "MODEL", "sample": "SAMPLE"},
                       {"30": 0, "31": 1, "32": 2}, {"33": 3})
    run = server.run(graph)
    assert run.status == "success", run.error
    return graph, run


def test_inspect_draws_and_reports(server, inspected):
    _, run = inspected
    for node in ("30", "31", "32"):
        assert pixels(server, run, node).std() > 10
    report = text_of(run, "33")
    assert "make it brighter" in report and "self_attn.qkv_proj" in report and "tokens routed" in report


def test_inspect_sends_the_panel_what_it_measured(server, inspected):
    graph, run = inspected
    sent, = run.history["outputs"][INSPECT]["hywu_inspect"]
    data = json.loads(sent)
    assert len(sent) < 300_000 and data["layers"] == 24 and data["instruction"] == "make it brighter"
    routing = np.array(data["routing"])
    # Every layer routes the same tokens, each of them to as many experts.
    assert routing.shape == (24, data["targets"][-1]["experts"]) and len(set(routing.sum(1))) == 1 and routing.sum() > 0
    assert 0 < max(max(row) for row in data["relative"]) < 100
    assert server.run(graph).executed == set()  # and a second look costs nothing


def test_inspect_does_without_model_and_sample(server):
    run = server.run(view_graph("HYWUInspectLoRA", {"lora": "LORA"}, {"30": 0}, {"33": 3}))
    data = json.loads(run.history["outputs"][INSPECT]["hywu_inspect"][0])
    assert run.status == "success" and data["relative"] is None and data["routing"] is None


def test_a_latent_of_another_node_has_no_routing_and_it_is_said(server):
    graph = view_graph("HYWUInspectLoRA", {"lora": "LORA"}, {}, {"33": 3})
    graph["40"] = {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}}
    graph[INSPECT]["inputs"]["sample"] = ["40", 0]
    run = server.run(graph)
    assert run.status == "success" and "no routing" in text_of(run, "33")


def test_extra_keys_of_a_latent_pass_through_comfyui(server):
    """Latent nodes copy what they do not know; saving and decoding leave it out."""
    graph = view_graph("HYWUInspectLoRA", {"lora": "LORA"}, {}, {"33": 3})
    sampler = only(graph, "HYImageSampler")
    graph["40"] = {"class_type": "LatentMultiply", "inputs": {"samples": [sampler, 0], "multiplier": 0.5}}
    graph["41"] = {"class_type": "SaveLatent", "inputs": {"samples": ["40", 0], "filename_prefix": "view/latent"}}
    graph[INSPECT]["inputs"]["sample"] = ["40", 0]
    run = server.run(graph)
    assert run.status == "success", run.error
    assert "tokens routed" in text_of(run, "33")


def test_the_weights_of_another_backbone_are_refused(server):
    graph = view_graph("HYWUInspectLoRA", {"lora": "LORA"}, {}, {})
    graph["90"] = {"class_type": "HYWUModelLoader", "inputs": {"backbone": "nano/base", "dtype": "checkpoint"}}
    graph[INSPECT]["inputs"]["model"] = ["90", 0]
    run = server.run(graph)
    assert run.status == "error" and "does not fit the backbone" in run.error


def test_a_lora_is_its_own_like(server):
    run = server.run(view_graph("HYWUCompareLoRAs", {"lora_a": "LORA", "lora_b": "LORA"}, {"30": 0}, {"33": 1, "34": 2}))
    assert run.status == "success", run.error
    assert float(text_of(run, "33")) == pytest.approx(1, abs=1e-6)
    assert pixels(server, run, "30").std() > 10 and "0.0°" in text_of(run, "34")


def test_the_map_shows_saved_and_wired_loras(server):
    # Words of its own: of equal LoRAs that other tests have saved the map takes only one.
    def asked(graph: dict, words: str) -> dict:
        graph[only(graph, "PrimitiveStringMultiline")]["inputs"]["value"] = words
        return graph

    assert server.run(asked(small_graph("edit_one_photo"), "make it mapped")).status == "success"
    graph = asked(view_graph("HYWUMapLoRAs", {"folder": "all", "filter": "mapped", "lora_2": "LORA"}, {"30": 0}, {"33": 1}),
                  "make it mapped")
    run = server.run(graph)
    assert run.status == "success", run.error
    report = text_of(run, "33")
    assert "lora_2" in report and "edit_000" in report and "cosine 1.00" in report
    assert pixels(server, run, "30").shape == (1000, 1400, 3)
    assert INSPECT not in server.run(graph).executed
    # A new file is noticed, an unknown word finds nothing.
    another = asked(small_graph("edit_one_photo"), "make it mapped and cool")
    another[only(another, "HYWUSaveLoRA")]["inputs"]["filename_prefix"] = "hywu_loras/more/edit"
    assert server.run(another).status == "success"
    assert "more/edit_00001_.safetensors" in text_of(server.run(graph), "33")
    graph[INSPECT]["inputs"]["folder"] = "more"
    report = text_of(server.run(graph), "33")
    assert "more/edit_00001_.safetensors" in report and report.count(".safetensors") == 1
    graph[INSPECT]["inputs"]["filter"] = "no such words"
    failed = server.run(graph)
    assert failed.status == "error" and "at least 1 LoRA" in failed.error


def test_a_b_paints_what_sampler_and_injector_paint(server):
    settings = {"steps": 3, "guidance": 2.5, "shift": 1.0, "seed": 0, "size": "1:1", "strength": 1.0}
    graph = view_graph("HYWULoRAAB", {
        "model": "MODEL", "lora": "LORA", "condition": "CONDITION", "vae": "VAE", **settings}, {"30": 0, "31": 1, "32": 2}, {})
    decoder = only(graph, "VAEDecode")
    graph["35"] = {"class_type": "SaveImage", "inputs": {"images": [decoder, 0], "filename_prefix": "view/sampler"}}
    run = server.run(graph)
    assert run.status == "success", run.error
    without, with_lora, difference = (pixels(server, run, node) for node in ("30", "31", "32"))
    assert (with_lora == pixels(server, run, "35")).all()
    assert (without != with_lora).any()
    assert difference.shape == with_lora.shape and difference.std() > 0
    assert "difference x" in text_of(run, INSPECT)
    # Without the LoRA it is the plain model's.
    graph[only(graph, "HYWULoRAInjector")]["inputs"]["strength"] = 0.0
    assert (pixels(server, server.run(graph), "35") == without).all()


def test_a_picture_without_difference_is_gray(server):
    settings = {"steps": 2, "guidance": 1.0, "shift": 1.0, "seed": 0, "size": "1:1", "strength": 0.0}
    graph = view_graph("HYWULoRAAB", {
        "model": "MODEL", "lora": "LORA", "condition": "CONDITION", "vae": "VAE", **settings}, {"32": 2}, {})
    run = server.run(graph)
    shown = pixels(server, run, "32")
    below = shown[shown.shape[0] // 2 :]
    assert set(np.unique(below)) <= {127, 128}
    assert Image.open(server.outputs(run, "32")[0]).size == shown.shape[1::-1]
