"""``hywu convert``: what it packs and what it leaves, that it goes on after a kill, and what it refuses before it writes."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comfyui_hywu.hywu_core.checkpoint import backbone_fingerprint, find_packed, open_shards, read_packed
from comfyui_hywu.hywu_core.checkpoint import shard_file as shard_file_module
from comfyui_hywu.hywu_core.checkpoint.convert import convert
from comfyui_hywu.hywu_core.cli import main
from comfyui_hywu.hywu_core.errors import CheckpointError, RequestError
from safetensors.torch import load_file, save_file

from ..conftest import ROOT

MINI = ROOT / "models" / "hywu-mini" / "backbone"
FORMATS = ("fp8", "int8", "int4")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def raw(entry) -> bytes:
    with open(entry.file, "rb") as handle:
        handle.seek(entry.offset)
        return handle.read(entry.nbytes)


def unpacked(weight) -> torch.Tensor:
    fields = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in weight.codec.fields(weight.shape).items()}
    read_packed(weight, fields)
    return weight.codec.unpack(fields, torch.empty(weight.shape))


@pytest.mark.parametrize("format", FORMATS)
def test_projections_are_packed_all_else_is_as_it_was(tmp_path, format):
    ticks = []
    manifest = convert(MINI, tmp_path / "out", format, lambda *tick: ticks.append(tick))
    source, packed = open_shards(MINI), find_packed(open_shards(tmp_path / "out"))
    stored = load_file(MINI / "model.safetensors")
    seen = set()
    for (module, parameter), weight in packed.weights.items():
        names = [f"{module}.{parameter}"]
        if parameter != "weight":
            names = [f"{module}.{expert}.{parameter}.weight" for expert in range(4)]
        seen |= set(names)
        wanted = torch.stack([stored[name].float() for name in names]) if len(weight.shape) == 3 else stored[names[0]].float()
        error = float((unpacked(weight) - wanted).norm() / wanted.norm())
        stored_module = weight.names["weight"].removesuffix(".weight")
        assert error == pytest.approx(manifest["weight_error"][stored_module], rel=1e-3)
        assert error < {"fp8": 0.027, "int8": 0.0075, "int4": 0.074}[format] and weight.codec.format == format
    assert len(packed.weights) == len(manifest["weight_error"]) == 4 * 6
    assert packed.plain.entries.keys() == source.entries.keys() - seen
    for name, entry in packed.plain.entries.items():
        assert entry.dtype == source.entries[name].dtype and entry.shape == source.entries[name].shape
        assert raw(entry) == raw(source.entries[name]), name
    assert backbone_fingerprint(packed.plain) == manifest["source_fingerprint"] == backbone_fingerprint(source)
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "system_prompt.py"):
        assert (tmp_path / "out" / file).read_bytes() == (MINI / file).read_bytes()
    done = [tick[0] for tick in ticks]
    assert done == sorted(done) and done[0] == 0 and ticks[-1][0] == ticks[-1][1]


def test_the_manifest_says_what_is_there_and_other_readers_can_open_it(tmp_path):
    convert(MINI, tmp_path / "out", "int4")
    manifest = json.loads((tmp_path / "out" / "hywu_manifest.json").read_text())
    assert manifest["complete"] and manifest["format"] == "int4" and manifest["version"] == 1
    files = contents(tmp_path / "out")
    assert manifest["files"].keys() == files.keys() - {"hywu_manifest.json"}
    for name, said in manifest["files"].items():
        assert said == {"bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
    index = json.loads(files["model.safetensors.index.json"])["weight_map"]
    for shard in set(index.values()):
        tensors = load_file(tmp_path / "out" / shard)  # the library wants every tensor at a multiple of its item size
        assert tensors.keys() == {name for name, where in index.items() if where == shard}
    said = json.loads(bytes(load_file(tmp_path / "out" / index["model.layers.0.mlp.experts_down_proj.comfy_quant"])
                            ["model.layers.0.mlp.experts_down_proj.comfy_quant"].tolist()))
    assert said == {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 16, "num_experts": 4}


def test_what_a_format_cannot_hold_is_copied(tmp_path, tiny_folders):
    source = tmp_path / "source"
    shutil.copytree(tiny_folders[0], source)
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith("down_proj.weight") and ".experts." in name]:
        tensors[name] = tensors[name][:, :12].contiguous()
    save_file(tensors, source / "model.safetensors")
    convert(source, tmp_path / "out", "int4")
    packed = find_packed(open_shards(tmp_path / "out"))
    assert ("model.layers.0.mlp.experts", "down_proj") not in packed.weights
    assert "model.layers.0.mlp.experts.1.down_proj.weight" in packed.plain.entries
    assert ("model.layers.0.mlp.experts", "gate_and_up_proj") in packed.weights


class Cancelled(Exception):
    pass


def cancel_after(count: int):
    seen = []

    def tick(*now):
        seen.append(now)
        if len(seen) > count:
            raise Cancelled

    return tick


@pytest.mark.parametrize("after", [0, 1, 40, 150])
def test_a_cancel_leaves_no_part_of_a_file_and_the_next_run_goes_on(tmp_path, tiny_folders, after):
    out = tmp_path / "out"
    with pytest.raises(Cancelled):
        convert(tiny_folders[0], out, "fp8", cancel_after(after))
    assert not list(out.glob(".*")) and not (out / "model.safetensors.index.json").exists()
    before = {file.name: file.stat().st_ino for file in out.glob("*.safetensors")}
    if before:
        with pytest.raises(CheckpointError, match="`hywu convert` was stopped before its end: run the same line again"):
            open_shards(out)
    convert(tiny_folders[0], out, "fp8")
    assert all((out / name).stat().st_ino == inode for name, inode in before.items())
    convert(tiny_folders[0], tmp_path / "whole", "fp8")
    assert contents(out) == contents(tmp_path / "whole")


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import conftest
from comfyui_hywu.hywu_core.checkpoint.convert import convert
from comfyui_hywu.hywu_core.checkpoint.shard_file import ShardFile
copy = ShardFile.copy
def copy_or_die(self, name, *rest):
    if name.startswith("model.layers.1."):
        os.kill(os.getpid(), signal.SIGKILL)
    copy(self, name, *rest)
ShardFile.copy = copy_or_die
convert({source!r}, {out!r}, "int8")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_after_a_kill_the_finished_shards_are_kept(tmp_path, tiny_folders):
    out = tmp_path / "out"
    program = KILLED.format(tests=str(ROOT / "tests"), source=str(tiny_folders[0]), out=str(out))
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    assert len(list(out.glob(".hywu-*.part"))) == 1
    first = out / "model-00001-of-00003.safetensors"
    inode = first.stat().st_ino
    convert(tiny_folders[0], out, "int8")
    assert first.stat().st_ino == inode and not list(out.glob(".*"))
    convert(tiny_folders[0], tmp_path / "whole", "int8")
    assert contents(out) == contents(tmp_path / "whole")


def test_a_damaged_shard_is_written_again_and_a_whole_folder_is_left_alone(tmp_path, tiny_folders):
    out = tmp_path / "out"
    convert(tiny_folders[0], out, "fp8")
    before = {file.name: file.stat().st_ino for file in out.glob("*.safetensors")}
    whole = contents(out)
    damaged = bytearray(whole["model-00002-of-00003.safetensors"])
    damaged[-1] ^= 1
    (out / "model-00002-of-00003.safetensors").write_bytes(damaged)
    convert(tiny_folders[0], out, "fp8")
    assert contents(out) == whole
    kept = {name for name, inode in before.items() if (out / name).stat().st_ino == inode}
    assert kept >= {"model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"}


def test_what_other_commands_left_beside_the_index_is_not_copied(tmp_path, tiny_folders):
    source = shutil.copytree(tiny_folders[0], tmp_path / "source")
    (source / "hywu_fingerprint.json").write_text("{}")
    convert(source, tmp_path / "out", "fp8")
    assert (tmp_path / "out" / "config.json").is_file() and not (tmp_path / "out" / "hywu_fingerprint.json").exists()


def test_folders_with_something_else_are_refused(tmp_path, tiny_folders):
    source, out = tiny_folders[0], tmp_path / "out"
    with pytest.raises(RequestError, match="holds something that `hywu convert` did not write"):
        convert(source, source, "fp8")
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="is a file"):
        convert(source, tmp_path / "file", "fp8")
    convert(source, out, "fp8")
    before = contents(out)
    with pytest.raises(RequestError, match="holds a conversion with format 'fp8', this one has 'int8'"):
        convert(source, out, "int8")
    with pytest.raises(RequestError, match="holds a conversion with source_fingerprint .*this one has"):
        convert(MINI, out, "fp8")
    with pytest.raises(CheckpointError, match="is packed already: convert the published bf16 folder"):
        convert(out, tmp_path / "again", "int8")
    assert contents(out) == before and not (tmp_path / "again").exists()


def test_sources_that_are_no_whole_backbone_are_refused(tmp_path, tiny_folders):
    with pytest.raises(RequestError, match="cannot convert to 'bf16': choose one of fp8, int8, int4"):
        convert(tiny_folders[0], tmp_path / "out", "bf16")
    with pytest.raises(CheckpointError, match="is a weight generator: only backbones can be converted"):
        convert(ROOT / "models" / "hywu-mini" / "generator", tmp_path / "out", "int8")
    with pytest.raises(CheckpointError, match="holds no config.json"):
        convert(tmp_path, tmp_path / "out", "int8")
    source = tmp_path / "source"
    shutil.copytree(tiny_folders[0], source)
    stored = load_file(source / "model.safetensors")

    def with_tensors(tensors):
        save_file(tensors, source / "model.safetensors")
        return source

    lost = "model.layers.1.mlp.experts.0.down_proj.weight"
    with pytest.raises(CheckpointError, match="would stack experts 1 to .* expected all in one"):
        convert(with_tensors({name: tensor for name, tensor in stored.items() if name != lost}), tmp_path / "out", "int8")
    with pytest.raises(CheckpointError, match="config.json has 2 layers, the files hold 1"):
        convert(with_tensors({name: tensor for name, tensor in stored.items() if "layers.1." not in name or "vision" in name}),
                tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()
    damaged = stored | {lost: stored[lost].clone()}
    damaged[lost][3, 3] = torch.nan
    with pytest.raises(CheckpointError, match=f"'{lost}'.* has NaN or Inf in 1 of"):
        convert(with_tensors(damaged), tmp_path / "out", "int8")


def test_a_disk_that_is_too_small_is_an_error_with_both_numbers(tmp_path, tiny_folders, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shard_file_module.shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(RequestError, match=r"out: \d{7} bytes are needed, 1000 are free: make room"):
        convert(tiny_folders[0], tmp_path / "out", "fp8")
    monkeypatch.undo()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RequestError, match="cannot write .*bytes"):
        convert(tiny_folders[0], tmp_path / "out", "fp8")
    assert not any(file.suffix == ".part" or file.suffix == ".safetensors" for file in (tmp_path / "out").iterdir())


def test_from_the_command_line(tmp_path, tiny_folders, capsys):
    out = tmp_path / "out"
    assert main(["convert", str(tiny_folders[0]), str(out), "--format", "int8"]) == 0
    said = capsys.readouterr()
    assert str(out) in said.out and "int8" in said.out and "12 weights quantised, relative error 0." in said.out
    assert "convert" in said.err
    assert main(["convert", str(tiny_folders[0]), str(out), "--format", "int4"]) == 1
    assert "give the name of a new folder" in capsys.readouterr().err


LAYERS, EXPERTS, SHARDS, SHAPE = 6, 12, 3, (2048, 1024)  # 50 MB a layer in bf16, 302 MB in all
MEASURE = """
import sys
sys.path.insert(0, {tests!r})
import conftest
import torch
from pathlib import Path
from comfyui_hywu.hywu_core.checkpoint import convert as module
from comfyui_hywu.hywu_core.checkpoint.formats import codec

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

