"""What is there before any gradient: a VAE by linear algebra, and a backbone that copies its first source picture."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from comfyui_hywu.hywu_core.backbone import inputs
from comfyui_hywu.hywu_core.training import channels as at
from comfyui_hywu.hywu_core.training import copier, linear_vae
from comfyui_hywu.hywu_core.training.base_stage import train_base, word_batch
from comfyui_hywu.hywu_core.training.batches import Draws
from comfyui_hywu.hywu_core.training.forward import embed_noisy, embed_pictures, predict_clean, prefix_hidden
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


@torch.no_grad()
def sizes_told(model, batches, pictures: int) -> list[int]:
    """For each of the sizes that a source can have (a row of a batch each): the size that the answer repeats."""
    tokenizer = batches.tokenizer
    ratio_ids = torch.tensor(tokenizer.ratio_ids)
    batch = batches.draw(1, Draws.of(3, "sizes", 0), pictures=pictures)
    ids_BL = batch.sequence.ids_BL.expand(len(ratio_ids), -1).clone()
    first, *_, last = torch.isin(ids_BL[0], ratio_ids).nonzero().flatten().tolist()
    ids_BL[:, first] = ratio_ids
    rows = replace(batch, sequence=replace(batch.sequence, ids_BL=ids_BL))
    hidden_BSD = prefix_hidden(model, rows, embed_pictures(model, batch))
    assert ids_BL[0, last - 1] == tokenizer.id(tokenizer.img_size) and last == hidden_BSD.shape[1]
    return model.logits(hidden_BSD[:, last - 1])[:, ratio_ids].argmax(1).tolist()


@pytest.mark.parametrize("pictures", (1, 2))
def test_the_answer_repeats_every_size_of_the_first_source(copying, small_run, pictures):
    """By construction, not by practice: grids that no crop has are among them."""
    assert sizes_told(copying, small_run.train, pictures) == list(range(37))


def test_size_codes_differ_in_four_places_at_least():
    code = copier._far_apart(37, at.RATIO_CODE.stop - at.RATIO_CODE.start)
    assert code.shape == (37, 11) and set(code.unique().tolist()) == {-1.0, 1.0}
    differing = (code[:, None] != code).sum(2) + 99 * torch.eye(37)
    assert differing.min() >= 4


@torch.no_grad()
def test_firm_queries_and_keys_change_nothing_but_how_far_a_lora_turns_them(copying, small_run):
    model, batch = deepcopy(copying), small_run.train.draw(2, Draws.of(4, "firm", 0))
    before = prefix_hidden(model, batch, embed_pictures(model, batch))
    copier.make_firm(model)  # once more
    after = prefix_hidden(model, batch, embed_pictures(model, batch))
    assert (after - before).abs().max() < 1e-3 * before.abs().max()
    for layer, old in zip(model.model.layers[:3], copying.model.layers[:3], strict=True):
        (rows, _), (weak, _) = at.heads(layer.self_attn), at.heads(old.self_attn)
        torch.testing.assert_close(rows[:2, [0, -2]], at.FIRM * weak[:2, [0, -2]])


@torch.no_grad()
def test_every_token_is_told_what_both_pictures_are_like_but_painted_cells_are_not(copying, small_run):
    """The means of the squares and colours, as computed here from the latents: correlation over 12 rows above 0.99."""
    batch = small_run.train.draw(12, Draws.of(2, "alike", 0), grid=(6, 6), pictures=2)
    sequence, pictures = batch.sequence, embed_pictures(copying, batch)
    noise_bchw = torch.randn(batch.wanted_bchw.shape, generator=torch.Generator().manual_seed(0))
    hidden_BLD = embed_noisy(copying, batch, pictures, noise_bchw[:1].expand_as(noise_bchw), torch.ones(batch.rows))
    hidden_BLD = copying.run(hidden_BLD, inputs.rope_table(copying, sequence), inputs.mask(copying, sequence))
    told_BF = hidden_BLD[:, batch.prefix - 1, at.FAR]
    painted_BNF = hidden_BLD[:, sequence.gen.start : sequence.gen.stop, at.FAR]
    for number, source in enumerate(batch.sources):
        x_bqchw = (source.latent_bchw / at.LATENT_UNIT).unflatten(1, (4, 16))
        true = [x_bqchw[:, :, list(channels)].square().mean((1, 2, 3, 4)) for channels, _ in at.SQUARES]
        true += [x_bqchw[:, :, channel].mean((1, 2, 3)) for channel in range(len(at.MEANS))]
        for place, wanted_B in enumerate(true):
            told_B = told_BF[:, number * at.LIKE + place]
            assert torch.corrcoef(torch.stack((wanted_B, told_B)))[0, 1] > 0.99, (number, place)
    assert painted_BNF.std(0).max() < 0.1 * told_BF.std(0).mean()


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
    assert sizes_told(model, small_run.train, 1) == list(range(37))


def test_words_are_practised_on_small_pictures_mostly(small_run):
    rows = [word_batch(small_run.train, 9, Draws.of(0, "words", step)).rows for step in range(40)]
    assert set(rows) == {9, 3} and rows.count(9) > 25
