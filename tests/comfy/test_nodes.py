"""What the nodes promise outside a run: ids, tooltips, help pages, fresh lists; and what they refuse, with the remedy."""

import json
import re
import shutil

import pytest
from comfyui_hywu.tests.comfy.graphs import DATA, ROOT, node_ids, only, pixels, small_graph
from comfyui_hywu.tests.comfy.server import PACK, Refused

# Ids are promises: graphs of users hold them.
NODES = {
    "HYWUModelLoader": (["backbone", "dtype", "format", "placement"], ["HYWU_MODEL", "VAE"]),
    "HYWUGeneratorLoader": (["generator", "dtype", "placement"], ["HYWU_GENERATOR"]),
    "HYWUThink": (["model", "instruction", "seed", "mode", "max_new_tokens", "temperature", "top_k", "top_p", "system_prompt",
                   "image_1", "image_2", "image_3"], ["STRING"]),
    "HYWUConditionEncoder": (["model", "instruction", "seed", "fit", "system_prompt", "thinking", "image_1", "image_2",
                              "image_3"], ["HYWU_CONDITION"]),
    "HYWUWeightGenerator": (["weight_generator", "condition"], ["HYWU_LORA"]),
    "HYWULoRAInjector": (["model", "lora", "strength"], ["HYWU_MODEL"]),
    "HYImageSampler": (["model", "condition", "steps", "guidance", "shift", "seed", "size"], ["LATENT"]),
    "HYWUMatchAspect": (["image", "model", "condition"], ["IMAGE"]),
    "HYWUSaveLoRA": (["lora", "filename_prefix", "stored", "keep_experts", "image"], []),
    "HYWULoadLoRA": (["lora_name"], ["HYWU_LORA"]),
    "HYWULoadLoRAs": (["folder", "filter"], ["HYWU_LORA", "STRING"]),
    "HYWUExportLoRA": (["lora", "filename_prefix"], []),
    "HYWUImportLoRA": (["folder", "model"], ["HYWU_LORA"]),
    "HYWUScaleLoRA": (["lora", "factor"], ["HYWU_LORA"]),
    "HYWUBlendLoRAs": (["lora_1", "weight_1", "weight_2", "weight_3", "weight_4", "rank", "lora_2", "lora_3", "lora_4"],
                       ["HYWU_LORA", "FLOAT"]),
    "HYWUMaskLoRA": (["lora", "layers", "attention", "shared_mlp", "routed_experts", "experts", "invert"], ["HYWU_LORA"]),
    "HYWUMeanLoRAs": (["lora_1", "of", "rank", "lora_2", "lora_3", "lora_4"], ["HYWU_LORA"]),
    "HYWUInspectLoRA": (["lora", "model", "sample"], ["IMAGE", "IMAGE", "IMAGE", "STRING"]),
    "HYWUCompareLoRAs": (["lora_a", "lora_b"], ["IMAGE", "FLOAT", "STRING"]),
    "HYWUMapLoRAs": (["folder", "filter", "lora_1", "lora_2", "lora_3", "lora_4"], ["IMAGE", "STRING"]),
    "HYWULoRAAB": (["model", "lora", "condition", "vae", "steps", "guidance", "shift", "seed", "size", "strength"],
                   ["IMAGE", "IMAGE", "IMAGE"]),
}


def inputs_of(info: dict) -> dict:
    return info["input"].get("required", {}) | info["input"].get("optional", {})


@pytest.mark.parametrize("node", NODES)
def test_a_node_keeps_its_ids_and_explains_itself(server, node):
    info = server.get(f"/object_info/{node}")[node]
    inputs, outputs = NODES[node]
    assert list(inputs_of(info)) == inputs
    assert info["output"] == outputs
    assert info["category"].startswith("HY-WU") and info["description"]
    for name, (_, options) in inputs_of(info).items():
        assert len(options.get("tooltip", "")) > 10, name
    assert len(info["output_tooltips"]) == len(outputs) and all(info["output_tooltips"])
    page = server.get(f"/extensions/{PACK}/docs/{node}.md").decode()
    assert page.startswith("# ") and len(page) > 300
    for name in inputs:
        assert f"`{name}`" in page or re.search(rf"`{name[:-1]}\d`", page), f"the help page of {node} does not explain {name}"


