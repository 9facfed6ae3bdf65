"""Reading any picture as upright RGB, refusing what is none, fitting to a bucket, SigLIP2 patches, and the restored size."""

import hashlib
import importlib
import io
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from comfyui_hywu.hywu_core.errors import PictureError
from comfyui_hywu.hywu_core.vision.buckets import Buckets
from comfyui_hywu.hywu_core.vision.pictures import (
    load_picture,
    prepare_picture,
    resize_for_vit,
    restore_size,
    upright_rgb,
    vit_size,
)
from PIL import Image

# All that the functions read of a BackboneConfig.
CONFIG = SimpleNamespace(image_base_size=256, image_extra_sizes=None, vit={"patch_size": 16}, vit_max_num_patches=64)


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(tmp_path, image, name="picture.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


# ---- Reading


def test_rgb_is_read_unchanged(tmp_path):
    image = noise(40, 30)
    read = load_picture(str(saved(tmp_path, image)))
    assert read.mode == "RGB" and np.array_equal(read, image)


@pytest.mark.parametrize("orientation, turn", [
    (1, None), (3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_270), (8, Image.Transpose.ROTATE_90),
    (2, Image.Transpose.FLIP_LEFT_RIGHT)])
def test_exif_orientation(tmp_path, orientation, turn):
    image = noise(40, 30)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, image, exif=exif)
    upright = image if turn is None else image.transpose(turn)
    assert np.array_equal(load_picture(path), upright)
    # A caller who opens the file without us gets the same, and turning twice changes nothing.
    assert np.array_equal(upright_rgb(upright_rgb(Image.open(path))), upright)


def test_alpha_is_laid_on_white(tmp_path):
    image = Image.new("RGBA", (20, 20), (200, 0, 100, 0))
    image.paste((200, 0, 100, 255), (0, 0, 10, 20))
    image.paste((0, 0, 0, 51), (0, 0, 10, 1))
    read = load_picture(saved(tmp_path, image))
    assert read.getpixel((15, 5)) == (255, 255, 255)
    assert read.getpixel((5, 5)) == (200, 0, 100)
    assert read.getpixel((5, 0)) == (204, 204, 204)  # a fifth of black


def test_gray_with_alpha_and_palette_with_a_transparent_entry(tmp_path):
    gray = Image.new("LA", (20, 20), (80, 255))
    gray.putpixel((0, 0), (80, 0))
    read = load_picture(saved(tmp_path, gray, "gray.png"))
    assert read.getpixel((5, 5)) == (80, 80, 80) and read.getpixel((0, 0)) == (255, 255, 255)

    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((0, 0), 0)
    read = load_picture(saved(tmp_path, palette, "palette.png", transparency=0))
    assert read.getpixel((5, 5)) == (40, 50, 60) and read.getpixel((0, 0)) == (255, 255, 255)


def test_rgb_with_one_transparent_colour(tmp_path):
    image = Image.new("RGB", (20, 20), (1, 2, 3))
    image.putpixel((0, 0), (9, 9, 9))
    read = load_picture(saved(tmp_path, image, transparency=(1, 2, 3)))
    assert read.getpixel((5, 5)) == (255, 255, 255) and read.getpixel((0, 0)) == (9, 9, 9)


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4"])
def test_16_bit_gray_is_scaled_not_clipped(tmp_path, dtype):
    values = np.full((20, 20), 32896, dtype)
    values[0, :3] = 0, 65535, 257
    path = saved(tmp_path, Image.fromarray(values), "deep.tiff")
    read = load_picture(path)
    assert [read.getpixel((x, 0)) for x in range(4)] == [(v, v, v) for v in (0, 255, 1, 128)]


@pytest.mark.parametrize("mode, value, rgb", [
    ("1", 1, (255, 255, 255)), ("L", 7, (7, 7, 7)), ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ("YCbCr", (128, 128, 128), (128, 128, 128))])
