"""The bucket table against the published one, nearest buckets, and every notation of a size."""

from dataclasses import replace

import pytest
from comfyui_hywu.hywu_core.errors import RequestError
from comfyui_hywu.hywu_core.vision.buckets import Buckets

# First half of the published table for base 1024; the second half is its mirror image.
PUBLISHED_1024 = [
    (512, 2048), (512, 1984), (512, 1920), (512, 1856), (512, 1792), (512, 1728), (512, 1664), (512, 1600), (512, 1536),
    (576, 1472), (640, 1408), (704, 1344), (768, 1280), (832, 1216), (896, 1152), (960, 1088)]
EXTRAS = [(1024, 768), (1280, 720), (768, 1024), (720, 1280)]


def sizes(base):
    return [(bucket.height, bucket.width) for bucket in Buckets(base).entries]


def test_the_published_table():
    mirrored = [(width, height) for height, width in reversed(PUBLISHED_1024)]
    assert sizes(1024) == PUBLISHED_1024 + [(1024, 1024)] + mirrored + EXTRAS


def test_a_base_whose_step_is_no_multiple_of_16_is_rounded_down():
    table = sizes(320)  # step 20
    assert table[:4] == [(160, 640), (160, 608), (160, 592), (160, 576)]
    assert table[15:18] == [(288, 336), (320, 320), (336, 288)]
    assert len(table) == 37 and table[33:] == EXTRAS
    assert all(height % 16 == 0 and width % 16 == 0 for height, width in table)


def test_an_extra_whose_ratio_is_already_there_is_left_out():
    # Rounded down to multiples of 16, base 288 has 320 x 240, which is exactly 4:3, and its mirror image.
    table = sizes(288)
    assert (320, 240) in table and (240, 320) in table
    assert table[33:] == [(1280, 720), (720, 1280)]


def test_index_equals_place_and_grid_counts_cells():
    buckets = Buckets(256)
    assert [bucket.index for bucket in buckets.entries] == list(range(37)) and len(buckets) == 37
    assert buckets.at(34).grid == (80, 45)


@pytest.mark.parametrize("height, width, index", [
    (197, 331, 12), (300, 180, 20), (240, 240, 16), (411, 97, 32), (97, 411, 0), (9000, 1, 32), (1, 9000, 0), (4, 3, 33)])
def test_nearest(height, width, index):
    assert Buckets(256).nearest(height, width).index == index


def test_of_two_equally_near_buckets_the_first_is_taken():
    # 63/16 lies halfway between 1984/512 and 2048/512, all exact in binary.
    assert Buckets(1024).nearest(63, 16).index == 31


@pytest.mark.parametrize("text, height, width", [
    ("256x256", 256, 256), ("512x384", 1024, 768), ("16:9", 720, 1280), ("9:16", 1280, 720), ("1:1", 256, 256),
    ("<img_ratio_0>", 128, 512), ("<img_ratio_32>", 512, 128), ("<img_ratio_20>", 320, 192), ("700x300", 352, 160),
    (" 700 X 300 ", 352, 160), ("700×300", 352, 160)])
def test_parse(text, height, width):
    bucket = Buckets(256).parse(text)
    assert (bucket.height, bucket.width) == (height, width)


@pytest.mark.parametrize("text", [
    "", "big", "1024", "1024x", "-5x10", "1.5:1", "10x10x10", "9" * 5000 + "x1", "<img_ratio_>", "<img_ratio_1> "[:-2], "auto"])
def test_a_size_that_is_not_understood_names_the_notations(text):
    with pytest.raises(RequestError, match=r"1024x768.*16:9.*<img_ratio_36>"):
        Buckets(256).parse(text)


@pytest.mark.parametrize("text, numbers", [("0x100", "0 x 100"), ("100:0", "0 x 100"), ("<img_ratio_37>", "0 to 36")])
def test_sizes_out_of_range(text, numbers):
    with pytest.raises(RequestError, match=numbers):
        Buckets(256).parse(text)


def test_a_base_without_room_for_a_table():
    with pytest.raises(RequestError, match="16.*32"):
        Buckets(16)


def test_a_configuration_may_name_its_own_extra_sizes(tiny_model):
    """Without extras a 16:9 picture falls into the nearest bucket of the walk instead of 1280 x 720."""
    config = replace(tiny_model.config, image_base_size=180)
    assert (Buckets.of(config).nearest(720, 1280).height, Buckets.of(config).nearest(720, 1280).width) == (720, 1280)
    bucket = Buckets.of(replace(config, image_extra_sizes=())).nearest(720, 1280)
    assert (bucket.height, bucket.width) == (128, 224)
    assert Buckets.of(replace(config, image_extra_sizes=((144, 256),))).entries[-1].width == 256