def test_the_pack_has_these_nodes_and_no_others(server):
    found = {name for name, info in server.get("/object_info").items() if info["python_module"] == f"custom_nodes.{PACK}"}
    assert found == set(NODES)


def test_only_web_files_are_served(server):
    for path in ("load.py", "../nodes/load.py", "docs/../../load.py"):
        with pytest.raises(Exception, match="404|403"):
            server.get(f"/extensions/{PACK}/{path}")


# ---- lists


def options(server, node: str, name: str) -> list[str]:
    return inputs_of(server.get(f"/object_info/{node}")[node])[name][1]["options"]


def test_lists_hold_each_kind_of_checkpoint_from_every_place(server):
    backbones, generators = options(server, "HYWUModelLoader", "backbone"), options(server, "HYWUGeneratorLoader", "generator")
    assert {"nano/base", "deep/base"} <= set(backbones)
    # other_pg comes from extra_model_paths.yaml.
    assert {"nano/pg", "deep/pg", "other_pg"} <= set(generators)
    assert not set(backbones) & set(generators)
    if (ROOT / "models" / "hywu-mini" / "backbone" / "config.json").exists():
        assert "hywu-mini/backbone" in backbones and "hywu-mini/generator" in generators


def test_a_new_folder_and_a_vanished_one_show_without_a_restart(server):
    models = server.base / "models" / "hywu"
    shutil.copytree(models / "nano" / "pg", models / "late" / "pg")
    assert "late/pg" in options(server, "HYWUGeneratorLoader", "generator")
    shutil.rmtree(models / "late")
    assert "late/pg" not in options(server, "HYWUGeneratorLoader", "generator")


def test_a_checkpoint_whose_files_changed_is_loaded_again(server):
    models = server.base / "models" / "hywu"
    shutil.copytree(models / "deep", models / "changing")
    graph = small_graph("edit_one_photo", "changing")
    loader = only(graph, "HYWUGeneratorLoader")
    assert server.run(graph).status == "success"
    assert loader not in server.run(graph).executed
    (models / "changing" / "pg" / "model.safetensors").touch()
    assert loader in server.run(graph).executed
    shutil.rmtree(models / "changing")


# ---- refusals before a run


def refusal(server, graph: dict) -> str:
    with pytest.raises(Refused) as refused:
        server.run(graph)
    return json.dumps(json.loads(str(refused.value)))


def test_a_missing_checkpoint_is_named_with_the_exact_path(server):
    graph = small_graph("edit_one_photo")
    graph[only(graph, "HYWUModelLoader")]["inputs"]["backbone"] = "HunyuanImage-3.0-Instruct"
    message = refusal(server, graph)
    assert str(server.base / "models" / "hywu" / "HunyuanImage-3.0-Instruct") in message
    assert "config.json" in message


def test_a_generator_is_no_backbone(server):
    graph = small_graph("edit_one_photo")
    graph[only(graph, "HYWUModelLoader")]["inputs"]["backbone"] = "deep/pg"
    message = refusal(server, graph)
    assert "parameter_generator" in message and "hunyuan_image_3_moe" in message


@pytest.mark.parametrize("name", ["../../input", "/etc", ""])
def test_a_checkpoint_name_that_climbs_out_is_refused(server, name):
    graph = small_graph("edit_one_photo")
    graph[only(graph, "HYWUModelLoader")]["inputs"]["backbone"] = name
    assert "must be a folder below" in refusal(server, graph)


def test_a_missing_lora_is_named_with_the_places(server):
    graph = small_graph("reuse_saved_lora")
    graph[only(graph, "HYWULoadLoRA")]["inputs"]["lora_name"] = "no_such.safetensors"
    message = refusal(server, graph)
    assert "no_such.safetensors" in message and str(server.base / "output" / "hywu_loras") in message


@pytest.mark.parametrize(("kind", "name", "value"), [
    ("HYImageSampler", "steps", 0), ("HYWUModelLoader", "dtype", "int1"), ("HYWUModelLoader", "format", "nf4"),
    ("HYWULoRAInjector", "strength", 4.5)])
def test_values_out_of_range_are_refused(server, kind, name, value):
    graph = small_graph("edit_one_photo")
    graph[only(graph, kind)]["inputs"][name] = value
    # ComfyUI runs whatever output is not concerned: leave it only the one that is.
    for other in ("PreviewAny", "HYWUSaveLoRA"):
        del graph[only(graph, other)]
    assert name in refusal(server, graph)


