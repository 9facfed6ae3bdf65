"""The published checkpoint's sizes from its configuration alone, and machines to plan for."""

import json
from pathlib import Path

import pytest
import torch
from comfyui_hywu.hywu_core.config import BackboneConfig, GeneratorConfig

DATA = Path(__file__).resolve().parents[1] / "data" / "real-config"


@pytest.fixture(scope="session")
def real_config() -> BackboneConfig:
    return BackboneConfig.from_dict(json.loads((DATA / "hunyuanimage3-instruct.config.json").read_text()))


@pytest.fixture(scope="session")
def real_generator_config() -> GeneratorConfig:
    return GeneratorConfig.from_dict(json.loads((DATA / "hy-wu.config.json").read_text()))


@pytest.fixture(scope="session")
def sizes(real_config):
    from comfyui_hywu.hywu_core.placement.sizes import model_sizes

    return model_sizes(real_config, torch.bfloat16)


@pytest.fixture(scope="session")
def generator(real_generator_config):
    from comfyui_hywu.hywu_core.generator.sizes import generator_sizes

    return generator_sizes(real_generator_config, torch.bfloat16)
