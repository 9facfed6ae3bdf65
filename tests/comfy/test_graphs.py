"""The shipped graphs through ComfyUI's API: results, caching, branches, and ComfyUI's own VAE nodes."""

import json

import numpy as np
import pytest
from comfyui_hywu.hywu_core.edit import edit
from comfyui_hywu.hywu_core.generator.handle import load_generator
from comfyui_hywu.hywu_core.handle import load_model
from comfyui_hywu.hywu_core.lora.files import load_lora
from comfyui_hywu.hywu_core.vision.buckets import Buckets
from comfyui_hywu.hywu_core.vision.pictures import load_picture
from comfyui_hywu.tests.comfy.graphs import DATA, GRAPHS, node_ids, only, pixels, small_graph
from PIL import Image


@pytest.mark.parametrize("name", ["edit_one_photo", "combine_two", "with_and_without_lora"])
def test_graph_runs_and_every_long_stage_ticks(server, name):
    server.forget()
    graph = small_graph(name)
    run = server.run(graph)
    assert run.status == "success", run.error
    for kind in ("HYWUModelLoader", "HYWUGeneratorLoader", "HYWUThink", "HYWUConditionEncoder", "HYWUWeightGenerator",
                 "HYImageSampler"):
        for node in node_ids(graph, kind):
            assert run.ticks.get(node, 0) >= 2, f"{kind} ticked {run.ticks.get(node, 0)} times"
    assert run.previews >= len(node_ids(graph, "HYImageSampler"))
    for node in node_ids(graph, "SaveImage"):
        assert pixels(server, run, node).std() > 0


def ran(server, name: str) -> tuple[dict, object]:
    """A LoRA graph on the random checkpoint, with the LoRAs of a folder of its own where it takes those of a folder."""
    graph = small_graph(name)
    for kind in ("HYWUMapLoRAs", "HYWULoadLoRAs"):
        for node in node_ids(graph, kind):
            graph[node]["inputs"]["folder"] = "many"
    run = server.run(graph)
    assert run.status == "success", run.error
    for node in node_ids(graph, "SaveImage"):
        assert pixels(server, run, node).std() > 0
    return graph, run


def text_of(run, node: str) -> str:
    return run.history["outputs"][node]["text"][0]


def test_inspect_graph_shows_three_pictures_and_the_difference(server):
    graph, run = ran(server, "inspect_lora")
    shown = {graph[node]["_meta"]["title"]: np.asarray(Image.open(server.outputs(run, node)[0]).convert("RGB"))
             for node in node_ids(graph, "PreviewImage")}
    assert list(shown) == ["Norm map", "Spectrum", "Experts", "Without", "With the LoRA", "Difference"]
    assert all(picture.std() > 0 for picture in shown.values())
    assert (shown["Without"] != shown["With the LoRA"]).any()
    # Model and latent are wired: the panel knows the weights and the routing.
    data = json.loads(run.history["outputs"][only(graph, "HYWUInspectLoRA")]["hywu_inspect"][0])
    assert data["relative"] and data["routing"]


def test_blend_graph_adds_what_two_injectors_add(server):
    graph, run = ran(server, "blend_loras")
    said, = run.texts[only(graph, "HYWUBlendLoRAs")]
    assert said.startswith("2 LoRAs, rank ") and said.endswith(", exact")
    blended = pixels(server, run, only(graph, "SaveImage"))
    one, two = node_ids(graph, "HYWUWeightGenerator")
    injector, sampler = only(graph, "HYWULoRAInjector"), only(graph, "HYImageSampler")
    graph[injector]["inputs"]["lora"] = [one, 0]
    graph["90"] = {"class_type": "HYWULoRAInjector", "inputs": {"model": [injector, 0], "lora": [two, 0], "strength": 1.0}}
    graph[sampler]["inputs"]["model"] = ["90", 0]
    in_a_row = pixels(server, server.run(graph), only(graph, "SaveImage"))
    assert np.abs(in_a_row.astype(int) - blended).max() <= 1


