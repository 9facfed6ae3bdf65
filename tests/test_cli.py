"""The command line as a user types it: what it writes, what it refuses, and its exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest
from comfyui_hywu.hywu_core.cli import main
from comfyui_hywu.hywu_core.errors import RequestError
from comfyui_hywu.hywu_core.picture_file import save_picture
from PIL import Image

THOUGHT = "<recaption>a bright picture</recaption>"


@pytest.fixture
def files(tmp_path, photo, tiny_folders):
    path = tmp_path / "photo.png"
    photo.save(path)
    models = ["--model", str(tiny_folders[0]), "--generator", str(tiny_folders[1])]
    return path, tmp_path / "out.png", models


def test_edit_writes_a_picture_and_a_lora_that_can_be_used_again(files, capsys):
    photo, out, models = files
    lora, again = out.with_name("l.safetensors"), out.with_name("again.png")
    common = ["--thinking", THOUGHT, "--steps", "2"]
    assert main(["edit", str(photo), "-o", str(out), "make it brighter", *models, *common, "--save-lora", str(lora)]) == 0
    first = Image.open(out)
    assert first.mode == "RGB" and str(out) in capsys.readouterr().out
    reuse = ["--model", models[1], "--lora", str(lora), *common]
    assert main(["edit", str(photo), "make it brighter", "-o", str(again), *reuse]) == 0
    assert first.tobytes() == Image.open(again).tobytes()
    assert main(["edit", str(photo), "make it brighter", "-o", str(again), *reuse[:2], "--no-lora", *common]) == 0
    assert first.tobytes() != Image.open(again).tobytes()


def test_think_prints_the_text(files, capsys):
    photo, _, models = files
    assert main(["think", str(photo), "brighter", "--model", models[1], "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("<think>")


def test_inspect_describes_all_three_kinds(files, tiny_folders, tmp_path, capsys):
    photo, out, models = files
    lora = tmp_path / "l.safetensors"
    main(["edit", str(photo), "brighter", "-o", str(out), *models, "--thinking", "", "--steps", "1", "--save-lora", str(lora)])
    capsys.readouterr()
    for path, wanted in ((tiny_folders[0], "model.layers"), (tiny_folders[1], "mlp.experts.w2"), (lora, "'brighter'")):
        assert main(["inspect", str(path)]) == 0
        text = capsys.readouterr().out
        assert wanted in text and ("fingerprint" in text or "backbone" in text)


@pytest.mark.parametrize("arguments, status, words", (
    (["edit", "nowhere.png", "brighter", "-o", "x.png"], 1, "nowhere.png"),
    (["edit", "brighter", "-o", "x.what"], 1, "picture format"),
    (["edit", "brighter", "-o", "/no/such/folder/x.png"], 1, "/no/such/folder"),
    (["inspect", "/no/such/thing"], 1, "/no/such/thing"),
    (["paint"], 2, "usage"), ([], 2, "usage")))
def test_refusals_say_why(arguments, status, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == status
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_picture_without_an_instruction_is_a_usage_error(files, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["edit", str(files[0]), "-o", str(files[1])])
    assert caught.value.code == 2 and "what is to be done" in capsys.readouterr().err


def test_a_failed_save_leaves_neither_the_file_nor_a_part_of_it(files, monkeypatch, capsys):
    photo, out, models = files

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert main(["edit", str(photo), "brighter", "-o", str(out), *models, "--thinking", "", "--steps", "1"]) == 1
    assert "No space left" in capsys.readouterr().err
    assert sorted(path.name for path in out.parent.iterdir()) == ["photo.png"]


def test_help_is_quick():
    """Help and wrong arguments must not import torch."""
    root = Path(__file__).resolve().parent.parent
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('p', {str(root / '__init__.py')!r}, "
        f"submodule_search_locations=[{str(root)!r}])\n"
        "sys.modules['p'] = importlib.util.module_from_spec(spec)\n"
        "from p.hywu_core.cli import main\n"
        "assert main(['--help']) == 0 and 'torch' not in sys.modules\n")
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("extra", "says"), [
    (["--device", "nonsense"], "device 'nonsense'"),
    (["--device", ""], "device ''"),
    (["--device", "meta"], "holds no values"),
    (["--seed", str(2**70)], "out of range"),
    (["--steps", "0"], "0 steps"),
    (["--strength", "nan"], "strength nan"),
    (["--size", "0x0"], "0 x 0"),
    (["--model", "{photo}"], "cannot be read"),
    (["-o", "{folder}/out.psd"], "names no picture format"),
    (["-o", "{folder}/folder.png"], "is a folder"),
    (["-o", "{folder}/a\0.png"], "NUL"),
    (["--save-lora", "{folder}/none/l.safetensors"], "is not there"),
    (["--save-lora", "{folder}/l.safetensors", "--no-lora"], "--save-lora"),
    (["--save-lora", "{folder}/l.lora"], "ends in .safetensors"),
    (["-o", "{folder}/" + 300 * "x" + ".png"], "File name too long"),
])
def test_a_bad_request_is_one_line_before_any_work(files, capsys, monkeypatch, extra, says):
    photo, out, models = files
    (out.parent / "folder.png").mkdir()
    monkeypatch.setattr("comfyui_hywu.hywu_core.edit.think", lambda *_, **__: pytest.fail("it thought first"))
    extra = [text.format(photo=photo, folder=out.parent) for text in extra]
    assert main(["edit", str(photo), "brighter", "-o", str(out), *models, *extra]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("hywu: ") and says in last
    assert not out.exists()


def test_a_long_prompt_without_a_picture_is_no_file_name(files, capsys):
    _, out, models = files
    quick = ["--thinking", "", "--steps", "1", "--size", "1:1"]
    assert main(["edit", "a photo of a red house " * 30, "-o", str(out), *models, *quick]) == 0
    assert out.exists()


def test_a_folder_that_vanished_meanwhile_is_a_request_error(tmp_path):
    with pytest.raises(RequestError, match="could not be written"):
        save_picture(Image.new("RGB", (8, 8)), tmp_path / "gone" / "out.png")


@pytest.mark.parametrize("command", [["inspect", "{name}"], ["lora", "save-as", "{name}", "o.safetensors"],
                                     ["lora", "export", "{name}", "o"], ["map", "{name}", "-o", "m.png"]])
def test_names_that_no_file_can_have_are_one_line(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = 300 * "x" + ".safetensors"
    assert main([part.format(name=name) for part in command]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("hywu: ") and "Traceback" not in "".join(lines) and not list(tmp_path.iterdir())


def test_bytes_that_are_no_text_are_refused(files, capsys):
    photo, out, models = files
    assert main(["edit", str(photo), "a\udc80b", "-o", str(out), *models, "--thinking", ""]) == 1
    assert "no text" in capsys.readouterr().err
