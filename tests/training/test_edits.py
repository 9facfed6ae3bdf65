"""What edits do to pixels: in range, opposite where their names are, and as exact as their definitions say."""

import numpy as np
import pytest
from comfyui_hywu.hywu_core.training.edits import DAMAGES, EDITS, LUMA, MIDDLE, damaged, describe, edited, luma, smooth
from PIL import Image


@pytest.fixture(scope="module")
def cat(test_photos) -> np.ndarray:
    return np.asarray(Image.open(test_photos[0]).convert("RGB").resize((96, 80)), np.float32) / 255


@pytest.fixture(scope="module")
def coffee(test_photos) -> np.ndarray:
    return np.asarray(Image.open(test_photos[1]).convert("RGB").resize((112, 80)), np.float32) / 255


def brightness(picture):
    return luma(picture).mean()


def warmth(picture):
    return (picture[..., 0] - picture[..., 2]).mean()


def colour(picture):
    return (picture.max(-1) - picture.min(-1)).mean()


def edges(picture):
    return np.square(np.diff(luma(picture), axis=0)).mean() + np.square(np.diff(luma(picture), axis=1)).mean()


def contrast(picture):
    return luma(picture).std()


def greenness(picture):
    return (picture[..., 1] - picture[..., ::2].mean(-1)).mean()


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("level", ("photo", "black", "white"))
def test_every_edit_stays_in_range_and_in_float32(cat, coffee, name, level):
    picture = {"photo": cat, "black": np.zeros_like(cat), "white": np.ones_like(cat)}[level]
    before = picture.copy()
    made = edited(picture, name, coffee if EDITS[name].pictures == 2 else None)
    assert made.dtype == np.float32 and made.shape == picture.shape
    assert np.isfinite(made).all() and made.min() >= 0 and made.max() <= 1
    assert np.array_equal(picture, before)  # the source is shown beside it


@pytest.mark.parametrize("more, less, measure", (
    ("brighten", "darken", brightness), ("warm", "cool", warmth), ("saturate", "gray", colour), ("sharpen", "blur", edges),
    ("contrast", "fade", contrast), ("green", "pink", greenness)))
def test_opposites_move_in_opposite_directions(cat, coffee, more, less, measure):
    for picture in (cat, coffee):
        up, same, down = measure(edited(picture, more)), measure(picture), measure(edited(picture, less))
        assert down < same - 0.1 * abs(same) and up > same + 0.1 * abs(same)


def test_no_two_edits_are_the_same(cat, coffee):
    dark = cat**1.5
    made = {name: edited(dark, name, coffee) for name in EDITS if name != "restore"}
    for name, picture in made.items():
        assert np.abs(picture - dark).mean() > 0.02, name
        assert all(np.abs(picture - other).mean() > 0.02 for another, other in made.items() if another != name), name


def test_invert_twice_is_the_picture(cat):
    np.testing.assert_allclose(edited(edited(cat, "invert"), "invert"), cat, atol=1e-6)
    np.testing.assert_allclose(edited(cat, "invert"), 1 - cat, atol=1e-6)


def test_gray_has_no_colour_and_keeps_the_brightness(cat):
    gray = edited(cat, "gray")
    assert colour(gray) < 1e-6 and np.abs(luma(gray) - luma(cat)).max() < 1e-5


def test_sepia_and_old_are_brown_whatever_the_colours(cat):
    for name in ("sepia", "old"):
        made = edited(cat, name)
        assert (made[..., 0] >= made[..., 1]).all() and (made[..., 1] >= made[..., 2]).all() and warmth(made) > 0.1


@pytest.mark.parametrize("height, width", ((80, 96), (86, 93)))
def test_pixelate_makes_blocks_of_8(cat, height, width):
    picture = np.tile(cat, (2, 2, 1))[:height, :width]
    made = edited(picture, "pixelate")
    block = made[8:16, 16:24]
    assert np.ptp(block.reshape(64, 3), axis=0).max() == 0
    np.testing.assert_allclose(block[0, 0], picture[8:16, 16:24].mean((0, 1)), atol=1e-5)
    assert len(np.unique(made.reshape(-1, 3), axis=0)) <= (height // 8) * (width // 8)


def test_expose_brings_dark_and_bright_pictures_to_the_middle(cat):
    for picture in (0.4 * cat, 1 - 0.55 * (1 - cat)):
        assert abs(brightness(picture) - MIDDLE) > 0.15
        assert abs(brightness(edited(picture, "expose")) - MIDDLE) < 0.02
    assert np.isfinite(edited(np.zeros_like(cat), "expose")).all()


def test_old_has_one_range_for_all_photos(cat):
    means = [edited(picture, "old").mean() for picture in (cat, 0.4 * cat, 0.5 + 0.5 * cat)]
    assert np.ptp(means) < 0.02


def test_match_gives_the_others_mean_and_spread(cat, coffee):
    picture, other = 0.3 + 0.4 * cat, 0.3 + 0.4 * coffee  # far from 0 and 1, so that nothing clips
    made = edited(picture, "match", other)
    np.testing.assert_allclose(made.mean((0, 1)), other.mean((0, 1)), atol=1e-4)
    np.testing.assert_allclose(made.std((0, 1)), other.std((0, 1)), atol=1e-4)
    assert np.abs(made - picture).mean() > 0.02


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_changes_the_picture_as_the_draws_say(cat, damage):
    made, same, other = (damaged(cat, damage, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert made.dtype == np.float32 and made.min() >= 0 and made.max() <= 1
    assert np.array_equal(made, same) and not np.array_equal(made, other)
    assert np.abs(made - cat).mean() > 0.02
    assert np.array_equal(edited(cat, "restore"), cat)  # what is wanted is the undamaged picture


def test_damage_is_what_it_is_called(cat):
    made = {damage: damaged(cat, damage, np.random.default_rng(0)) for damage in DAMAGES}
    assert edges(made["blur"]) < 0.3 * edges(cat) < 0.3 * edges(made["noise"])
    assert contrast(made["fade"]) < 0.6 * contrast(cat)
    shares = [picture.mean((0, 1)) / picture.mean() for picture in (made["cast"], cat)]
    assert np.abs(shares[0] - shares[1]).max() > 0.1


def test_unknown_damage_is_an_error(cat):
    with pytest.raises(ValueError, match="'scratch' is none of .*blur"):
        damaged(cat, "scratch", np.random.default_rng(0))


def test_smoothing_keeps_a_flat_picture_and_the_mean(cat):
    np.testing.assert_allclose(smooth(np.full((20, 24, 3), 0.3, np.float32), 3.0), 0.3, atol=1e-5)
    np.testing.assert_allclose(smooth(cat, 3.0).mean((0, 1)), cat.mean((0, 1)), atol=0.02)


@pytest.mark.parametrize("colour, words", (
    ((0.1, 0.1, 0.1), ("dark", "gray")), ((0.9, 0.9, 0.92), ("bright", "gray")), ((0.1, 0.2, 0.7), ("dark", "blue")),
    ((0.6, 0.1, 0.7), ("dark", "purple")), ((0.2, 0.7, 0.3), ("medium", "green")), ((0.6, 0.45, 0.2), ("medium", "brown")),
    ((0.9, 0.3, 0.3), ("medium", "red"))))
def test_describe_names_brightness_and_hue(colour, words):
    assert describe(np.full((4, 5, 3), colour, np.float32)) == words
    assert LUMA.sum() == pytest.approx(1)
