"""A backbone and a generator of a few thousand weights in the published folder layout, written on the spot.

Sizes are chosen so that every part exists (grouped heads, two experts a token, two shared experts, three-layer aligner) and a
whole edit takes a fraction of a second. Tokenizer and system prompts are the committed golden case's.
"""

import json
from pathlib import Path

import torch
from comfyui_hywu.hywu_core.checkpoint import slots
from comfyui_hywu.hywu_core.config import BackboneConfig, GeneratorConfig
from comfyui_hywu.hywu_core.generator.model import ParameterGenerator
from comfyui_hywu.hywu_core.handle import build_backbone
from safetensors.torch import save_file

from .golden.nano import nano_case

BASE_SIZE = 64


def write_backbone(folder: Path, seed: int = 0, **changes) -> Path:
    """A backbone folder; ``changes`` replace keys of config.json."""
    nano = nano_case() / "base"
    folder.mkdir(parents=True)
    raw = json.loads((nano / "config.json").read_text())
    raw.update(
        image_base_size=BASE_SIZE, num_hidden_layers=2, moe_topk=2, num_shared_expert=2, moe_intermediate_size=16,
        num_attention_heads=4, num_key_value_heads=2, attention_head_dim=8)
    raw["vae"] |= {"layers_per_block": 1}
    raw["vit_aligner"] |= {"depth": 3}
    raw.update(changes)
    (folder / "config.json").write_text(json.dumps(raw))
    for name in ("generation_config.json", "system_prompt.py"):
        (folder / name).write_bytes((nano / name).read_bytes())
    tokenizer = (nano / "tokenizer.json").read_text().replace("<img_size_256>", f"<img_size_{BASE_SIZE}>")
    (folder / "tokenizer.json").write_text(tokenizer)
    backbone = build_backbone(BackboneConfig.from_dict(raw), torch.float32)
    save_file(_random(slots(backbone), seed), folder / "model.safetensors")
    return folder


def write_generator(folder: Path, backbone: Path, seed: int = 0, **changes) -> Path:
    """A generator folder that fits a backbone folder of ``write_backbone``."""
    base = BackboneConfig.from_folder(backbone)
    width, inner = base.hidden_size, base.moe_intermediate_size[0]
    shared = inner * base.num_shared_expert[0]
    qkv = (base.num_attention_heads + 2 * base.num_key_value_heads) * base.attention_head_dim
    raw = json.loads((nano_case() / "pg" / "config.json").read_text())
    raw["num_base_model_layers"] = base.num_hidden_layers
    raw["pg_mapping"] = {
        "self_attn.qkv_proj": {"lora_A_dim": width, "lora_B_dim": qkv},
        "self_attn.o_proj": {"lora_A_dim": base.num_attention_heads * base.attention_head_dim, "lora_B_dim": width},
        "mlp.shared_mlp.gate_and_up_proj": {"lora_A_dim": width, "lora_B_dim": 2 * shared},
        "mlp.shared_mlp.down_proj": {"lora_A_dim": shared, "lora_B_dim": width},
        "mlp.experts": {"type": "grouped", "num_experts": base.num_experts, "sub_weights": {
            "w1": {"lora_A_dim": width, "lora_B_dim": inner},
            "w2": {"lora_A_dim": inner, "lora_B_dim": width},
            "w3": {"lora_A_dim": width, "lora_B_dim": inner}}},
    }
    raw.update(changes)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    with torch.device("meta"):
        generator = ParameterGenerator(GeneratorConfig.from_dict(raw))
    save_file(_random(slots(generator), seed), folder / "model.safetensors")
    return folder


def _random(places: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Noise of a size that keeps activations near 1: 1/sqrt(fan in) for matrices, norms around 1, small biases."""
    noise = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, place in places.items():
        value = torch.randn(place.shape, generator=noise)
        if place.ndim > 1:
            value /= place[0].numel() ** 0.5
        elif name.endswith("bias"):
            value *= 0.05
        else:
            value = 1 + 0.1 * value
        tensors[name] = value
    return tensors
