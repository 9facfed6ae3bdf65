"""Configurations from disk whose values are of the wrong kind: each is refused with the key and what was found there."""

import json

import pytest
from comfyui_hywu.hywu_core.config import BackboneConfig, GenerationConfig, GeneratorConfig
from comfyui_hywu.hywu_core.errors import CheckpointError


@pytest.mark.parametrize(("key", "value"), [
    ("vocab_size", "12"), ("hidden_size", -1), ("num_hidden_layers", 1.5), ("num_attention_heads", [1]), ("num_experts", {}),
    ("moe_topk", [1, "2"]), ("num_shared_expert", -1), ("moe_layer_num_skipped", [0]), ("vae", 3), ("vit", "12"),
    ("vit_processor", [1]), ("attention_head_dim", True), ("image_extra_sizes", 5),
    ("image_extra_sizes", [[100, 64]]), ("image_extra_sizes", [[64]])])
def test_a_backbone_value_of_the_wrong_kind(tiny_folders, key, value):
    raw = json.loads((tiny_folders[0] / "config.json").read_text())
    assert BackboneConfig.from_dict(raw).vocab_size == raw["vocab_size"]
    with pytest.raises(CheckpointError, match=key):
        BackboneConfig.from_dict(raw | {key: value})


@pytest.mark.parametrize(("key", "value"), [("rank", "16"), ("d_model", -4), ("token_dim", [16]), ("pg_mapping", 5)])
def test_a_generator_value_of_the_wrong_kind(tiny_folders, key, value):
    raw = json.loads((tiny_folders[1] / "config.json").read_text())
    assert GeneratorConfig.from_dict(raw).rank == raw["rank"]
    with pytest.raises(CheckpointError, match=key):
        GeneratorConfig.from_dict(raw | {key: value})


@pytest.mark.parametrize(("part", "key", "value"), [
    ("vae", "block_out_channels", 32), ("vae", "block_out_channels", [32, "64"]), ("vae", "latent_channels", "4"),
    ("vae", "layers_per_block", None), ("vae", "ffactor_spatial", [16]), ("vit", "hidden_size", "48"),
    ("vit", "num_patches", -1),
    ("vit", "num_attention_heads", None)])
def test_a_value_of_the_towers_of_the_wrong_kind(tiny_folders, part, key, value):
    raw = json.loads((tiny_folders[0] / "config.json").read_text())
    with pytest.raises(CheckpointError, match=key):
        BackboneConfig.from_dict(raw | {part: raw[part] | {key: value}})


def test_more_experts_a_token_than_there_are(tiny_folders):
    raw = json.loads((tiny_folders[0] / "config.json").read_text())
    with pytest.raises(CheckpointError, match="9 of 4 experts"):
        BackboneConfig.from_dict(raw | {"moe_topk": [2, 9]})


@pytest.mark.parametrize(("key", "value"), [
    ("drop_think", "?"), ("max_length", "2600"), ("top_p", "0.95"), ("temperature", True), ("diff_infer_steps", 4.5)])
def test_a_generation_value_of_the_wrong_kind(tiny_folders, tmp_path, key, value):
    config = BackboneConfig.from_folder(tiny_folders[0])
    raw = json.loads((tiny_folders[0] / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps(raw | {key: value, "flow_shift": 3}))
    with pytest.raises(CheckpointError, match=key):
        GenerationConfig.from_folder(tmp_path, config)


@pytest.mark.parametrize("entry", [
    3, {}, {"lora_A_dim": 32}, {"lora_A_dim": 32, "lora_B_dim": "32"}, {"type": "grouped", "num_experts": 4},
    {"type": "grouped", "num_experts": 4, "sub_weights": {"w1": 5}},
    {"type": "grouped", "sub_weights": {"w1": {"lora_A_dim": 32, "lora_B_dim": 32}}}], ids=str)
def test_a_target_that_is_not_described(tiny_folders, entry):
    raw = json.loads((tiny_folders[1] / "config.json").read_text())
    with pytest.raises(CheckpointError, match="mlp.experts"):
        GeneratorConfig.from_dict(raw | {"pg_mapping": raw["pg_mapping"] | {"mlp.experts": entry}})
