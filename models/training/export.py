"""Trained modules to folders in the published layout.

Owns the published tensor names, which weights are stored in half precision, and the small text files beside them.
"""

import json
from pathlib import Path

import config
import torch
import words
from comfyui_hywu.hywu_core.vision.vae import VAE
from network import Backbone
from safetensors.torch import save_file
from torch import nn

SYSTEM_PROMPT = f'''"""The system prompts of the small checkpoint: one short line, which it was trained with."""

unified_system_prompt_en = "{words.SYSTEM}"
t2i_system_prompts = {{
    "en_vanilla": ["{words.SYSTEM}"],
    "en_recaption": ["{words.SYSTEM}"],
    "en_think_recaption": ["{words.SYSTEM}"],
}}
'''

# Solved by least squares with cancelling terms, or tiny: half precision would cost more than it saves.
EXACT = ("time_embed.", "time_embed_2.", "emb_layers.", ".gate.wg.", "norm", "ln_f", "bias", "vae.encoder.down")

_LAYER = {
    "qkv_proj": "self_attn.qkv_proj.weight",
    "o_proj": "self_attn.o_proj.weight",
    "wg": "mlp.gate.wg.weight",
    "query_layernorm.weight": "self_attn.query_layernorm.weight",
    "key_layernorm.weight": "self_attn.key_layernorm.weight",
    "shared_in": "mlp.shared_mlp.gate_and_up_proj.weight",
    "shared_out": "mlp.shared_mlp.down_proj.weight",
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
}


def published(model: Backbone, vae: VAE) -> dict[str, torch.Tensor]:
    """All tensors of a backbone folder by their published names."""
    tensors = {}
    for name, value in model.state_dict().items():
        if name.startswith("layers."):
            _, index, rest = name.split(".", 2)
            place = f"model.layers.{index}."
            if rest in _LAYER:
                tensors[place + _LAYER[rest]] = value
            else:
                part = {"experts_in": "gate_and_up_proj", "experts_out": "down_proj"}[rest]
                for expert, one in enumerate(value):
                    tensors[f"{place}mlp.experts.{expert}.{part}.weight"] = one
        elif name.startswith(("wte.", "ln_f.")):
            tensors["model." + name] = value
        else:
            tensors[name] = value
    tensors |= {f"vae.{name}": value for name, value in vae.state_dict().items()}
    return tensors


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    stored = {
        name: value.detach().clone().contiguous().to(torch.float32 if any(part in name for part in EXACT) else torch.float16)
        for name, value in sorted(tensors.items())
    }
    save_file(stored, path, metadata={"format": "pt"})


def _json(value: dict, path: Path) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def export_backbone(model: Backbone, vae: VAE, special: dict[str, int], folder: Path) -> None:
    """Write the backbone folder."""
    folder.mkdir(parents=True, exist_ok=True)
    size = words.write_tokenizer(folder)
    _json(config.backbone(size, special), folder / "config.json")
    _json(config.generation(special), folder / "generation_config.json")
    (folder / "system_prompt.py").write_text(SYSTEM_PROMPT)
    _save(published(model, vae), folder / "model.safetensors")


def export_generator(generator: nn.Module, folder: Path) -> None:
    """Write the generator folder."""
    folder.mkdir(parents=True, exist_ok=True)
    _json(config.generator(), folder / "config.json")
    _save(generator.state_dict(), folder / "model.safetensors")
