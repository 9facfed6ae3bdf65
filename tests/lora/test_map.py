"""The map: principal components, one backbone, files with and without a sketch, damaged ones left out with the reason."""

import json

import pytest
import torch
from comfyui_hywu.hywu_core import cli
from comfyui_hywu.hywu_core.errors import LoRAError, RequestError
from comfyui_hywu.hywu_core.lora import map as maps
from comfyui_hywu.hywu_core.lora.algebra import blend
from comfyui_hywu.hywu_core.lora.files import load_lora, matches, save_lora
from comfyui_hywu.hywu_core.lora.map import Point, lora_map, map_report, point_of, points_of_files
from comfyui_hywu.hywu_core.lora.peft import export_peft
from comfyui_hywu.hywu_core.lora.sketch import LENGTH, sketch, sketch_text
from comfyui_hywu.hywu_core.lora.value import LoRA, Provenance
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from .test_attach import random_lora


def point(values, name="x", backbone="f" * 16) -> Point:
    whole = torch.zeros(LENGTH)
    whole[: len(values)] = torch.tensor(values)
    return Point(name, "", backbone, whole)


def named(lora: LoRA, instruction: str) -> LoRA:
    origin = lora.provenance
    return LoRA.from_tensors(lora.tensors, lora.alpha, Provenance(origin.backbone_fingerprint, instruction=instruction))


@pytest.fixture
def saved(tiny_model, tmp_path):
    """Three LoRAs of two kinds."""
    one, two = random_lora(tiny_model, 1), random_lora(tiny_model, 2)
    files = {}
    loras = {"a": (one, "make it blue"), "b": (blend([one, two], [1.0, 0.1]), ""), "c": (two, "让它变绿")}
    for name, (lora, instruction) in loras.items():
        path = tmp_path / "loras" / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_lora(named(lora, instruction) if instruction else lora, path, picture=Image.new("RGB", (300, 200), "teal"))
        files[path.name] = path
    return files


def test_the_plane_holds_the_largest_differences():
    found = lora_map([point([0.0, 0, 5]), point([4.0, 0, 5]), point([0.0, 2, 5]), point([4.0, 2, 5])])
    assert found.shares == pytest.approx((0.8, 0.2))
    distances = torch.cdist(found.places, found.places)
    assert sorted(set(distances[0].round(decimals=4).tolist())) == pytest.approx([0, 2, 4, 20**0.5], abs=1e-3)
    assert (found.places.amax(0) > 0).all()
    assert found.nearest(0) == 2


@pytest.mark.parametrize(("points", "shares"), [
    ([point([1.0])], (0, 0)), ([point([1.0]), point([3.0])], (1, 0)), ([point([1.0]), point([1.0])], (0, 0)),
    ([point([0.0]), point([0.0])], (0, 0))])
def test_few_and_equal_points(points, shares):
    found = lora_map(points)
    assert found.shares == pytest.approx(shares, abs=1e-9)
    assert torch.isfinite(found.places).all() and torch.isfinite(found.cosines).all()
    assert (found.nearest(0) is None) == (len(points) == 1)
    assert str(len(points)) in map_report(found)


def test_several_backbones_are_refused_with_their_numbers():
    with pytest.raises(LoRAError, match=r"3 LoRAs .* 2 backbones \(2 of aaaa, 1 of bbbb\)"):
        lora_map([point([1.0], backbone="aaaa"), point([2.0], backbone="bbbb"), point([3.0], backbone="aaaa")])
    with pytest.raises(RequestError, match="at least 1 LoRA"):
        lora_map([])


def test_files_become_points_with_thumbnail_and_instruction(saved):
    ticks = []
    points, left_out = points_of_files(saved, on_tick=lambda done, total, latent: ticks.append((done, total)))
    assert left_out == [] and [each.name for each in points] == list(saved)
    assert [each.instruction for each in points][0::2] == ["make it blue", "让它变绿"]
    assert points[1].instruction  # how it was made
    assert all(max(each.thumbnail.size) <= 256 for each in points)
    assert ticks[-1] == (300, 300) and ticks == sorted(ticks)
    found = lora_map(points)
    assert found.nearest(0) == 1 and found.nearest(1) == 0
    report = map_report(found)
    assert "让它变绿" in report and "nearest: 2" in report


