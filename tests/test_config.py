"""Configurations from disk whose values are of the wrong kind: each is refused with the key and what was found there."""

import json

import pytest
from comfyui_hywu.hywu_core.config import BackboneConfig, GeneratorConfig
from comfyui_hywu.hywu_core.errors import CheckpointError


@pytest.mark.parametrize(("key", "value"), [
    ("vocab_size", "12"), ("hidden_size", -1), ("num_hidden_layers", 1.5), ("num_attention_heads", [1]), ("num_experts", {}),
    ("moe_topk", [1, "2"]), ("num_shared_expert", -1), ("moe_layer_num_skipped", [0]), ("vae", 3), ("vit", "12"),
    ("vit_processor", [1]), ("attention_head_dim", True)])
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
