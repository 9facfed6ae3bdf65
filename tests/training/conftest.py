"""One small run that all training tests share: crops of the two test photos, the VAE, the born backbone, a generator's start.

None of it may be changed; a test that trains something makes a deep copy.
"""

import shutil
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_hywu.hywu_core.generator.handle import load_generator
from comfyui_hywu.hywu_core.handle import load_model
from comfyui_hywu.hywu_core.training import base_stage, linear_vae, run
from comfyui_hywu.hywu_core.training.batches import Batches
from comfyui_hywu.hywu_core.training.export import export_backbone, export_generator
from comfyui_hywu.hywu_core.training.generator_stage import new_generator
from comfyui_hywu.hywu_core.training.recipe import DataSettings, Recipe
from PIL import Image

DATA = Path(__file__).resolve().parent.parent / "data"


@pytest.fixture(scope="session")
def test_photos() -> list[Path]:
    return [DATA / "photo.jpg", DATA / "coffee.jpg"]


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory, test_photos) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for path in test_photos:
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="session")
def small_run(tmp_path_factory, photo_folder) -> run.Run:
    """The default sizes, which the structured start relies on, on two tiny grids."""
    data = DataSettings(grids={"6x6": 0.5, "5x7": 0.5}, crops_per_photo=30, validation=0.1)
    return run.prepare(Recipe(data=data), photo_folder, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def copying(small_run):
    """The backbone at its start, frozen."""
    return base_stage.born(small_run.train.config, small_run.vae, small_run.train).requires_grad_(False)


@pytest.fixture(scope="session")
def start(small_run, copying):
    """(generator, its configuration) at the start."""
    return new_generator(small_run.recipe, copying, small_run.train)


@pytest.fixture(scope="session")
def exported(tmp_path_factory, small_run, copying, start) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export_backbone(copying, folder / "backbone", small_run.recipe)
    export_generator(start[0], folder / "generator", small_run.recipe)
    return folder


@pytest.fixture(scope="session")
def handle(exported):
    """The born backbone as inference loads it: most weights rounded to half precision."""
    return load_model(exported / "backbone", dtype=torch.float32)


@pytest.fixture(scope="session")
def generator_handle(exported):
    return load_generator(exported / "generator", dtype=torch.float32)


@pytest.fixture(scope="session")
def square_batches(small_run, handle, test_photos) -> Batches:
    """Batches of 192 x 192 pictures, which is a bucket: inference does not resize them. Latents by the exported VAE."""
    crops = [np.asarray(Image.open(path).convert("RGB").resize((192, 192))) for path in test_photos]
    kernel, offset = linear_vae.as_convolution(handle.backbone.vae)
    known = small_run.train
    return Batches(known.recipe, {(12, 12): np.stack(crops)}, known.tokenizer, known.config, known.generation, kernel, offset)


@pytest.fixture(scope="session")
def one_edit(small_run) -> Batches:
    """Held-out batches of one edit: a sample sheet of all edits takes seconds."""
    batches = copy(small_run.held_out)
    batches.recipe = replace(batches.recipe, edits=("invert",))
    return batches