def test_mask_graph_paints_a_part_and_its_rest(server):
    graph, run = ran(server, "mask_lora")
    kept, rest = node_ids(graph, "HYWUMaskLoRA")
    settings = [dict(graph[node]["inputs"]) for node in (kept, rest)]
    assert [each.pop("invert") for each in settings] == [False, True] and settings[0] == settings[1]
    first, second = (pixels(server, run, node) for node in node_ids(graph, "SaveImage"))
    assert (first != second).any()


def test_map_graph_takes_what_edit_one_photo_saved(server):
    for words in ("make it brighter", "make it gray and cool"):
        graph = small_graph("edit_one_photo")
        graph[only(graph, "PrimitiveStringMultiline")]["inputs"]["value"] = words
        graph[only(graph, "HYWUSaveLoRA")]["inputs"]["filename_prefix"] = "hywu_loras/many/edit"
        assert server.run(graph).status == "success"
    graph, run = ran(server, "map_loras")
    assert run.texts[only(graph, "HYWULoadLoRAs")] == ["2 LoRAs"]
    report = text_of(run, only(graph, "PreviewAny"))
    assert report.startswith("3 LoRAs") and "make it gray and cool" in report
    assert "  \n" in report  # Preview Any reads Markdown: without the blanks all lines become one


def test_a_map_graph_without_saved_loras_says_so(server):
    graph = small_graph("map_loras")
    graph[only(graph, "HYWULoadLoRAs")]["inputs"]["filter"] = "no such words"
    for node in node_ids(graph, "PreviewImage") + node_ids(graph, "PreviewAny"):
        del graph[node]  # and with them the map, which would show all that other tests have saved
    run = server.run(graph)
    assert run.status == "error" and "save some first" in run.error


def test_a_shared_lora_does_elsewhere_what_it_did_here(server):
    graph = small_graph("share_lora")
    # The other graph has no thinking: drop it here too, so that only the LoRA's way differs.
    graph[only(graph, "HYWUConditionEncoder")]["inputs"]["thinking"] = ""
    here = server.run(graph)
    assert here.status == "success", here.error
    exported = text_of(here, only(graph, "HYWUExportLoRA")).rsplit("/", 1)[1]
    assert here.texts[only(graph, "HYWUExportLoRA")] == [f"exported {exported}"]
    other = small_graph("use_shared_lora")
    other[only(other, "HYWUImportLoRA")]["inputs"]["folder"] = exported
    assert not node_ids(other, "HYWUGeneratorLoader")
    assert np.array_equal(
        pixels(server, server.run(other), only(other, "SaveImage")), pixels(server, here, only(graph, "SaveImage")))


def test_every_shipped_graph_has_its_twin():
    workflows = GRAPHS.parents[1] / "workflows"
    assert {path.name for path in GRAPHS.glob("*.json")} == {path.name for path in workflows.glob("*.json")}


def test_lora_changes_the_picture_and_strength_zero_does_not(server):
    graph = small_graph("with_and_without_lora")
    with_lora, without = node_ids(graph, "SaveImage")
    run = server.run(graph)
    adapted, plain = pixels(server, run, with_lora), pixels(server, run, without)
    assert (adapted != plain).any()
    graph[only(graph, "HYWULoRAInjector")]["inputs"]["strength"] = 0.0
    assert np.array_equal(pixels(server, server.run(graph), with_lora), plain)


def test_a_changed_strength_runs_only_the_sampler(server):
    graph = small_graph("edit_one_photo")
    assert server.run(graph).status == "success"
    graph[only(graph, "HYWULoRAInjector")]["inputs"]["strength"] = 0.37
    run = server.run(graph)
    assert run.status == "success", run.error
    ran = {graph[node]["class_type"] for node in run.executed}
    # The injector makes a value; decoding and saving follow from the new latent.
    assert ran == {"HYWULoRAInjector", "HYImageSampler", "VAEDecode", "HYWUMatchAspect", "SaveImage"}
    cached = {graph[node]["class_type"] for data in run.of_type("execution_cached") for node in data["nodes"]}
    assert {"HYWUModelLoader", "HYWUGeneratorLoader", "HYWUThink", "HYWUConditionEncoder", "HYWUWeightGenerator"} <= cached


