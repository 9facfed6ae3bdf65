"""Loading a backbone folder, what is refused, and the real configuration key for key on ``meta``."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from comfyui_hywu.hywu_core.checkpoint import UNUSED_VISION_HEAD, slots
from comfyui_hywu.hywu_core.config import BackboneConfig
from comfyui_hywu.hywu_core.errors import CheckpointError, RequestError
from comfyui_hywu.hywu_core.handle import build_backbone, load_model
from safetensors.torch import load_file, save_file

REAL = Path(__file__).parent / "data" / "real-config"


@pytest.fixture
def folder(tiny_folders, tmp_path) -> Path:
    """A copy of the tiny backbone that may be spoilt."""
    return Path(shutil.copytree(tiny_folders[0], tmp_path / "backbone"))


def expected_real_names() -> dict[str, tuple[int, ...]]:
    """The published tensors: the list names layer 0, expert 0 and vision layer 0; the others repeat them."""
    listed = json.loads((REAL / "real_keys.json").read_text())["base"]
    names = {}
    for name, shape in listed.items():
        variants = [name]
        if ".experts.0." in name:
            variants = [name.replace(".experts.0.", f".experts.{expert}.") for expert in range(64)]
        if name.startswith("model.layers.0."):
            variants = [one.replace("layers.0.", f"layers.{layer}.", 1) for one in variants for layer in range(32)]
        if ".encoder.layers.0." in name and name.startswith("vision_model."):
            variants = [name.replace("layers.0.", f"layers.{layer}.", 1) for layer in range(27)]
        names.update(dict.fromkeys(variants, tuple(shape)))
    return names


def test_the_real_backbone_builds_on_meta_key_for_key():
    started = time.monotonic()
    config = BackboneConfig.from_dict(json.loads((REAL / "hunyuanimage3-instruct.config.json").read_text()))
    backbone = build_backbone(config, torch.bfloat16)
    assert time.monotonic() - started < 30
    assert all(parameter.is_meta for parameter in backbone.parameters())
    found = {name: tuple(place.shape) for name, place in slots(backbone).items()}
    assert found == expected_real_names()
    assert len(found) == 5150
    assert round(sum(parameter.numel() for parameter in backbone.parameters()) / 1e9, 2) == 82.99
    assert backbone.model.layers[0].mlp.gate.wg.weight.dtype == torch.float32
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.bfloat16, torch.float32}


def test_the_unused_head_is_exactly_the_eleven_listed_tensors():
    listed = json.loads((REAL / "real_keys.json").read_text())["present_but_unused"]
    assert set(listed) == UNUSED_VISION_HEAD and len(UNUSED_VISION_HEAD) == 11


def test_a_backbone_with_the_unused_head_loads(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: torch.zeros(3) for name in UNUSED_VISION_HEAD}
    save_file(tensors, folder / "model.safetensors")
    load_model(folder)


@pytest.mark.parametrize("missing", ("config.json", "generation_config.json", "tokenizer.json", "system_prompt.py"))
def test_a_missing_file_is_named(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(CheckpointError, match=missing.replace(".", r"\.")):
        load_model(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="safetensors"):
        load_model(folder)


def test_nan_weights_are_refused_by_name(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][3, 2] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.self_attn\.o_proj\.weight"):
        load_model(folder)


def test_swapped_shapes_and_missing_tensors_are_listed_together(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.contiguous()
    del tensors["model.layers.0.mlp.experts.2.down_proj.weight"]
    tensors["model.layers.9.extra"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "expected [512, 32], found [32, 512]" in message
    assert "model.layers.0.mlp.experts.2.down_proj.weight" in message and "model.layers.9.extra" in message


def test_a_cut_off_file_is_refused_before_reading(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError):
        load_model(folder)


def test_a_tokenizer_of_another_backbone_is_refused(folder):
    raw = json.loads((folder / "config.json").read_text())
    raw["image_token_id"] += 1
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_model(folder)


def test_a_hostile_system_prompt_is_not_executed(folder, tmp_path):
    trap = tmp_path / "trap"
    text = (folder / "system_prompt.py").read_text()
    (folder / "system_prompt.py").write_text(f"import pathlib\npathlib.Path({str(trap)!r}).write_text('x')\n{text}")
    load_model(folder)
    assert not trap.exists()


@pytest.mark.parametrize("key, value, message", (
    ("cond_token_attn_type", "sideways", "sideways"), ("num_key_value_heads", 3, "3 key/value"),
    ("moe_topk", [2], "1 entries for 2 layers"), ("img_proj_type", "linear", "unet"), ("hidden_size", None, "hidden_size")))
def test_a_configuration_that_is_not_understood(folder, key, value, message):
    raw = json.loads((folder / "config.json").read_text())
    raw[key] = value
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_the_default_dtype_survives_a_failed_build(folder):
    raw = json.loads((folder / "config.json").read_text())
    raw["vae"]["block_out_channels"] = [33] * 5
    with pytest.raises(CheckpointError):
        build_backbone(BackboneConfig.from_dict(raw), torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32


def test_float16_on_the_cpu_is_refused_because_it_takes_minutes(folder):
    with pytest.raises(RequestError, match="float32, or bfloat16"):
        load_model(folder, dtype=torch.float16)
