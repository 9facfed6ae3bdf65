"""A generator that is kept elsewhere writes the same LoRA, and gives its device's memory back whatever happens."""

import shutil

import pytest
import torch
from comfyui_hywu.hywu_core.errors import CheckpointError, RequestError
from comfyui_hywu.hywu_core.generator.handle import load_generator, write_lora

from .test_write_lora import make_condition

WAYS = [("resident", "ram"), ("shared", "ram"), ("shared", "disk"), ("streamed", "ram"), ("streamed", "disk")]


@pytest.fixture
def condition(tiny_generator):
    noise = torch.Generator().manual_seed(3)
    return make_condition(torch.randn(9, tiny_generator.config.input_dim, generator=noise))


@pytest.mark.parametrize(("mode", "kept"), WAYS)
def test_the_lora_is_the_same_from_wherever_the_weights_come(tiny_folders, tiny_generator, condition, mode, kept):
    placed = load_generator(tiny_folders[1], mode=mode, kept=kept)
    assert placed.fingerprint == tiny_generator.fingerprint
    expected = write_lora(tiny_generator, condition)
    for inference in (False, True):  # ComfyUI runs nodes in inference mode
        with torch.inference_mode(inference):
            written = write_lora(placed, condition)
        assert written.tensors.keys() == expected.tensors.keys()
        assert all(torch.equal(written.tensors[key], expected.tensors[key]) for key in expected.tensors)


@pytest.mark.parametrize(("mode", "kept"), WAYS[2:])
def test_nothing_stays_behind_after_a_cancel(tiny_folders, tiny_generator, condition, mode, kept):
    class Cancelled(Exception):
        pass

    def stop(done, total, latent):
        if done == 1:
            raise Cancelled

    placed = load_generator(tiny_folders[1], mode=mode, kept=kept)
    with pytest.raises(Cancelled):
        write_lora(placed, condition, stop)
    assert all(parameter.is_meta for parameter in placed.model.model.blocks.parameters())
    expected, written = write_lora(tiny_generator, condition), write_lora(placed, condition)
    assert all(torch.equal(written.tensors[key], expected.tensors[key]) for key in expected.tensors)


@pytest.mark.parametrize(("mode", "kept"), WAYS)
def test_a_damaged_folder_is_refused_when_it_is_loaded(tiny_folders, tmp_path, mode, kept):
    folder = shutil.copytree(tiny_folders[1], tmp_path / "generator")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut off"):
        load_generator(folder, mode=mode, kept=kept)


def test_unknown_ways_are_refused(tiny_folders):
    with pytest.raises(RequestError, match="'lent'"):
        load_generator(tiny_folders[1], mode="lent")
    with pytest.raises(RequestError, match="'cloud'"):
        load_generator(tiny_folders[1], mode="shared", kept="cloud")
