"""LoRA files in a running ComfyUI: smaller forms, thumbnails, each LoRA listed once, PEFT folders out and in."""

import json
import shutil

import numpy as np
import pytest
from comfyui_hywu.hywu_core.lora.files import load_lora, read_summary, save_lora
from comfyui_hywu.hywu_core.lora.value import LoRA, Provenance
from comfyui_hywu.tests.comfy.graphs import only, pixels, small_graph
from comfyui_hywu.tests.comfy.server import Refused
from comfyui_hywu.tests.lora.test_stored import decoded
from PIL import Image


def options(server, node: str, name: str) -> list[str]:
    info = server.get(f"/object_info/{node}")[node]["input"]
    return (info.get("required", {}) | info.get("optional", {}))[name][1]["options"]


def save(server, **inputs):
    """Run the edit with a Save LoRA of these inputs; the run, the node's ui output and the file."""
    graph = small_graph("edit_one_photo")
    node = only(graph, "HYWUSaveLoRA")
    graph[node]["inputs"] |= inputs
    run = server.run(graph)
    assert run.status == "success", run.error
    shown = run.history["outputs"][node]
    return run, shown, server.base / "output" / shown["text"][0].split("/output/")[1]


def test_a_saved_lora_has_a_map_for_a_picture_and_says_its_size(server):
    _, shown, path = save(server, filename_prefix="hywu_loras/plain")
    assert "MB, no error" in shown["text"][1]
    summary = read_summary(path)
    assert max(decoded(summary.thumbnail).size) == 256 and summary.digest == load_lora(path).digest
    image = shown["images"][0]
    assert image["type"] == "temp" and (server.base / "temp" / image["subfolder"] / image["filename"]).is_file()


def test_smaller_forms_and_the_edit_for_a_picture(server):
    graph = small_graph("edit_one_photo")
    source = only(graph, "LoadImage")
    _, shown, path = save(server, filename_prefix="hywu_loras/small", stored="fp8", keep_experts=60, image=[source, 0])
    summary = read_summary(path)
    kept = sum(map(len, summary.form.kept))
    assert summary.form.stored == "fp8" and f"{summary.error:.3%}" in shown["text"][1]
    assert f"{kept} of " in shown["text"][1]
    width, height = decoded(summary.thumbnail).size
    preview = shown["images"][0]
    with decoded((server.base / "temp" / preview["subfolder"] / preview["filename"]).read_bytes()) as picture:
        assert picture.size == (width, height)


def test_a_lora_in_several_files_is_listed_once_and_every_name_loads(server):
    _, _, path = save(server, filename_prefix="hywu_loras/twice")
    lora = load_lora(path)  # the same as other tests saved: make it one of its own
    save_lora(LoRA.from_tensors(lora.tensors, 1.25 * lora.alpha, lora.provenance), path, picture=Image.new("RGB", (8, 8)))
    copy = path.with_name("twice_copy.safetensors")
    shutil.copy(path, copy)
    damaged = path.with_name("twice_damaged.safetensors")
    damaged.write_bytes(path.read_bytes()[:-1])
    listed = [name for name in options(server, "HYWULoadLoRA", "lora_name") if name.startswith("twice")]
    assert listed == [path.name, damaged.name]
    graph = small_graph("reuse_saved_lora")
    graph[only(graph, "HYWULoadLoRA")]["inputs"]["lora_name"] = copy.name
    assert server.run(graph).status == "success"
    path.unlink()
    listed = [name for name in options(server, "HYWULoadLoRA", "lora_name") if name.startswith("twice")]
    assert listed == [copy.name, damaged.name]
    damaged.unlink()


def test_load_shows_the_instruction_without_markup(server):
    _, _, path = save(server, filename_prefix="hywu_loras/shown")
    lora = load_lora(path)
    nasty = LoRA.from_tensors(lora.tensors, lora.alpha, Provenance(
        lora.provenance.backbone_fingerprint, instruction="<img src=x onerror=alert(1)>" + "x" * 1_000_000))
    save_lora(nasty, path.with_name("nasty.safetensors"))
    graph = small_graph("reuse_saved_lora")
    node = only(graph, "HYWULoadLoRA")
    graph[node]["inputs"]["lora_name"] = "nasty.safetensors"
    run = server.run(graph)
    assert run.status == "success", run.error
    text = run.history["outputs"][node]["text"][0]
    assert "onerror" in text and "<" not in text and len(text) < 400


def test_an_exported_lora_comes_back_and_paints_the_same(server):
    graph = small_graph("edit_one_photo")
    graph["90"] = {"class_type": "HYWUExportLoRA", "inputs": {
        "lora": [only(graph, "HYWUWeightGenerator"), 0], "filename_prefix": "hywu_loras/out/peft"}}
    run = server.run(graph)
    assert run.status == "success", run.error
    fresh = pixels(server, run, only(graph, "SaveImage"))
    folder = server.base / "output" / run.history["outputs"]["90"]["text"][0].split("/output/")[1]
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    name = folder.relative_to(server.base / "output" / "hywu_loras").as_posix()
    assert name in options(server, "HYWUImportLoRA", "folder")
    assert not [each for each in options(server, "HYWULoadLoRA", "lora_name") if "adapter_model" in each]
    graph["91"] = {"class_type": "HYWUImportLoRA", "inputs": {"folder": name}}
    graph[only(graph, "HYWULoRAInjector")]["inputs"]["lora"] = ["91", 0]
    run = server.run(graph)
    assert run.status == "success", run.error
    assert np.array_equal(pixels(server, run, only(graph, "SaveImage")), fresh)
    assert run.history["outputs"]["91"]["text"][0]


@pytest.mark.parametrize("name", ["../../models", "/etc", "", "no/such/folder", "a\\b", "C:x"])
def test_a_peft_folder_outside_or_missing_is_refused(server, name):
    graph = small_graph("edit_one_photo")
    graph["91"] = {"class_type": "HYWUImportLoRA", "inputs": {"folder": name}}
    graph["92"] = {"class_type": "HYWUExportLoRA", "inputs": {"lora": ["91", 0], "filename_prefix": "hywu_loras/never"}}
    with pytest.raises(Refused, match="must be the name of a folder below|is missing: looked for adapter_config.json"):
        server.run({key: node for key, node in graph.items() if key in ("91", "92")})
    assert not (server.base / "output" / "hywu_loras" / "never_00001_").exists()
