"""Crops from a folder as people have them: with broken, tiny, odd and doubled files in it."""

from collections import Counter

import numpy as np
import pytest
from comfyui_hywu.hywu_core.errors import RequestError
from comfyui_hywu.hywu_core.training.photos import cut, find_pictures
from PIL import Image

GRIDS = {(6, 6): 0.5, (5, 7): 0.5}
BROKEN, SMALL = "files that are broken, no picture, or too thin or small", "crops of photos smaller than the grid"


@pytest.fixture(scope="module")
def cat(test_photos) -> Image.Image:
    return Image.open(test_photos[0]).convert("RGB").resize((160, 150))


@pytest.fixture(scope="module")
def mess(tmp_path_factory, cat):
    folder = tmp_path_factory.mktemp("mess")
    (folder / "deep" / "er").mkdir(parents=True)
    cat.save(folder / "good.jpg")
    (folder / "double.JPG").write_bytes((folder / "good.jpg").read_bytes())
    (folder / "cut.jpg").write_bytes((folder / "good.jpg").read_bytes()[:1500])
    (folder / "text.png").write_text("I am a picture")
    (folder / "empty.jpeg").write_bytes(b"")
    (folder / "notes.txt").write_text("no picture and none pretended")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("RGB", (1, 9000)).save(folder / "thread.png")
    cat.resize((40, 40)).save(folder / "small.png")
    cat.rotate(90).convert("CMYK").save(folder / "print.jpg")
    alpha = cat.rotate(180).convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    alpha.save(folder / "deep" / "alpha.png")
    Image.fromarray(np.asarray(cat.convert("L")).astype(np.uint16) * 257).save(folder / "deep" / "er" / "gray16.png")
    (folder / "link.jpg").symlink_to(folder / "print.jpg")
    (folder / "deep" / "round").symlink_to(folder)
    return folder


def test_what_is_no_use_is_counted_and_nothing_raises(mess):
    made = cut(mess, GRIDS, 6, seed=0)
    assert made.skipped == Counter({BROKEN: 5, "doubles": 1, SMALL: 6})
    assert made.photos == 4 and len(made) == 4 * 6
    assert "24 crops of 4 photos" in made.summary() and "5 files that are broken" in made.summary()


def test_crops_are_bytes_of_their_grids_size(mess):
    made = cut(mess, GRIDS, 6, seed=0)
    assert set(made.by_grid) == set(GRIDS)
    for (rows, cols), crops in made.by_grid.items():
        assert crops.dtype == np.uint8 and crops.shape[1:] == (16 * rows, 16 * cols, 3)


@pytest.mark.parametrize("name", ("print.jpg", "deep/alpha.png", "deep/er/gray16.png"))
def test_odd_modes_give_crops_with_a_picture_in_them(mess, tmp_path, name):
    (tmp_path / "one.png").write_bytes((mess / name).read_bytes())
    crops = next(iter(cut(tmp_path, {(6, 6): 1.0}, 8, seed=0).by_grid.values()))
    assert len(crops) == 8 and 25 < crops.mean() < 230 and crops.std(axis=(1, 2)).max(1).min() > 8


def test_links_are_not_followed(mess):
    assert not [path for path in find_pictures(mess) if "link" in path.name or "round" in path.parts]


def test_the_same_seed_cuts_the_same_crops(mess):
    one, same, other = (cut(mess, GRIDS, 3, seed=seed) for seed in (0, 0, 1))
    assert all(np.array_equal(one.by_grid[grid], same.by_grid[grid]) for grid in GRIDS)
    assert any(not np.array_equal(one.by_grid[grid], other.by_grid[grid]) for grid in GRIDS)


def test_grids_get_their_shares(cat, tmp_path):
    cat.save(tmp_path / "cat.png")
    made = cut(tmp_path, {(6, 6): 3.0, (5, 7): 1.0}, 200, seed=0)  # shares need not add up to one
    assert 0.65 < len(made.by_grid[6, 6]) / 200 < 0.85


def test_a_folder_with_nothing_usable_is_refused_with_numbers(tmp_path, cat):
    (tmp_path / "text.png").write_text("I am a picture")
    cat.resize((40, 40)).save(tmp_path / "small.png")
    Image.new("RGB", (200, 200), "teal").save(tmp_path / "flat.png")
    with pytest.raises(RequestError) as caught:
        cut(tmp_path, GRIDS, 4, seed=0)
    for words in ("0 usable crops out of 3 files", f"1 {BROKEN}", f"4 {SMALL}", "4 flat crops", "80 pixels a side"):
        assert words in str(caught.value)


def test_a_folder_without_pictures_and_a_missing_one_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(RequestError, match="holds 0 pictures .*at least 1"):
        cut(tmp_path, GRIDS, 4, seed=0)
    with pytest.raises(RequestError, match="nowhere is no folder"):
        cut(tmp_path / "nowhere", GRIDS, 4, seed=0)
    with pytest.raises(RequestError, match="notes.txt is no folder"):
        cut(tmp_path / "notes.txt", GRIDS, 4, seed=0)


def test_one_wallpaper_in_several_sizes_counts_once(tmp_path, cat):
    folder = tmp_path / "Hill" / "contents" / "images"
    folder.mkdir(parents=True)
    for width, height in ((160, 120), (320, 240)):
        cat.resize((width, height)).save(folder / f"{width}x{height}.png")
    assert [path.name for path in find_pictures(tmp_path)] == ["160x120.png"]


def test_numbered_photos_are_no_wallpaper(tmp_path, cat):
    folder = tmp_path / "contents" / "holiday"
    folder.mkdir(parents=True)
    for number in range(3):
        cat.rotate(90 * number).save(folder / f"{number:04d}.jpg")
    assert len(find_pictures(folder)) == 3


def test_ticks_count_files_and_a_cancel_passes_through(mess):
    ticks = []
    cut(mess, GRIDS, 1, seed=0, on_tick=lambda *tick: ticks.append(tick[:2]))
    assert ticks == [(number, 11) for number in range(12)]

    def cancel(done, total, latent):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut(mess, GRIDS, 1, seed=0, on_tick=cancel)