def test_other_modes(mode, value, rgb):
    assert upright_rgb(Image.new(mode, (20, 20), value)).getpixel((3, 3)) == rgb


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "lime", "blue")]
    path = saved(tmp_path, frames[0], "moving.gif", save_all=True, append_images=frames[1:])
    assert load_picture(path).getpixel((3, 3)) == (255, 0, 0)


# ---- Refusing


@pytest.mark.parametrize("content", [b"", b"a text, no picture", b"\x89PNG\r\n\x1a\n", b"\0" * 3000, b"GIF89a"])
def test_not_a_picture(tmp_path, content):
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(PictureError, match="picture.png"):
        load_picture(path)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "nowhere.png", tmp_path):
        with pytest.raises(PictureError, match="no such file"):
            load_picture(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_file_that_is_cut_off(tmp_path, kind):
    buffer = io.BytesIO()
    noise(64, 64).save(buffer, kind)
    path = tmp_path / "half"
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(PictureError, match="half"):
        load_picture(path)


def test_damaged_bytes_in_the_middle_never_escape_as_another_error(tmp_path):
    buffer = io.BytesIO()
    noise(64, 64).save(buffer, "PNG")
    whole, refused = buffer.getvalue(), 0
    generator = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for place in generator.integers(8, len(whole), 6):
            damaged[place] = generator.integers(256)
        (tmp_path / "damaged.png").write_bytes(damaged)
        try:
            assert load_picture(tmp_path / "damaged.png").mode == "RGB"
        except PictureError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize("width, height, words", [
    (1, 9000, "1 x 9000.*9000:1.*8:1"), (9000, 1, "9000 x 1"), (801, 100, "801 x 100"), (15, 15, "15 x 15.*16"),
    (0, 10, "0 x 10.*16"), (0, 0, "0 x 0")])
def test_sizes_that_no_bucket_can_hold(width, height, words):
    with pytest.raises(PictureError, match=words):
        prepare_picture(Image.new("RGB", (width, height)), CONFIG, "stretch")


@pytest.mark.parametrize("width, height", [(97, 411), (411, 97), (800, 100), (16, 16)])
def test_extreme_sizes_that_still_work(width, height):
    source = prepare_picture(noise(width, height), CONFIG, "crop")
    assert source.pixels_chw.shape == (3, source.bucket.height, source.bucket.width)


def bomb(width, height):
    """A PNG of a few bytes that claims to be huge."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 4) + b"IDAT" + b"\0" * 4


@pytest.mark.parametrize("limit", [Image.MAX_IMAGE_PIXELS, None])
def test_a_decompression_bomb_is_refused_even_if_the_host_lifted_pillows_limit(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    (tmp_path / "bomb.png").write_bytes(bomb(30000, 30000))
    with pytest.raises(PictureError, match=r"bomb.png.*\b\d{9}\b"):
        load_picture(tmp_path / "bomb.png")


def test_values_without_an_agreed_white():
    with pytest.raises(PictureError, match="floating-point"):
        upright_rgb(Image.new("F", (20, 20), 0.5))
    with pytest.raises(PictureError, match="70000"):
        upright_rgb(Image.new("I", (20, 20), 70000))


def test_an_unknown_fit():
    with pytest.raises(ValueError, match="'center'.*crop.*stretch"):
        prepare_picture(noise(32, 32), CONFIG, "center")


# ---- Fitting


def test_values_run_from_minus_one_to_one():
    image = Image.new("RGB", (256, 256), (0, 255, 51))
    pixels = prepare_picture(image, CONFIG, "stretch").pixels_chw
    torch.testing.assert_close(pixels[:, 7, 7], torch.tensor([-1.0, 1.0, -0.6]))
    assert pixels.dtype == torch.float32


def test_stretch_keeps_the_whole_picture():
    image = Image.new("RGB", (480, 180), "black")
    image.paste("white", (0, 0, 40, 180))
    source = prepare_picture(image, CONFIG, "stretch")
    white = (source.pixels_chw[0, 60] > 0).sum().item()
    assert white == pytest.approx(source.bucket.width * 40 / 480, abs=1)


@pytest.mark.parametrize("width, height", [(331, 197), (300, 400), (97, 411)])
def test_crop_scales_until_the_bucket_is_just_covered(width, height):
    """A horizontal and a vertical ramp say which pixels of the original the fitted ones came from."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    ramp = Image.fromarray(np.stack([x, y, 0 * x], -1).round().astype(np.uint8))
    source = prepare_picture(ramp, CONFIG, "crop")
    bucket, pixels = source.bucket, source.pixels_chw
    scale = max(bucket.height / height, bucket.width / width)
    for side, length, line in ((bucket.width, width, pixels[0, 40]), (bucket.height, height, pixels[1, :, 40])):
        kept = side / (length * scale)  # the share of the original that is left
        assert (line[-1] - line[0]).item() / 2 == pytest.approx(kept, abs=0.02)
        assert (line[-1] + line[0]).item() == pytest.approx(0, abs=0.02)


def test_digest_is_of_the_pixels_not_of_the_file(tmp_path):
    image = noise(40, 30)
    png, bmp = saved(tmp_path, image, "a.png"), saved(tmp_path, image, "a.bmp")
    digests = {prepare_picture(load_picture(path), CONFIG, fit).digest for path in (png, bmp) for fit in ("crop", "stretch")}
    assert digests == {hashlib.sha256(b"40x30:" + image.tobytes()).hexdigest()}
    # Same bytes in another shape are another picture.
    other = Image.frombytes("RGB", (30, 40), image.tobytes())
    assert prepare_picture(other, CONFIG, "crop").digest not in digests


# ---- SigLIP2 input


def library_size():
    for name in ("image_processing_pil_siglip2", "image_processing_siglip2"):  # 5.x, 4.57
        try:
            return importlib.import_module(f"transformers.models.siglip2.{name}").get_image_size_for_max_num_patches
        except ModuleNotFoundError:
            continue
    pytest.fail("transformers' size function is in neither module")


def test_size_equals_the_librarys():
    theirs = library_size()
    generator = np.random.default_rng(0)
    cases = [(int(h), int(w), int(p)) for h, w, p in zip(
        generator.integers(16, 5000, 300), generator.integers(16, 5000, 300), generator.choice([16, 50, 64, 256, 1024], 300),
        strict=True)]
    for height, width, most in [*cases, (1, 1, 1024), (16, 16, 16), (9000, 1, 64), (4000, 6000, 1024)]:
        assert vit_size(height, width, 16, most) == theirs(
            image_height=height, image_width=width, patch_size=16, max_num_patches=most)


def test_patches_are_rows_of_patches_with_channels_fastest():
    image = noise(160, 96)
    source = prepare_picture(image, CONFIG, "crop")
    assert source.grid == (6, 10) and source.patches.shape == (64, 768)
    resized = resize_for_vit(image, 16, 64)
    assert resized.shape == (3, 96, 160) and np.array_equal(resized.permute(1, 2, 0), image)  # already that size
    row, col, y, x, c = 4, 7, 3, 9, 2
    value = (image.getpixel((col * 16 + x, row * 16 + y))[c] - 127.5) / 127.5
    assert source.patches[row * 10 + col, (y * 16 + x) * 3 + c].item() == pytest.approx(value, abs=1e-6)
    assert source.patch_mask.tolist() == [1] * 60 + [0] * 4 and source.patch_mask.dtype == torch.int32
    assert not source.patches[60:].any()


# ---- Restored size


@pytest.mark.parametrize("originals, out, result", [
    ([(197, 331)], 12, (192, 320)),  # 0.5952 against 0.6: near enough, left alone
    ([(411, 97)], 32, (527, 124)),  # 4.237 against 4
    ([(411, 97)], 16, (256, 256)),  # another bucket than the source's
    ([(240, 240), (411, 97)], 32, (527, 124)),  # the first that matches decides
    ([(512, 128), (411, 97)], 32, (512, 128)),  # ... also if it says "leave"
    ([], 5, (128, 432)),
])
def test_restore_size(originals, out, result):
    buckets = Buckets(256)
    assert restore_size(buckets.at(out), originals, buckets) == result
