"""LoRA files: the round trip, whole or not at all, and everything that is no sound LoRA file."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comfyui_hywu.hywu_core.errors import LoRAError
from comfyui_hywu.hywu_core.lora.files import load_lora, read_provenance, save_lora
from comfyui_hywu.hywu_core.lora.value import LoRA, Provenance
from safetensors import safe_open
from safetensors.torch import save_file

PROVENANCE = Provenance(
    backbone_fingerprint="0123456789abcdef", generator_fingerprint="fedcba9876543210", instruction="Färbe es blau, \"now\"\n🎨",
    thinking="<think>…</think>", picture_digests=("aa", "bb"), seed=-5)


def make_lora(dtype: torch.dtype = torch.float32) -> LoRA:
    """Two layers of an expert stack and a linear, in an order that is not alphabetical."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"self_attn.o_proj": ((2, 6), (10, 2)), "mlp.experts.w1": ((3, 2, 5), (3, 4, 2))}
    return LoRA.from_tensors({
        f"model.layers.{layer}.{name}.lora_{side}": torch.randn(shape, generator=generator).to(dtype)
        for layer in range(2) for i, side in enumerate("AB") for name, pair in shapes.items() for shape in [pair[i]]},
        7.5, PROVENANCE)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_lora(make_lora(), tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


def rewrite(path: Path, **changes: str | None) -> None:
    """Write the file again with other metadata; None drops a key."""
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    metadata = {key: value for key, value in {**metadata, **changes}.items() if value is not None}
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_round_trip_keeps_everything(tmp_path, dtype):
    lora, ticks = make_lora(dtype), []
    save_lora(lora, tmp_path / "x.safetensors", lambda *tick: ticks.append(tick))
    back = load_lora(tmp_path / "x.safetensors", lambda *tick: ticks.append(tick))
    assert back.digest == lora.digest
    assert list(back.tensors) == list(lora.tensors)
    assert (back.provenance, back.targets, back.alpha, back.rank) == (PROVENANCE, lora.targets, 7.5, 2)
    assert ticks == [(done, 8, None) for done in range(1, 9)] + [(0, 1, None), (1, 1, None)]  # matrices, then MB
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_same_lora_same_bytes(saved, tmp_path):
    save_lora(make_lora(), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == saved.read_bytes()


def test_provenance_is_read_from_the_header_alone(saved):
    assert read_provenance(saved) == PROVENANCE
    header_end = 8 + int.from_bytes(saved.read_bytes()[:8], "little")
    with open(saved, "r+b") as file:  # NaN everywhere: only a reader of the values would notice
        file.seek(header_end)
        file.write(b"\xff" * (saved.stat().st_size - header_end))
    assert read_provenance(saved) == PROVENANCE
    with pytest.raises(LoRAError, match="NaN or Inf"):
        load_lora(saved)


def test_loaded_values_do_not_hang_on_the_file(saved):
    lora = load_lora(saved)
    before = lora.digest
    saved.write_bytes(b"\xff" * saved.stat().st_size)
    del lora.__dict__["digest"]  # the cached one
    assert lora.digest == before


def test_a_lone_surrogate_in_the_instruction_loses_no_lora(tmp_path):
    lora = LoRA.from_tensors(make_lora().tensors, 7.5, Provenance(instruction="a\ud800b"))
    save_lora(lora, tmp_path / "x.safetensors")
    assert load_lora(tmp_path / "x.safetensors").provenance.instruction == "a?b"


def test_views_and_strided_tensors_are_written_by_value(tmp_path):
    tensors = {key: tensor.transpose(-1, -2).contiguous().transpose(-1, -2) for key, tensor in make_lora().tensors.items()}
    save_lora(LoRA.from_tensors(tensors, 7.5), tmp_path / "x.safetensors")
    assert load_lora(tmp_path / "x.safetensors").digest == make_lora().digest


# ---- whole or not at all

class Cancelled(Exception):
    """Stands for ComfyUI's interrupt."""


def cancel(done: int, total: int, latent: object) -> None:
    if done == 3:
        raise Cancelled


@pytest.mark.parametrize("there_before", [True, False])
def test_cancel_leaves_the_old_state(tmp_path, there_before):
    path = tmp_path / "x.safetensors"
    if there_before:
        path.write_bytes(b"old")
    with pytest.raises(Cancelled):
        save_lora(make_lora(), path, cancel)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == ([(path.name, b"old")] if there_before else [])


def test_keyboard_interrupt_while_syncing_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_lora(make_lora(), tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_too_little_space_is_seen_before_a_byte_is_written(saved, monkeypatch):
    before, needed = saved.read_bytes(), saved.stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9999, 9999 - needed + 1, needed - 1))
    with pytest.raises(LoRAError, match=f"{needed} bytes are needed, {needed - 1} are free"):
        save_lora(make_lora(), saved, lambda *tick: pytest.fail("started to write"))
    assert saved.read_bytes() == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_disk_that_fills_up_meanwhile(saved, monkeypatch, number):
    before = saved.read_bytes()

    def full(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LoRAError, match=f"{len(before)} bytes are needed, [0-9]+ are free"):
        save_lora(make_lora(), saved)
    assert os.listdir(saved.parent) == [saved.name] and saved.read_bytes() == before


def test_the_systems_own_write_error_leaves_nothing(tmp_path):
    """A real failing write, not a patched one: the process may write no file above 512 bytes."""
    pytest.importorskip("resource")
    root = Path(__file__).resolve().parents[2]
    script = (
        "import sys, resource; sys.path.insert(0, sys.argv[1]); import conftest\n"
        "from pathlib import Path; import importlib.util\n"
        "spec = importlib.util.spec_from_file_location('test_files', sys.argv[2])\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))\n"
        "try: module.save_lora(module.make_lora(), Path(sys.argv[3]) / 'x.safetensors')\n"
        "except module.LoRAError as error: print('refused:', error)\n")
    result = subprocess.run(
        [sys.executable, "-c", script, str(root / "tests"), __file__, str(tmp_path)], capture_output=True, text=True)
    assert result.stdout.startswith("refused: cannot save"), result.stderr
    assert not list(tmp_path.iterdir())


def test_missing_folder(tmp_path):
    with pytest.raises(LoRAError, match="does not exist"):
        save_lora(make_lora(), tmp_path / "no" / "x.safetensors")


def test_a_folder_in_the_way(tmp_path):
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(LoRAError, match="cannot save"):
        save_lora(make_lora(), tmp_path / "x.safetensors")
    assert os.listdir(tmp_path) == ["x.safetensors"]


# ---- damaged, foreign, hostile

def test_every_truncation_is_refused(saved):
    whole = saved.read_bytes()
    for length in (0, 1, 7, 8, 9, 300, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:length])
        for reader in (load_lora, read_provenance):
            with pytest.raises(LoRAError, match=f"{length} bytes"):
                reader(saved)


