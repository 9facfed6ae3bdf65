"""Evaluation: cases that do not change, controls that are controls, and measures that are what they are called."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from comfyui_hywu.hywu_core.condition import encode
from comfyui_hywu.hywu_core.errors import RequestError
from comfyui_hywu.hywu_core.generator.handle import write_lora
from comfyui_hywu.hywu_core.training import evaluate, language
from comfyui_hywu.hywu_core.training.edits import DAMAGES, EDITS, edited, luma
from comfyui_hywu.hywu_core.training.evaluate import Asked, Case
from comfyui_hywu.hywu_core.vision.buckets import Buckets

SOME = ("brighten", "expose", "restore", "match", "gray")


@pytest.fixture(scope="module")
def buckets(small_run) -> Buckets:
    return Buckets.of(small_run.train.config)


@pytest.fixture(scope="module")
def cases(test_photos, buckets) -> list[Case]:
    return evaluate.cases(test_photos, buckets, EDITS)


def test_cases_are_the_same_every_time(cases, test_photos, buckets):
    again = evaluate.cases(test_photos, buckets, EDITS)
    assert len(cases) == 2 * 2 * len(EDITS)
    for one, two in zip(cases, again, strict=True):
        assert (one.photo, one.edit, one.instruction, one.bucket) == (two.photo, two.edit, two.instruction, two.bucket)
        assert np.array_equal(one.source, two.source) and np.array_equal(one.wanted, two.wanted)
        assert (one.other is None) == (two.other is None) == (EDITS[one.edit].pictures == 1)
        assert one.other is None or np.array_equal(one.other, two.other)


def test_cases_ask_with_held_out_phrasings_of_both_languages(cases):
    for case in cases:
        assert case.instruction in [text for each in language.LANGUAGES for text in language.held_out(case.edit, each)]
    assert {case.instruction.isascii() for case in cases} == {True, False}


def test_cases_have_their_buckets_size_and_the_true_edit(cases):
    for case in cases:
        assert case.source.shape == case.wanted.shape == (case.bucket.height, case.bucket.width, 3)
        shown = case.source.astype(np.float32) / 255
        if case.edit != "restore":
            other = None if case.other is None else case.other.astype(np.float32) / 255
            np.testing.assert_allclose(case.wanted, edited(shown, case.edit, other), atol=1e-6)
        assert [picture.size for picture in case.pictures][0] == (case.bucket.width, case.bucket.height)
        assert len(case.pictures) == EDITS[case.edit].pictures


def test_what_depends_on_the_photo_is_asked_in_turn(cases):
    light = [luma(case.source.astype(np.float32) / 255).mean() for case in cases if case.edit == "expose"]
    assert max(light[1::2]) < 0.3 < 0.5 < min(light[::2])
    damages = [np.abs(case.source / 255 - case.wanted).mean() for case in cases if case.edit == "restore"]
    assert len(damages) == len(DAMAGES) and min(damages) > 0.01
    assert all(not np.array_equal(case.other, case.source) for case in cases if case.edit == "match")


def asked_of(edits, photos: int) -> tuple[list[Asked], list[str]]:
    """Cases without pictures, two views of each photo, in the order of ``cases``; and a name for the LoRA of each."""
    empty = np.zeros((16, 16, 3), np.uint8)
    asked = [Asked(Case(f"p{photo}-{view}", edit, "", empty, None, empty, None), "", None)
             for edit in edits for photo in range(photos) for view in range(2)]
    return asked, [f"{each.case.edit} {each.case.photo}" for each in asked]


def photo_of(name: str) -> str:
    return name.split()[1].split("-")[0]


@pytest.mark.parametrize("photos", (2, 3, 4, 7))
@pytest.mark.parametrize("edits", (("gray", "invert"), SOME, tuple(EDITS)))
def test_a_shuffled_lora_is_another_edits(edits, photos):
    asked, loras = asked_of(edits, photos)
    chosen = evaluate.shuffled(asked, loras)
    for each, lora in zip(asked, chosen, strict=True):
        assert lora in loras and lora.split()[0] != each.case.edit
    given = Counter((each.case.edit, lora.split()[0]) for each, lora in zip(asked, chosen, strict=True))
    assert len(given) == len(edits) * min(len(edits) - 1, 2 * photos)  # all other edits get their turn


def test_a_shuffled_lora_is_another_photos():
    asked, loras = asked_of(SOME, 4)
    chosen = evaluate.shuffled(asked, loras)
    assert not [lora for each, lora in zip(asked, chosen, strict=True) if photo_of(lora) == each.case.photo.split("-")[0]]


@pytest.mark.parametrize("photos", (2, 3, 4, 7))
def test_a_lora_of_another_photo_is_the_same_edits_of_another_photo(photos):
    asked, loras = asked_of(SOME, photos)
    for each, lora in zip(asked, evaluate.of_another_photo(asked, loras), strict=True):
        assert lora.split()[0] == each.case.edit and photo_of(lora) != each.case.photo.split("-")[0]


@pytest.mark.parametrize("photos", (2, 3, 4, 7))
def test_a_lora_of_another_photo_is_never_the_cases_own(photos):
    asked, loras = asked_of(SOME, photos)
    assert all(one != own for one, own in zip(evaluate.of_another_photo(asked, loras), loras, strict=True))


def test_one_photo_or_one_edit_is_too_few():
    with pytest.raises(RequestError, match="1 photo, at least 2"):
        evaluate.of_another_photo(*asked_of(SOME, 1))
    with pytest.raises(RequestError, match="1 edit, at least 2"):
        evaluate.shuffled(*asked_of(("gray",), 3))


def test_psnr_is_decibels():
    picture = np.full((16, 16, 3), 51, np.uint8)
    assert evaluate.psnr(picture, picture.astype(np.float32) / 255) > 80
    assert evaluate.psnr(picture, np.full((16, 16, 3), 0.3, np.float32)) == pytest.approx(20, abs=1e-3)


def test_ssim_is_1_for_equal_pictures_and_falls_with_noise(cases):
    pytest.importorskip("skimage", reason="scikit-image is not installed: it is needed for SSIM only")
    source = cases[0].source
    wanted = source.astype(np.float32) / 255
    noise = np.random.default_rng(0).normal(0, 1, wanted.shape)
    made = [evaluate.ssim((255 * np.clip(wanted + level * noise, 0, 1)).astype(np.uint8), wanted) for level in (0.05, 0.2)]
    assert evaluate.ssim(source, wanted) == pytest.approx(1) and 1 > made[0] > made[1] > 0


def test_scores_go_to_their_edits():
    pytest.importorskip("skimage", reason="scikit-image is not installed: it is needed for SSIM only")
    asked, _ = asked_of(("gray", "invert"), 1)
    pictures = [np.full((16, 16, 3), level, np.uint8) for level in (0, 51, 102, 153)]
    table = evaluate.scores(asked, pictures)
    assert {edit: len(row["psnr"]) for edit, row in table.items()} == {"gray": 2, "invert": 2}
    assert table["invert"]["psnr"] == pytest.approx([-20 * np.log10(0.4), -20 * np.log10(0.6)], abs=1e-3)


def test_thinking_accuracy_counts_what_names_the_edit():
    asked, _ = asked_of(("gray", "invert"), 1)
    right = [Asked(each.case, language.thinking("gray", ("dark", "red")), None) for each in asked]
    assert evaluate.thinking_accuracy(right) == {"gray": 1.0, "invert": 0.0}


def test_a_case_goes_through_inference(handle, generator_handle, cases):
    """Asked, written for, painted with and without: at the start every LoRA does nothing, so the pictures are the same."""
    case = next(case for case in cases if case.bucket.grid == (12, 12))
    thought = language.thinking(case.edit, ("dark", "red"))
    asked = [Asked(case, thought, encode(handle, case.pictures, case.instruction, thought))]
    loras = evaluate.written(generator_handle, asked)
    assert loras[0].digest == write_lora(generator_handle, asked[0].condition).digest
    plain, written = evaluate.paint(handle, asked * 2, [None, *loras], steps=1)
    assert plain.shape == case.wanted.shape and plain.dtype == np.uint8 and np.array_equal(plain, written)


def test_through_the_vae_comes_the_picture_itself(handle, cases):
    sizes = ((64, 64), (48, 96), (64, 64))
    pictures = [cases[n].source[:h, :w].astype(np.float32) / 255 for n, (h, w) in enumerate(sizes)]
    for picture, back in zip(pictures, evaluate.through_vae(handle, pictures), strict=True):
        assert back.shape == picture.shape and evaluate.psnr(back, picture) > 26


def test_views_are_the_whole_and_the_closer_photo(test_photos, buckets):
    found = evaluate.views(test_photos, buckets)
    assert [name for name, _, _ in found] == [f"{Path(path).stem}-{view}" for path in test_photos for view in range(2)]
    assert all(pixels.shape == (bucket.height, bucket.width, 3) for _, pixels, bucket in found)
    assert not np.array_equal(found[0][1], found[1][1])