# ---- refusals during a run


def failure(server, graph: dict) -> str:
    run = server.run(graph)
    assert run.status == "error", run.status
    return run.error


@pytest.mark.parametrize(("kind", "name", "value"), [
    ("HYImageSampler", "size", "enormous"), ("HYWUThink", "mode", "dream"), ("HYWUConditionEncoder", "fit", "squeeze")])
def test_unknown_choices_are_refused(server, kind, name, value):
    """ComfyUI does not check the choices of v3 combos that come through the API; the core does."""
    graph = small_graph("edit_one_photo")
    graph[only(graph, kind)]["inputs"][name] = value
    assert value in failure(server, graph)


def test_an_empty_instruction_is_refused(server):
    graph = small_graph("edit_one_photo")
    graph[only(graph, "PrimitiveStringMultiline")]["inputs"]["value"] = "  "
    assert "instruction" in failure(server, graph)


@pytest.mark.parametrize("prefix", ["../outside", "/tmp/outside", "hywu_loras/../../outside", "..\\outside", "", "."])
def test_a_lora_is_saved_in_the_output_folder_only(server, prefix):
    graph = small_graph("edit_one_photo")
    graph[only(graph, "HYWUSaveLoRA")]["inputs"]["filename_prefix"] = prefix
    assert "output folder" in failure(server, graph)
    assert not list(server.base.glob("**/outside*"))


def test_a_lora_of_another_backbone_is_refused_with_both_fingerprints(server):
    graph = small_graph("edit_one_photo")
    graph["90"] = {"class_type": "HYWUModelLoader", "inputs": {"backbone": "nano/base", "dtype": "checkpoint"}}
    graph[only(graph, "HYWULoRAInjector")]["inputs"]["model"] = ["90", 0]
    message = failure(server, graph)
    assert message.startswith("HYWULoRAInjector") and len(set(re.findall(r"\b[0-9a-f]{16}\b", message))) == 2


def test_a_damaged_lora_file_is_refused(server):
    folder = server.folder("output/hywu_loras")
    (folder / "damaged.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    graph = small_graph("reuse_saved_lora")
    graph[only(graph, "HYWULoadLoRA")]["inputs"]["lora_name"] = "damaged.safetensors"
    message = failure(server, graph)
    assert message.startswith("HYWULoadLoRA") and "damaged.safetensors" in message
    (folder / "damaged.safetensors").unlink()  # whoever loads all LoRAs of this server would meet it


def test_a_batch_counts_as_pictures_and_four_are_too_many(server):
    graph = small_graph("combine_two")
    encoder = graph[only(graph, "HYWUConditionEncoder")]["inputs"]
    think = graph[only(graph, "HYWUThink")]["inputs"]
    first, second = encoder["image_1"], encoder["image_2"]
    graph["90"] = {"class_type": "RepeatImageBatch", "inputs": {"image": first, "amount": 2}}
    for inputs in (think, encoder):
        del inputs["image_2"]
        inputs["image_1"] = ["90", 0]
    as_batch = pixels(server, server.run(graph), only(graph, "SaveImage"))
    for inputs in (think, encoder):
        inputs |= {"image_1": first, "image_2": first}
    assert (pixels(server, server.run(graph), only(graph, "SaveImage")) == as_batch).all()
    for inputs in (think, encoder):
        inputs |= {"image_1": ["90", 0], "image_2": ["90", 0], "image_3": second}
    assert "5 source pictures" in failure(server, graph)


def test_a_wrong_picture_is_refused_by_its_size(server):
    from PIL import Image

    Image.new("RGB", (900, 20), "red").save(server.folder("input") / "strip.png")
    graph = small_graph("edit_one_photo")
    graph[only(graph, "LoadImage")]["inputs"]["image"] = "strip.png"
    assert "900 x 20" in failure(server, graph)


def test_after_all_these_refusals_the_graph_still_runs(server):
    graph = small_graph("edit_one_photo")
    run = server.run(graph)
    assert run.status == "success", run.error
    assert len(node_ids(graph, "SaveImage")) == 1 and pixels(server, run, only(graph, "SaveImage")).std() > 0
    assert (DATA / "photo.jpg").stat().st_size <= 200_000
