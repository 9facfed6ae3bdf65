"""Batches: drawn from the draws alone, rows of one length, taught what follows, and pictures as inference sees them."""

import numpy as np
import pytest
import torch
from comfyui_hywu.hywu_core.training import language
from comfyui_hywu.hywu_core.training.batches import Draws
from comfyui_hywu.hywu_core.training.edits import EDITS, edited


def draws(step: int) -> Draws:
    return Draws.of(3, "test", step)


@pytest.fixture(scope="module")
def batches(small_run):
    return small_run.train


@pytest.fixture(scope="module")
def drawn(batches):
    """With and without thinking, one and two pictures, both grids."""
    return [batches.draw(4, draws(step)) for step in range(60)]


def tensors(batch):
    sources = [part for source in batch.sources for part in (source.latent_bchw, source.patches, source.patch_mask)]
    return [batch.sequence.ids_BL, batch.answers_BL, batch.wanted_bchw, *sources]


def test_the_same_draws_give_the_same_batch(batches, drawn):
    for step in (0, 7, 21):
        again = batches.draw(4, draws(step))
        assert all(torch.equal(one, two) for one, two in zip(tensors(drawn[step]), tensors(again), strict=True))
        assert (again.instructions, again.edits, again.thinking) == (
            drawn[step].instructions, drawn[step].edits, drawn[step].thinking)
        assert all(np.array_equal(one.pixels, two.pixels) and one.bucket == two.bucket
                   for one, two in zip(again.sources, drawn[step].sources, strict=True))


@pytest.mark.parametrize("other", (Draws.of(4, "test", 0), Draws.of(3, "other", 0), Draws.of(3, "test", 1)))
def test_seed_stage_and_step_each_change_what_is_drawn(other):
    one = draws(0)
    assert one.choose.random() != other.choose.random() and one.numpy.random() != other.numpy.random()
    assert not torch.equal(torch.randn(3, generator=one.torch), torch.randn(3, generator=other.torch))


def test_the_draws_cover_what_they_should(batches, drawn):
    assert {batch.sources[0].pixels.shape[1:3] for batch in drawn} == {(96, 96), (80, 112)}
    assert {len(batch.sources) for batch in drawn} == {1, 2} and {bool(batch.thinking[0]) for batch in drawn} == {True, False}
    assert {edit for step in range(60, 120) for edit in batches.draw(8, draws(step)).edits} == set(EDITS)


def test_rows_have_equally_many_tokens_and_pictures_at_the_same_places(batches, drawn):
    image = batches.tokenizer.id("<img>")
    for batch in drawn:
        ids = batch.sequence.ids_BL
        assert ids.shape == (4, batch.sequence.length)
        places = (ids == image)
        assert (places == places[0]).all()
        assert int(places[0].sum()) == sum(span.stop - span.start for span in batch.sequence.images)
        assert (ids[:, batch.prefix - 1] == batches.tokenizer.id(batches.tokenizer.img_size)).all()
        assert batch.sequence.gen_timestep == batch.prefix + 1


def test_answers_are_the_next_tokens(batches, drawn):
    for batch in drawn:
        taught = batch.answers_BL >= 0
        assert batch.answers_BL.shape == (4, batch.prefix)
        assert torch.equal(batch.answers_BL[taught], batch.sequence.ids_BL[:, 1 : batch.prefix + 1][taught])
        ratios = torch.tensor(batches.tokenizer.ratio_ids)
        assert torch.isin(batch.answers_BL[:, -1], ratios).all()
        assert not (batch.answers_BL == batches.tokenizer.id("<img>")).any()


def test_each_row_is_taught_all_of_its_answer_and_nothing_before(batches, drawn):
    for batch in drawn:
        opening = batches.tokenizer.id("<think>" if batch.thinking[0] else "<answer>")
        for row, ids in enumerate(batch.sequence.ids_BL.tolist()):
            begin = ids.index(opening)
            assert batch.answers_BL[row].tolist() == [-100] * begin + ids[begin + 1 : batch.prefix + 1]


def test_texts_stand_in_the_sequence_as_they_are_reported(batches, drawn):
    for batch in drawn:
        for row in range(4):
            text = "".join(batches.tokenizer.decode(batch.sequence.ids_BL[row].tolist()).split())
            known = batches.tokenizer.decode(batches.tokenizer.encode(batch.instructions[row]))
            assert "".join(known.split()) in text
            assert "".join(batch.thinking[row].split()) in text and ("<think>" in text) == bool(batch.thinking[row])
            if batch.thinking[row]:
                assert language.names_edit(batch.thinking[row], batch.edits[row])


def test_two_picture_batches_have_two_sources(batches):
    one, two = (batches.draw(3, draws(0), pictures=pictures) for pictures in (1, 2))
    assert set(two.edits) == {"match"} and "match" not in one.edits
    assert (len(one.sources), len(two.sources)) == (1, 2)
    assert (len(one.sequence.spans("vae")), len(two.sequence.spans("vae"))) == (1, 2)
    assert len(two.sequence.cond_timestep) == 2


def test_what_is_asked_for_is_drawn(batches):
    for edit in ("restore", "match", "invert"):
        batch = batches.draw(2, draws(1), grid=(5, 7), thinks=False, edit=edit)
        assert batch.edits == (edit, edit) and batch.thinking == ("", "")
        assert batch.sources[0].pixels.shape == (2, 80, 112, 3) and batch.wanted_bchw.shape == (2, 64, 5, 7)


def test_wanted_is_the_edited_source(batches, drawn):
    for batch in drawn:
        for row, edit in enumerate(batch.edits):
            source = batch.sources[0].pixels[row].astype(np.float32) / 255
            if edit == "restore":  # wanted is what was there before the damage, and "fine" is none
                if batch.thinking[row]:
                    unchanged = np.abs(batch.wanted_pixels[row] - source).mean() < 0.005
                    assert unchanged == ("it is fine" in batch.thinking[row])
                continue
            other = batch.sources[1].pixels[row].astype(np.float32) / 255 if len(batch.sources) == 2 else None
            np.testing.assert_allclose(batch.wanted_pixels[row], edited(source, edit, other), atol=1e-6)
        torch.testing.assert_close(batch.wanted_bchw, batches.latents(batch.wanted_pixels))


def test_latents_are_the_vaes(batches, small_run, drawn):
    for batch in drawn[:8]:
        for source in batch.sources:
            pixels = torch.from_numpy(source.pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
            wanted = small_run.vae.encode(pixels).mean
            torch.testing.assert_close(source.latent_bchw, wanted, rtol=0, atol=1e-4)
            assert wanted.std() > 1  # or the tolerance would mean nothing


def test_no_held_out_phrase_is_ever_drawn(batches):
    held_out = {" ".join(language.tokens(text)) for edit in EDITS for spoken in language.LANGUAGES
                for text in language.held_out(edit, spoken)}
    drawn = [text for by_length in batches.pool.values() for texts in by_length.values() for text in texts]
    assert len(drawn) > 5000 and len(held_out) == len(EDITS) * 13
    assert not [text for text in drawn if " ".join(language.tokens(text)) in held_out]


def test_training_and_held_out_crops_are_apart(small_run):
    for grid, pixels in small_run.crops.items():
        train, rest = small_run.train.crops[grid], small_run.held_out.crops[grid]
        assert len(train) + len(rest) == len(pixels) and len(rest) >= 1
        assert not any(np.array_equal(one, two) for one in train for two in rest)
