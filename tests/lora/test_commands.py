"""``hywu lora ...`` and ``hywu inspect`` on LoRA files, as a user types them."""

import shutil
from pathlib import Path

import pytest
import torch
from comfyui_hywu.hywu_core.cli import main
from comfyui_hywu.hywu_core.lora.files import load_lora, read_summary, save_lora
from comfyui_hywu.hywu_core.lora.spectrum import compare
from comfyui_hywu.tests.lora.test_peft import make_lora
from PIL import Image
from safetensors.torch import load_file, save_file


@pytest.fixture
def saved(tmp_path) -> Path:
    return save_lora(make_lora(), tmp_path / "a.safetensors", picture=Image.new("RGB", (40, 30), "red")).path


def test_save_as_writes_another_form_and_says_the_error(saved, tmp_path, capsys):
    out = tmp_path / "b.safetensors"
    assert main(["lora", "save-as", str(saved), str(out), "--stored", "fp8", "--keep", "0.6"]) == 0
    text = capsys.readouterr().out
    summary = read_summary(out)
    assert str(out) in text and f"{summary.error:.3%}" in text and "of 6 experts kept" in text
    assert (summary.form.stored, summary.thumbnail is not None) == ("fp8", True)
    assert summary.provenance == read_summary(saved).provenance
    assert main(["inspect", str(out)]) == 0
    text = capsys.readouterr().out
    assert "stored fp8" in text and f"{summary.error:.3%}" in text and "of 6 experts kept" in text and summary.digest in text
    assert f"thumbnail {len(summary.thumbnail)} bytes" in text and "made" not in text


def test_inspect_reads_no_values_where_the_header_says_all(saved, capsys):
    header_end = 8 + int.from_bytes(saved.read_bytes()[:8], "little")
    digest = read_summary(saved).digest
    with open(saved, "r+b") as file:  # NaN everywhere
        file.seek(header_end)
        file.write(b"\xff" * (saved.stat().st_size - header_end))
    assert main(["inspect", str(saved)]) == 0
    assert digest in capsys.readouterr().out


def test_inspect_computes_a_digest_that_the_header_has_not(tmp_path, capsys):
    path = save_lora(make_lora(), tmp_path / "plain.safetensors").path
    assert read_summary(path).digest is None
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert make_lora().digest in text and "thumbnail none" in text and "stored as it is" in text


