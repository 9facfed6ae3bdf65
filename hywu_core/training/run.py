"""One training run from photos to a checkpoint in the published layout, stage by stage, in one folder that it can go on from.

Owns the order of the stages and the files between them. What is finished is not done again; a killed run goes on where its last
state was written. See ``loop.py`` for a stage's own files.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from ..backbone.model import Backbone
from ..checkpoint.load import usable_device
from ..config import BackboneConfig, GenerationConfig, VAEConfig
from ..errors import RequestError
from ..handle import ModelHandle
from ..progress import Tick, silent
from ..text.tokenizer import Tokenizer
from ..vision.vae import VAE
from . import linear_vae, photos
from .base_stage import born, train_base
from .batches import Batches
from .export import export_backbone, export_generator, write_texts
from .files import write_tensors
from .generator_stage import new_generator, train_generator
from .recipe import Recipe

VAE_CROPS = 150  # of every grid; the VAE's statistics need no more
Log = Callable[[str], None]


@dataclass
class Run:
    """A folder, a recipe, and what the stages share."""

    folder: Path
    recipe: Recipe
    crops: dict[tuple[int, int], np.ndarray]
    vae: VAE
    train: Batches
    held_out: Batches  # crops that no stage trains on


def train(
    recipe: Recipe, photo_folder: Path, folder: Path, *, device: torch.device | str = "cpu", autocast: bool = False,
    on_stage: Callable[[str], Tick] = lambda name: silent, on_log: Log = lambda line: None,
) -> Path:
    """Train everything and write ``folder/checkpoint/{backbone,generator}``; returns that folder.

    device: where the stages with gradients run. autocast: matrix products in bfloat16 there.

    Raises:
        RequestError: no usable photos, a run folder of another recipe, or a loss that is not finite.
    """
    device = usable_device(device)
    run = prepare(recipe, photo_folder, folder, on_stage("photos"), on_log)
    precision = torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast)
    model = base(run, device, precision, on_stage("base"), on_log)
    generator, config = new_generator(recipe, model, run.train)
    train_generator(model, generator.to(device), config, run.train, run.held_out, recipe, run.folder, precision,
                    on_stage("generator"), on_log)
    out = run.folder / "checkpoint"
    export_backbone(model, out / "backbone", recipe)
    export_generator(generator, out / "generator", recipe)
    on_log(f"written: {out / 'backbone'} and {out / 'generator'}")
    return out


def prepare(
    recipe: Recipe, photo_folder: Path, folder: Path, on_tick: Tick = silent, on_log: Log = lambda line: None,
    model: ModelHandle | None = None,
) -> Run:
    """Crops, texts and the VAE of a run, made or read back; with ``model`` its texts and VAE are taken instead."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _same_recipe(recipe, folder)
    crops = _crops(recipe, photo_folder, folder, on_tick, on_log)
    if model is None:
        write_texts(folder / "texts", recipe)
        config = BackboneConfig.from_folder(folder / "texts")
        generation = GenerationConfig.from_folder(folder / "texts", config)
        tokenizer, vae = Tokenizer.from_folder(folder / "texts", config), _vae(crops, recipe, folder)
    else:
        config, generation, tokenizer, vae = model.config, model.generation, model.tokenizer, model.backbone.vae
    kernel, offset = linear_vae.as_convolution(vae)
    parts = _split(crops, recipe.data.validation)
    return Run(folder, recipe, crops, vae, *(
        Batches(recipe, part, tokenizer, config, generation, kernel, offset) for part in parts))


def _vae(crops: dict[tuple[int, int], np.ndarray], recipe: Recipe, folder: Path) -> VAE:
    kept = folder / "vae.safetensors"
    if kept.is_file():
        vae = VAE(VAEConfig.from_dict(linear_vae.CONFIG))
        vae.load_state_dict(load_file(kept))
        return vae.eval().requires_grad_(False)
    vae = linear_vae.build([pixels[:VAE_CROPS] for pixels in crops.values()], recipe.seed)
    write_tensors(vae.state_dict(), kept)
    return vae


def base(run: Run, device: torch.device, precision: torch.autocast, on_tick: Tick = silent,
         on_log: Log = lambda line: None) -> Backbone:
    """The frozen backbone: its structured start, then its language."""
    model = born(run.train.config, run.vae, run.train).to(device)
    train_base(model, run.train, run.recipe, run.folder, precision, on_tick, on_log)
    return model.requires_grad_(False)


def _split(crops: dict[tuple[int, int], np.ndarray], share: float) -> tuple[dict, dict]:
    """Training and held-out crops; at least one of each grid is held out. The last crops are those of the last photos."""
    border = {grid: max(1, len(pixels) - max(1, round(share * len(pixels)))) for grid, pixels in crops.items()}
    return ({grid: pixels[: border[grid]] for grid, pixels in crops.items()},
            {grid: pixels[border[grid] :] if len(pixels) > border[grid] else pixels for grid, pixels in crops.items()})


def _crops(recipe: Recipe, photo_folder: Path, folder: Path, on_tick: Tick, on_log: Log) -> dict[tuple[int, int], np.ndarray]:
    kept = folder / "crops.npz"
    if not kept.is_file():
        made = photos.cut(photo_folder, recipe.grids(), recipe.data.crops_per_photo, recipe.seed, on_tick)
        on_log(made.summary())
        aside = folder / "crops.part.npz"
        np.savez(aside, **{f"{rows}x{cols}": pixels for (rows, cols), pixels in made.by_grid.items()})
        aside.replace(kept)
    with np.load(kept, allow_pickle=False) as file:
        return {tuple(int(side) for side in name.split("x")): file[name] for name in file.files}


def _same_recipe(recipe: Recipe, folder: Path) -> None:
    """A run goes on with the recipe that it began with. Raises RequestError."""
    kept, text = folder / "recipe.json", recipe.to_json()
    if not kept.is_file():
        kept.write_text(text + "\n")
    elif kept.read_text().strip() != text:
        old, new = (hashlib.sha256(each.encode()).hexdigest()[:8] for each in (kept.read_text().strip(), text))
        raise RequestError(f"{folder} was begun with another recipe ({old}, now {new}): choose another folder, or give "
                           f"{kept} as the recipe to go on")