def two_branches(graph: dict) -> dict:
    """The A/B graph with a second instruction, condition and LoRA for branch B."""
    graph = json.loads(json.dumps(graph))
    samplers = node_ids(graph, "HYImageSampler")
    for kind, new in (("HYWUConditionEncoder", "101"), ("HYWUWeightGenerator", "102"), ("HYWULoRAInjector", "103")):
        graph[new] = json.loads(json.dumps(graph[only(graph, kind)]))
    graph["101"]["inputs"]["instruction"] = "make it gray and cool"
    graph["102"]["inputs"]["condition"] = ["101", 0]
    graph["103"]["inputs"] |= {"lora": ["102", 0], "strength": -1.5}
    graph[samplers[1]]["inputs"] |= {"model": ["103", 0], "condition": ["101", 0]}
    return graph


def without_branch(graph: dict, save: str) -> dict:
    """The graph without one Save Image node; ComfyUI runs only what the other needs."""
    return {key: node for key, node in graph.items() if key != save}


def test_two_loras_in_one_graph_equal_two_separate_runs(server):
    graph = two_branches(small_graph("with_and_without_lora"))
    first, second = node_ids(graph, "SaveImage")
    server.forget()
    together = server.run(graph)
    separate = []
    for kept, dropped in ((first, second), (second, first)):
        server.forget()
        run = server.run(without_branch(graph, dropped))
        assert len([node for node in run.executed if graph[node]["class_type"] == "HYImageSampler"]) == 1
        separate.append(pixels(server, run, kept))
    assert np.array_equal(pixels(server, together, first), separate[0])
    assert np.array_equal(pixels(server, together, second), separate[1])
    assert (separate[0] != separate[1]).any()


def test_the_same_graph_again_gives_the_same_picture(server):
    graph = small_graph("edit_one_photo")
    save = only(graph, "SaveImage")
    server.forget()
    first = pixels(server, server.run(graph), save)
    server.forget()
    assert np.array_equal(pixels(server, server.run(graph), save), first)


def test_a_saved_lora_does_what_the_fresh_one_did_without_the_generator(server):
    graph = small_graph("edit_one_photo")
    # The saved-LoRA graph has no thinking: drop it here too, so that only the LoRA's way differs.
    graph[only(graph, "HYWUConditionEncoder")]["inputs"]["thinking"] = ""
    save_lora = only(graph, "HYWUSaveLoRA")
    graph[save_lora]["inputs"]["filename_prefix"] = "hywu_loras/reuse"
    server.forget()
    fresh_run = server.run(graph)
    fresh = pixels(server, fresh_run, only(graph, "SaveImage"))
    saved = fresh_run.history["outputs"][save_lora]["text"][0]
    reuse = small_graph("reuse_saved_lora")
    reuse[only(reuse, "HYWULoadLoRA")]["inputs"]["lora_name"] = saved.rsplit("/", 1)[1]
    assert not node_ids(reuse, "HYWUGeneratorLoader")
    server.forget()
    assert np.array_equal(pixels(server, server.run(reuse), only(reuse, "SaveImage")), fresh)


def test_picture_from_text_alone(server):
    graph = small_graph("with_and_without_lora")
    for kind in ("HYWUThink", "HYWUConditionEncoder"):
        del graph[only(graph, kind)]["inputs"]["image_1"]
    del graph[only(graph, "LoadImage")]
    run = server.run(graph)
    for save in node_ids(graph, "SaveImage"):
        assert pixels(server, run, save).std() > 0


