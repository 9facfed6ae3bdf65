"""A byte-level tokenizer of about 300 tokens with the special tokens of the published one, and configurations that fit it."""

from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
from comfyui_hywu.hywu_core.config import BackboneConfig, GenerationConfig, VAEConfig
from comfyui_hywu.hywu_core.text.tokenizer import Tokenizer
from tokenizers import decoders, models, pre_tokenizers

SPECIALS = (
    "<|endoftext|>", "<|startoftext|>", "<boi>", "<eoi>", "<img>", "<pad>", "<cfg>", "<timestep>", "<timestep_r>", "<guidance>",
    "<joint_img_sep>", "<recaption>", "</recaption>", "<think>", "</think>", "<answer>", "</answer>", "<img_size_64>",
    *(f"<img_ratio_{index}>" for index in range(33)),
    "<pos_0>", "<pos_1>",  # as published, the ids of the last four ratios do not follow on those of the first 33
    *(f"<img_ratio_{index}>" for index in range(33, 37)))


def byte_level() -> tokenizers.Tokenizer:
    """One token a byte, except that two spaces or two line feeds merge: enough to see merges across section borders."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    space, feed = "Ġ", "Ċ"
    vocabulary = {token: number for number, token in enumerate([*alphabet, space * 2, feed * 2])}
    core = tokenizers.Tokenizer(models.BPE(vocabulary, [(space, space), (feed, feed)]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return core


@pytest.fixture
def config() -> BackboneConfig:
    core = byte_level()
    return BackboneConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        attention_head_dim=16, num_experts=2, moe_topk=(1,), moe_intermediate_size=(16,), num_shared_expert=(1,),
        intermediate_size=16, moe_layer_num_skipped=0, max_position_embeddings=2000, rms_norm_eps=1e-5, rope_theta=1e4,
        patch_embed_hidden_dim=32, image_base_size=64, cond_token_attn_type="joint_full",
        cfg_distilled=False, use_meanflow=False,
        vae=VAEConfig((32,), 4, 1, 16, 4), vit={}, vit_max_num_patches=9,
        special_ids={token: core.token_to_id(token) for token in ("<|startoftext|>", "<|endoftext|>", "<img>")})


@pytest.fixture
def generation() -> GenerationConfig:
    return GenerationConfig(sequence_template="instruct", max_length=2000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A backbone folder that holds nothing but tokenizer.json."""
    byte_level().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.fixture
def tokenizer(folder: Path, config: BackboneConfig) -> Tokenizer:
    return Tokenizer.from_folder(folder, config)


@pytest.fixture
def distilled(config: BackboneConfig) -> BackboneConfig:
    return replace(config, cfg_distilled=True, use_meanflow=True)
