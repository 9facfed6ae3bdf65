"""The random checkpoint of these tests: small pictures, thin layers, but many of them.

Small pictures keep the tests quick; many layers and blocks let a cancel arrive in the middle of any stage.
"""

import json
import shutil
from pathlib import Path

import torch
from comfyui_hywu.hywu_core.checkpoint.slots import slots
from comfyui_hywu.hywu_core.config import BackboneConfig, GeneratorConfig
from comfyui_hywu.hywu_core.generator.model import ParameterGenerator
from comfyui_hywu.hywu_core.handle import build_backbone
from safetensors.torch import save_file

LAYERS = 24
BASE_SIZE = 128
BLOCKS = 24


def write_deep_checkpoint(nano: Path, folder: Path) -> None:
    """A backbone (folder/base) and a generator (folder/pg) like nano's, but deep; random weights that keep activations tame."""
    base, pg = folder / "base", folder / "pg"
    shutil.copytree(nano / "base", base, ignore=shutil.ignore_patterns("*.safetensors", "keys.json"))
    pg.mkdir(parents=True)
    raw = json.loads((nano / "base" / "config.json").read_text(encoding="utf-8"))
    nano_size = raw["image_base_size"]
    raw |= {"num_hidden_layers": LAYERS, "image_base_size": BASE_SIZE}
    tokenizer = base / "tokenizer.json"
    named = tokenizer.read_text(encoding="utf-8").replace(f"<img_size_{nano_size}>", f"<img_size_{BASE_SIZE}>")
    tokenizer.write_text(named, encoding="utf-8")
    for key in ("moe_topk", "moe_intermediate_size", "num_shared_expert"):
        if isinstance(raw.get(key), list):
            raw[key] = raw[key][:1] * LAYERS
    raw_pg = json.loads((nano / "pg" / "config.json").read_text(encoding="utf-8"))
    raw_pg |= {"num_base_model_layers": LAYERS, "num_pg_layers": BLOCKS}
    backbone = build_backbone(BackboneConfig.from_dict(raw), torch.float32)
    with torch.device("meta"):
        generator = ParameterGenerator(GeneratorConfig.from_dict(raw_pg))
    for part, config, module in ((base, raw, backbone), (pg, raw_pg, generator)):
        (part / "config.json").write_text(json.dumps(config), encoding="utf-8")
        random = torch.Generator().manual_seed(1)
        tensors = {name: torch.ones(slot.shape) if "norm" in name and name.endswith("weight")
                   else 0.1 * torch.randn(slot.shape, generator=random) for name, slot in slots(module).items()}
        save_file(tensors, part / "model.safetensors")