def test_a_lora_in_memory_is_the_point_of_its_file(saved, tiny_model):
    points, _ = points_of_files(saved)
    torch.testing.assert_close(point_of(random_lora(tiny_model, 1), "wired").sketch_D, points[0].sketch_D)


def test_words_of_the_instruction_choose(saved):
    assert matches("BLUE it", "x", "make it blue") and not matches("blue green", "x", "make it blue")
    points, _ = points_of_files(saved, "blue")
    assert [each.name for each in points] == ["a.safetensors"]


def with_sketch(path, text: str) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() | {"sketch": text}
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata)


def test_a_sketch_in_the_header_spares_reading_the_values(saved, monkeypatch):
    values = torch.linspace(-1, 1, LENGTH)
    with_sketch(saved["a.safetensors"], sketch_text(values))
    read = []
    monkeypatch.setattr(maps, "load_lora", lambda path: read.append(path.name))
    monkeypatch.setattr(maps, "sketch", lambda lora, on_tick: torch.zeros(LENGTH))
    points, _ = points_of_files(saved)
    assert read == ["b.safetensors", "c.safetensors"]
    torch.testing.assert_close(points[0].sketch_D, values, rtol=0, atol=1e-3)


def test_a_sketch_that_is_none_is_measured_again(saved, tiny_model):
    with_sketch(saved["a.safetensors"], "1:AAAA")
    points, left_out = points_of_files(saved)
    assert left_out == []
    torch.testing.assert_close(points[0].sketch_D, sketch(random_lora(tiny_model, 1)))


def test_values_are_read_once_for_each_state_of_a_file(saved, monkeypatch):
    before, _ = points_of_files(saved)
    monkeypatch.setattr(maps, "load_lora", lambda path: pytest.fail("read again"))
    after, _ = points_of_files(saved)
    assert all(torch.equal(one.sketch_D, two.sketch_D) for one, two in zip(before, after, strict=True))


def test_a_damaged_file_is_left_out_and_said(saved):
    saved["b.safetensors"].write_bytes(saved["b.safetensors"].read_bytes()[:1000])
    points, left_out = points_of_files(saved)
    assert len(points) == 2 and len(left_out) == 1 and left_out[0].startswith("b.safetensors: ")
    assert "Left out, 1" in map_report(lora_map(points), left_out)


# ---- the command


def test_the_command_draws_a_folder(saved, tmp_path, capsys):
    picture = tmp_path / "map.png"
    folder = saved["a.safetensors"].parent
    # A copy is no second LoRA, and what belongs to a PEFT folder none by itself.
    (folder / "a_copy.safetensors").write_bytes(saved["a.safetensors"].read_bytes())
    export_peft(load_lora(saved["c.safetensors"]), folder / "peft")
    assert cli.main(["map", str(folder), "-o", str(picture)]) == 0
    assert Image.open(picture).size == (1400, 1000)
    said = capsys.readouterr().out
    assert said.startswith("3 LoRAs") and "copy" not in said and "Left out" not in said
    assert cli.main(["map", str(folder), "-o", str(picture), "--filter", "no such words"]) == 1
    assert "at least 1 LoRA" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob(".hywu*")] == []


@pytest.mark.parametrize(("folder", "output"), [("missing", "map.png"), (".", "map.gif"), (".", "missing/map.png")])
def test_the_command_refuses_early(tmp_path, capsys, folder, output):
    assert cli.main(["map", str(tmp_path / folder), "-o", str(tmp_path / output)]) == 1
    assert json.dumps(capsys.readouterr().err)[1:6] == "hywu:"
