"""From trained modules to folders in the published layout, which the ordinary loader takes.

Owns which weights are stored in half precision and the small text files beside them.
"""

import json
from pathlib import Path

import torch
from torch import nn

from ..backbone.model import Backbone
from ..checkpoint import slots
from ..generator.model import ParameterGenerator
from . import language
from .files import write_tensors
from .recipe import Recipe, backbone_config, generation_config, generator_config

SYSTEM_PROMPT_FILE = f'''"""The system prompts of the small checkpoint: one short line, which it was trained with."""

unified_system_prompt_en = "{language.SYSTEM_PROMPT}"
t2i_system_prompts = {{
    "en_vanilla": ["{language.SYSTEM_PROMPT}"],
    "en_recaption": ["{language.SYSTEM_PROMPT}"],
    "en_think_recaption": ["{language.SYSTEM_PROMPT}"],
}}
'''
# Solved by least squares with cancelling terms, or tiny: half precision would cost more than it saves.
EXACT = ("time_embed.", "time_embed_2.", "emb_layers.", ".gate.wg.", "norm", "ln_f", "bias", "vae.encoder.down")


def write_texts(folder: Path, recipe: Recipe) -> dict[str, int]:
    """Tokenizer, both configuration files and the system prompt of a backbone folder; returns the special tokens' ids."""
    folder.mkdir(parents=True, exist_ok=True)
    special = language.write_tokenizer(folder, recipe.sizes.base_size)
    _json(backbone_config(recipe.sizes, max(special.values()) + 1, special), folder / "config.json")
    _json(generation_config(special), folder / "generation_config.json")
    (folder / "system_prompt.py").write_text(SYSTEM_PROMPT_FILE)
    return special


def export_backbone(model: Backbone, folder: Path, recipe: Recipe) -> None:
    """Write the backbone folder."""
    write_texts(folder, recipe)
    _save(model, folder)


def export_generator(generator: ParameterGenerator, folder: Path, recipe: Recipe) -> None:
    """Write the generator folder."""
    folder.mkdir(parents=True, exist_ok=True)
    _json(generator_config(recipe.sizes, recipe.generator), folder / "config.json")
    _save(generator, folder)


def _save(module: nn.Module, folder: Path) -> None:
    write_tensors({
        name: value.detach().to("cpu", torch.float32 if any(part in name for part in EXACT) else torch.float16)
        for name, value in sorted(slots(module).items())}, folder / "model.safetensors", {"format": "pt"})


def _json(value: dict, path: Path) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