def test_inspect_is_inert(tmp_path, capsys):
    from comfyui_hywu.hywu_core.lora.value import LoRA, Provenance

    nasty = "\x1b[31m<script>alert(1)</script>\n" * 100_000
    origin = Provenance(nasty[:200], nasty[:200], nasty, nasty, made=nasty)
    lora = LoRA.from_tensors(make_lora().tensors, 1, origin, rank_weights=(2.0,) * 4)
    assert main(["inspect", str(save_lora(lora, tmp_path / "x.safetensors").path)]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text and len(text) < 20_000 and "weights of the ranks [2.0, 2.0" in text and "  made: '" in text


def test_a_fingerprint_of_megabytes_is_refused_in_one_short_line(tmp_path, capsys):
    from comfyui_hywu.hywu_core.lora.value import LoRA, Provenance

    lora = LoRA.from_tensors(make_lora().tensors, 1, Provenance("F" * 10_000_000))
    assert main(["inspect", str(save_lora(lora, tmp_path / "x.safetensors").path)]) == 1
    text = capsys.readouterr().err
    assert "backbone_fingerprint has 10000000 characters, expected at most 200" in text and len(text) < 1000


def test_map_prints_no_escapes_and_no_lines_of_a_files_own(tmp_path, capsys):
    from comfyui_hywu.hywu_core.lora.value import LoRA, Provenance

    for number, text in enumerate(("fine", "\x1b[31mRED\nfake line" + "x" * 1_000_000)):
        save_lora(LoRA.from_tensors(make_lora().tensors, 1 + number, Provenance("b", instruction=text)),
                  tmp_path / f"{number}.safetensors")
    assert main(["map", str(tmp_path), "-o", str(tmp_path / "map.png")]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\nfake" not in said and "fine" in said and len(said) < 3000


def test_export_and_import(saved, tmp_path, capsys):
    folder, out = tmp_path / "peft", tmp_path / "back.safetensors"
    assert main(["lora", "export", str(saved), str(folder)]) == 0
    assert str(folder) in capsys.readouterr().out
    assert main(["lora", "import", str(folder), str(out)]) == 0
    assert load_lora(out).digest == load_lora(saved).digest
    assert main(["lora", "export", str(saved), str(folder)]) == 1
    assert "there already" in capsys.readouterr().err


def test_import_of_a_part_with_the_models_folder(saved, tmp_path, tiny_folders, capsys):
    from comfyui_hywu.hywu_core.config import BackboneConfig
    from comfyui_hywu.hywu_core.lora.targets import adapted

    folder, out = tmp_path / "peft", tmp_path / "part.safetensors"
    sizes = adapted(BackboneConfig.from_folder(tiny_folders[0]))
    whole = save_lora(make_lora(sizes=sizes), tmp_path / "whole.safetensors").path
    main(["lora", "export", str(whole), str(folder)])
    weights = folder / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(weights).items() if "experts" not in key}, weights)
    assert main(["lora", "import", str(folder), str(out)]) == 1
    assert "name that model" in capsys.readouterr().err and not out.exists()
    assert main(["lora", "import", str(folder), str(out), "--model", str(tiny_folders[0]), "--keep", "0.9999"]) == 0
    assert "1 of " in capsys.readouterr().out
    back = load_lora(out)
    assert back.targets == sizes.targets and not back.tensors["model.layers.0.mlp.experts.w1.lora_B"].any()
    assert torch.equal(back.tensors["model.layers.1.self_attn.o_proj.lora_B"],
                       make_lora(sizes=sizes).tensors["model.layers.1.self_attn.o_proj.lora_B"])


def test_extract(tmp_path, tiny_folders, capsys):
    from comfyui_hywu.tests.lora.test_extract import tuned

    out = tmp_path / "x.safetensors"
    other = tuned(tiny_folders[0], tmp_path / "tuned", rank=2, also="model.ln_f.weight")
    folders = [str(tiny_folders[0]), str(other)]
    assert main(["lora", "extract", *folders, "-o", str(out), "--rank", "2", "--stored", "bfloat16"]) == 0
    text = capsys.readouterr().out
    assert "at rank 2" in text and "model.ln_f.weight" in text and load_lora(out).rank == 2
    assert compare(load_lora(out), load_lora(out)).cosine == pytest.approx(1)


@pytest.mark.parametrize("arguments, status, words", [
    (["lora"], 2, "usage: hywu lora {save-as,export,import,extract}"), (["lora", "paint"], 2, "usage: hywu lora"),
    (["lora", "save-as", "no.safetensors", "x.safetensors"], 1, "no.safetensors"),
    (["lora", "save-as", "a.safetensors", "x.bin"], 1, "ends in .safetensors"),
    (["lora", "save-as", "a.safetensors", "no/x.safetensors"], 1, "does not exist"),
    (["lora", "save-as", "a.safetensors", "x.safetensors", "--keep", "2"], 1, "2 of the experts' energy"),
    (["lora", "import", ".", "x.safetensors"], 1, "no PEFT folder"),
    (["lora", "extract", ".", ".", "-o", "x.safetensors"], 1, "config.json")])
def test_refusals_say_why(saved, tmp_path, monkeypatch, capsys, arguments, status, words):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == status
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_help_is_not_an_error(capsys):
    assert main(["lora", "--help"]) == 0
    assert "save-as" in capsys.readouterr().out


def test_a_damaged_file_is_refused_whole(saved, tmp_path, capsys):
    shutil.copy(saved, tmp_path / "b.safetensors")
    (tmp_path / "b.safetensors").write_bytes(saved.read_bytes()[:-5])
    assert main(["lora", "save-as", str(tmp_path / "b.safetensors"), str(tmp_path / "c.safetensors")]) == 1
    assert "cut off" in capsys.readouterr().err and not (tmp_path / "c.safetensors").exists()