def test_trailing_bytes_are_refused(saved):
    saved.write_bytes(saved.read_bytes() + b"more")
    with pytest.raises(LoRAError, match="damaged"):
        load_lora(saved)


@pytest.mark.parametrize("content", [
    b"PK\x03\x04" + b"\0" * 100,  # a zip, as torch.save writes it
    (2**63).to_bytes(8, "little") + b"{}",  # a header of 8 exabytes
    (2).to_bytes(8, "little") + b"{}",
    (2).to_bytes(8, "little") + b"[]",
    (400_000).to_bytes(8, "little") + b"[" * 400_000,
])
def test_what_is_no_safetensors_file_is_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(LoRAError, match=str(path)):
        load_lora(path)


def test_offsets_outside_the_file_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    header = json.dumps({"__metadata__": {"format": "hywu-lora", "version": "1"}, "a": {
        "dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(LoRAError, match="cut off, damaged"):
        load_lora(path)


def test_a_diffusers_lora_is_named_as_what_it_is(tmp_path):
    path = tmp_path / "flux.safetensors"
    save_file({"transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight": torch.zeros(4, 8)}, path, {"format": "pt"})
    with pytest.raises(LoRAError, match="no HY-WU LoRA: its format is 'pt'.*1 tensors such as .*to_k.lora_A"):
        load_lora(path)
    save_file({"x": torch.zeros(1)}, path)  # no metadata at all
    with pytest.raises(LoRAError, match="format is None"):
        read_provenance(path)


def test_nothing_there(tmp_path):
    for path in (tmp_path / "x.safetensors", tmp_path):
        with pytest.raises(LoRAError, match="not there or no file"):
            load_lora(path)


@pytest.mark.parametrize("changes, message", [
    ({"version": "3"}, "version '3' .* reads version '1' and '2'"),
    ({"alpha": "many"}, "alpha 'many', expected a number"),
    ({"alpha": "nan"}, "alpha is nan"),
    ({"alpha": None}, "no 'alpha'"),
    ({"rank": "4"}, "rank 4, the tensors have rank 2"),
    ({"seed": "1.5"}, "seed '1.5', expected a whole number"),
    ({"seed": "9" * 6000}, "expected a whole number"),
    ({"targets": "self_attn"}, "expected a list of names"),
    ({"targets": "[" * 100_000}, "expected a list of names"),
    ({"targets": '["mlp.experts.w1"]'}, "expected \\['mlp.experts.w1'\\]"),
    ({"targets": '["mlp.experts.w1", "mlp.experts.w1"]'}, "expected"),
    ({"picture_digests": "[1]"}, "expected a list of names"),
    ({"thinking": None}, "no 'thinking'"),
])
def test_metadata_is_not_trusted(saved, changes, message):
    rewrite(saved, **changes)
    with pytest.raises(LoRAError, match=message):
        load_lora(saved)


def test_the_order_comes_from_the_metadata(saved):
    rewrite(saved)  # the library sorts the tensors by name
    with safe_open(saved, framework="pt") as file:
        assert list(file.keys()) != list(make_lora().tensors)  # noqa: SIM118
    assert list(load_lora(saved).tensors) == list(make_lora().tensors)


def test_tensors_that_make_no_lora(saved):
    with safe_open(saved, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    del tensors["model.layers.1.self_attn.o_proj.lora_B"]
    save_file(tensors, saved, metadata)
    with pytest.raises(LoRAError, match=f"{saved.name}: layer 1, self_attn.o_proj: only lora_A"):
        load_lora(saved)