def test_comfyuis_own_vae_nodes_take_the_vae(server):
    """Encode a photo; decode it plainly, tiled in one tile, and in many: one tile gives the same, many the same size."""
    with Image.open(DATA / "coffee.jpg") as photo:
        photo.crop((200, 100, 384, 220)).save(server.folder("input") / "small.png")
    graph = {
        "1": {"class_type": "HYWUModelLoader", "inputs": {"backbone": "deep/base", "dtype": "checkpoint"}},
        "2": {"class_type": "LoadImage", "inputs": {"image": "small.png"}},
        "3": {"class_type": "VAEEncode", "inputs": {"pixels": ["2", 0], "vae": ["1", 1]}},
        "4": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["1", 1]}},
        "5": {"class_type": "SaveImage", "inputs": {"images": ["4", 0], "filename_prefix": "vae"}},
    }
    for number, (tile, overlap) in enumerate(((1024, 64), (64, 16))):
        decode, save = f"6{number}", f"7{number}"
        graph[decode] = {"class_type": "VAEDecodeTiled", "inputs": {
            "samples": ["3", 0], "vae": ["1", 1], "tile_size": tile, "overlap": overlap,
            "temporal_size": 64, "temporal_overlap": 8}}
        graph[save] = {"class_type": "SaveImage", "inputs": {"images": [decode, 0], "filename_prefix": "vae_tiled"}}
    run = server.run(graph)
    plain = pixels(server, run, "5")
    # 120 x 184 is cropped to whole latent cells of 16.
    assert plain.shape == (112, 176, 3)
    assert np.abs(pixels(server, run, "70").astype(int) - plain).max() <= 1
    assert pixels(server, run, "71").shape == plain.shape


def test_match_aspect_gives_the_source_its_ratio_back(server):
    """400 x 500 meets the size 112 x 144; 128 x 128 pixels in its own ratio are 114 x 143. Other sizes pass unchanged."""
    with Image.open(DATA / "coffee.jpg") as photo:
        photo.crop((0, 0, 500, 400)).save(server.folder("input") / "between.png")
    graph = small_graph("with_and_without_lora")
    graph[only(graph, "LoadImage")]["inputs"]["image"] = "between.png"
    first, second = node_ids(graph, "HYImageSampler")
    graph[first]["inputs"]["size"] = "5:4"
    graph[second]["inputs"]["size"] = "1:1"
    bucket = Buckets(128).nearest(400, 500)
    assert (bucket.height, bucket.width) == (112, 144)
    run = server.run(graph)
    assert [pixels(server, run, node).shape[:2] for node in node_ids(graph, "SaveImage")] == [(114, 143), (128, 128)]


def test_the_nodes_give_what_the_core_gives(server):
    """The one-photo graph against ``edit``: same settings, same picture; only the number of threads may round otherwise."""
    graph = small_graph("edit_one_photo")
    graph[only(graph, "HYWUConditionEncoder")]["inputs"] |= {"thinking": "", "fit": "crop", "seed": 5}
    sampler = graph[only(graph, "HYImageSampler")]["inputs"]
    sampler["seed"] = 5
    graph[only(graph, "HYWULoRAInjector")]["inputs"]["strength"] = 0.8
    graph[only(graph, "HYWUSaveLoRA")]["inputs"]["filename_prefix"] = "hywu_loras/core"
    run = server.run(graph)
    from_graph = pixels(server, run, only(graph, "SaveImage"))

    models = server.base / "models" / "hywu" / "deep"
    result = edit(
        load_model(models / "base"), load_generator(models / "pg"), [load_picture(DATA / "photo.jpg")],
        graph[only(graph, "PrimitiveStringMultiline")]["inputs"]["value"], thinking="", steps=sampler["steps"],
        guidance=sampler["guidance"], shift=sampler["shift"], seed=5, size=sampler["size"], strength=0.8)
    assert np.abs(np.asarray(result.picture).astype(int) - from_graph).max() <= 1
    saved = load_lora(server.base / "output" / "hywu_loras" / "core_00001_.safetensors")
    assert saved.provenance == result.lora.provenance