codec({format!r}, (16, 16)).pack(torch.zeros(16, 16))  # comfy-kitchen is imported
open("/proc/self/clear_refs", "w").write("5")
before = peak()
module.convert(Path({source!r}), Path({out!r}), {format!r})
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux' peak memory counter")
@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_peak_memory_is_that_of_a_few_matrices_not_of_shards(tmp_path, tiny_folders, format):
    source = tmp_path / "source"
    source.mkdir()
    config = json.loads((tiny_folders[0] / "config.json").read_text()) | {"num_hidden_layers": LAYERS}
    (source / "config.json").write_text(json.dumps(config))
    matrix = torch.randn(SHAPE).mul_(0.02).bfloat16()
    names = [f"model.layers.{layer}.mlp.experts.{expert}.gate_and_up_proj.weight"
             for layer in range(LAYERS) for expert in range(EXPERTS)]
    weight_map = {}
    for shard in range(SHARDS):
        tensors = {name: matrix.clone() for name in names[shard::SHARDS]} | (
            {} if shard else {"model.ln_f.weight": torch.ones(8)})
        save_file(tensors, source / f"{shard}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"{shard}.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    program = MEASURE.format(tests=str(ROOT / "tests"), source=str(source), out=str(tmp_path / "out"), format=format)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    layer, shard = EXPERTS * matrix.nbytes, LAYERS * EXPERTS * matrix.nbytes // SHARDS
    print(f"{format}: {int(done.stdout) / 1e6:.0f} MB, a matrix has {matrix.nbytes / 1e6:.0f} MB")
    assert int(done.stdout) < 2 * shard + layer < LAYERS * layer
