"""What is there before any gradient: a VAE by linear algebra, and a backbone that copies its first source picture."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from comfyui_hywu.hywu_core.training import copier, linear_vae
from comfyui_hywu.hywu_core.training.base_stage import train_base, word_batch
from comfyui_hywu.hywu_core.training.batches import Draws
from comfyui_hywu.hywu_core.training.forward import embed_pictures, predict_clean
from comfyui_hywu.hywu_core.training.places import copy_errors
from comfyui_hywu.hywu_core.training.recipe import StageSettings
from PIL import Image


def pixels_of(path, size=(128, 128)) -> torch.Tensor:
    picture = np.array(Image.open(path).convert("RGB").resize(size))
    return torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1


@torch.no_grad()
def fidelity(vae, pixels: torch.Tensor) -> float:
    """PSNR in dB of pictures in -1..1 through the VAE."""
    back = vae.decode(vae.encode(pixels).mean).clamp(-1, 1)
    return float(-10 * ((back - pixels) / 2).square().mean().log10())


def test_the_vae_keeps_photos(small_run, test_photos):
    """Built from 60 crops of these very photos, shrunk to 128 pixels a side; measured are 29.2 and 25.7 dB."""
    cat, coffee = (fidelity(small_run.vae, pixels_of(path)) for path in test_photos)
    assert cat > 28 and coffee > 24.5


def test_the_vae_keeps_a_photo_it_never_saw(test_photos):
    """From the coffee to the cat; measured are 26.6 dB."""
    crops = pixels_of(test_photos[1], (576, 384))
    parts = crops.unfold(2, 96, 48).unfold(3, 96, 48).permute(0, 2, 3, 4, 5, 1).reshape(-1, 96, 96, 3)
    vae = linear_vae.build([((parts + 1) * 127.5).round().numpy().astype(np.uint8)], seed=0)
    assert fidelity(vae, pixels_of(test_photos[0])) > 25.5


@torch.no_grad()
def test_the_encoder_is_one_convolution(small_run, test_photos):
    vae, (kernel, offset) = small_run.vae, linear_vae.as_convolution(small_run.vae)
    pixels = pixels_of(test_photos[1], (112, 80))
    latent = vae.encode(pixels).mean
    torch.testing.assert_close(
        latent, torch.nn.functional.conv2d(pixels, kernel, offset, stride=16), rtol=0, atol=1e-4)
    assert 0.5 * linear_vae.LATENT_STD < latent.std() < 2 * linear_vae.LATENT_STD
    assert vae.encode(pixels).logvar.max() < -20  # certain of its latents


@torch.no_grad()
def test_brightness_and_colour_have_latents_of_their_own(small_run):
    """A gray picture moves the latents of brightness only: the others are those of black."""
    gray = torch.rand(1, 1, 48, 48, generator=torch.Generator().manual_seed(0)).expand(-1, 3, -1, -1) * 2 - 1
    moved = (small_run.vae.encode(gray).mean - small_run.vae.encode(-torch.ones_like(gray)).mean).abs().amax((0, 2, 3))
    assert 8 < int((moved < 1e-3).sum()) < 56 and int((moved > 0.1).sum()) + int((moved < 1e-3).sum()) == 64


@pytest.mark.parametrize("pictures", (1, 2))
def test_the_born_backbone_copies_its_first_source(copying, small_run, pictures):
    errors = copy_errors(copying, small_run.train, pictures)
    assert set(errors) == {(6, 6), (5, 7)}
    assert max(errors.values()) < 0.05


@torch.no_grad()
def test_it_copies_whatever_text_lies_between_and_however_noisy(copying, small_run):
    lengths, worst = set(), 0.0
    for step in range(24):
        draws = Draws.of(9, "copies", step)
        batch = small_run.held_out.draw(2, draws, thinks=bool(step % 2))
        lengths.add(batch.sequence.gen.start - batch.sequence.images[0].start)
        noise = torch.randn(batch.wanted_bchw.shape, generator=draws.torch)
        # On the way to the copy itself: far from its own noisy picture the final layer leaves its linear range.
        batch = replace(batch, wanted_bchw=batch.sources[0].latent_bchw)
        clean = predict_clean(copying, batch, embed_pictures(copying, batch), noise, torch.tensor([0.2, 1.0]))
        source = batch.sources[0].latent_bchw
        errors = (clean - source).square().mean((1, 2, 3)) / source.square().mean((1, 2, 3))
        worst = max(worst, float(errors.max()))
    assert len(lengths) > 9 and worst < 0.08


def test_language_leaves_alone_what_pictures_need(copying, small_run, tmp_path):
    """Five steps of words at three times the recipe's rate: protected values keep every bit, and the copy stays."""
    model = deepcopy(copying)
    before = {name: value.clone() for name, value in model.named_parameters()}
    recipe = replace(small_run.recipe, base_stage=StageSettings(steps=5, batch=6, rate=6e-3, warmup=1))
    train_base(model, small_run.train, recipe, tmp_path, torch.autocast("cpu", enabled=False))
    masks, changed = copier.protect(model), set()
    for name, value in model.named_parameters():
        same = value == before[name]
        assert same[masks[value] == 0].all(), name
        if not same.all():
            changed.add(name.split(".")[0])
    assert {"model", "lm_head", "vision_model", "vision_aligner"} <= changed
    assert not {"vae", "patch_embed", "final_layer", "time_embed", "time_embed_2"} & changed
    assert max(copy_errors(model, small_run.train, 1).values()) < 0.05


def test_words_are_practised_on_small_pictures_mostly(small_run):
    rows = [word_batch(small_run.train, 9, Draws.of(0, "words", step)).rows for step in range(40)]
    assert set(rows) == {9, 3} and rows.count(9) > 25
