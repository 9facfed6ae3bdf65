"""A generator small enough to check by other means: 3 backbone layers, 2 blocks, tokens with unused tails."""

import pytest
import torch
from comfyui_hywu.hywu_core.config import GeneratorConfig
from comfyui_hywu.hywu_core.generator.model import ParameterGenerator

RAW = {
    "input_dim": 10, "d_model": 24, "head_dim": 8, "num_pg_layers": 2, "num_base_model_layers": 3, "token_dim": 5,
    "dim_accumulation": 2, "rank": 4, "alpha": 6, "prefix": "model.layers.", "torch_dtype": "float32",
    "pg_mapping": {
        "self_attn.qkv_proj": {"lora_A_dim": 7, "lora_B_dim": 11},
        "mlp.experts": {"type": "grouped", "num_experts": 3, "sub_weights": {
            "w2": {"lora_A_dim": 3, "lora_B_dim": 7}, "w1": {"lora_A_dim": 7, "lora_B_dim": 3}}}},
}


@pytest.fixture
def raw_config() -> dict:
    return {**RAW}


@pytest.fixture
def config() -> GeneratorConfig:
    return GeneratorConfig.from_dict(RAW)


@pytest.fixture
def model(config) -> ParameterGenerator:
    """Random weights, every norm weight off 1 and no bias 0, so that each of them shows in the output."""
    torch.manual_seed(1)
    model = ParameterGenerator(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model
