"""The published generator on meta: every name and shape, the number of parameters, the size of what it writes."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from comfyui_hywu.hywu_core.checkpoint import slots
from comfyui_hywu.hywu_core.config import GeneratorConfig
from comfyui_hywu.hywu_core.generator.model import ParameterGenerator
from comfyui_hywu.hywu_core.generator.tokens import TokenLayout

DATA = Path(__file__).resolve().parents[1] / "data" / "real-config"
CONFIG = GeneratorConfig.from_dict(json.loads((DATA / "hy-wu.config.json").read_text()))


def test_names_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        model = ParameterGenerator(CONFIG).to(torch.bfloat16)
    published = json.loads((DATA / "real_keys.json").read_text())["pg"]
    assert len(published) == 779
    assert {name: list(tensor.shape) for name, tensor in slots(model).items()} == published
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_096_647_168  # 8.0966e9, spec section 1


def test_a_block_of_the_published_sizes_holds_four_layers_at_a_time():
    with torch.device("meta"), torch.no_grad():
        model = ParameterGenerator(replace(CONFIG, num_pg_layers=1)).to(torch.bfloat16)
        wide: list[torch.Size] = []
        model.model.blocks[0].feed_forward.fc1.register_forward_hook(lambda module, inputs, output: wide.append(output.shape))
        tokens = model(torch.empty(1, 7000, 4096, dtype=torch.bfloat16))
    assert tokens.shape == (1, 32, 1379, 16, 1024)
    assert wide == [(1, 4, 5516, 16384)] * 8  # 0.7 GB of bf16 each, where all at once would be 5.8 GB


def test_tokens_of_the_published_sizes():
    layout = TokenLayout.from_config(CONFIG)
    counts = [span.stop - span.start for span in layout.spans]
    assert counts == [4, 4, 4, 3, 256, 192, 256] + [6, 4, 6, 4, 192, 256, 192]  # spec section 4
    assert (layout.num_a_tokens, layout.num_tokens) == (719, 1379)
    assert layout.num_values * CONFIG.num_base_model_layers == 722_993_152
    assert CONFIG.scale == 4.0
