"""``hywu train`` as a user types it: from a folder of photos to a checkpoint that edits, once and not twice."""

import json
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from comfyui_hywu.hywu_core.cli import main
from comfyui_hywu.hywu_core.generator.handle import load_generator
from comfyui_hywu.hywu_core.handle import load_model
from comfyui_hywu.hywu_core.training import loop
from PIL import Image
from safetensors.torch import load_file

# As the shipped "smoke", but for seconds: one edit that changes everything is learnt at once.
RECIPE = {
    "edits": ["darken", "invert"],
    "data": {"grids": {"6x6": 0.5, "5x7": 0.5}, "crops_per_photo": 20, "validation": 0.1, "weights": {}},
    "base_stage": {"steps": 8, "batch": 6, "rate": 0.002, "warmup": 2},
    "generator_stage": {"steps": 80, "batch": 4, "rate": 0.0006, "warmup": 5, "sample_every": 100}}
THOUGHT = "<think>make it inverted , it is dark .</think><recaption>a inverted photo of a dark red scene</recaption>"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, photo_folder):
    """The command line's arguments, the run's folder, and the exit code of the first run."""
    folder = tmp_path_factory.mktemp("command")
    recipe = folder / "few.json"
    recipe.write_text(json.dumps(RECIPE))
    command = ["train", str(recipe), "--photos", str(photo_folder), "--run", str(folder / "run")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "LOG_EVERY", 1)  # so that a short run has a curve
        code = main(command)
    return SimpleNamespace(command=command, run=folder / "run", code=code)


def lines(run, stage: str) -> list[dict]:
    return [json.loads(line) for line in (run / f"{stage}.jsonl").read_text().splitlines()]


def test_the_losses_fall(trained):
    assert trained.code == 0
    for stage, steps, least in (("base", 8, 0.6), ("generator", 80, 0.2)):
        losses = [line["loss"] for line in lines(trained.run, stage)]
        assert len(losses) == steps
        third = steps // 3
        # In nats: for the generator 0.2 is a fifth off the mean squared error of the pictures.
        assert sum(losses[:third]) / third - sum(losses[-third:]) / third > least, stage


def test_the_run_folder_holds_what_it_should(trained):
    names = {path.name for path in trained.run.iterdir()}
    assert {"recipe.json", "crops.npz", "vae.safetensors", "texts", "base.state.safetensors", "generator.state.safetensors",
            "base.jsonl", "generator.jsonl", "samples", "checkpoint"} == names
    assert Image.open(trained.run / "samples" / "generator-000080.png").size == (2 * 100, 3 * 100)


def test_the_checkpoint_is_taken_by_the_ordinary_loader(trained):
    model = load_model(trained.run / "checkpoint" / "backbone", dtype=torch.float32)
    generator = load_generator(trained.run / "checkpoint" / "generator", dtype=torch.float32)
    assert generator.config.input_dim == model.config.hidden_size
    kept = load_file(trained.run / "generator.state.safetensors")
    for name, parameter in generator.model.named_parameters():
        torch.testing.assert_close(parameter, kept[name], rtol=1e-3, atol=1e-4)
    assert kept["model.proj_out_B.weight"].any()


def test_the_checkpoint_edits(trained, test_photos, tmp_path):
    folder, made = trained.run / "checkpoint", {}
    for name, extra in (("with", []), ("without", ["--no-lora"])):
        out = tmp_path / f"{name}.png"
        assert main(["edit", str(test_photos[0]), "invert the colors", "-o", str(out), "--model", str(folder / "backbone"),
                     "--generator", str(folder / "generator"), "--thinking", THOUGHT, "--steps", "1",
                     "--size", "192x192", *extra]) == 0
        made[name] = Image.open(out)
    assert made["with"].size == (192, 192) and made["with"].tobytes() != made["without"].tobytes()


def test_the_same_command_again_does_no_step_twice(trained, capsys, monkeypatch):
    logs = {stage: (trained.run / f"{stage}.jsonl").read_bytes() for stage in ("base", "generator")}
    weights = (trained.run / "checkpoint" / "generator" / "model.safetensors").read_bytes()
    monkeypatch.setattr(loop.Stage, "_one", lambda *_: pytest.fail("a step was done again"))
    monkeypatch.setattr("comfyui_hywu.hywu_core.training.photos.cut", lambda *_: pytest.fail("photos were cut again"))
    assert main(trained.command) == 0
    assert capsys.readouterr().out.strip() == str(trained.run / "checkpoint")
    assert all((trained.run / f"{stage}.jsonl").read_bytes() == log for stage, log in logs.items())
    assert (trained.run / "checkpoint" / "generator" / "model.safetensors").read_bytes() == weights


def test_another_recipe_in_the_same_folder_is_refused(trained, tmp_path, capsys):
    other = deepcopy(RECIPE)
    other["generator_stage"]["rate"] = 0.0005
    path = tmp_path / "other.json"
    path.write_text(json.dumps(other))
    before = (trained.run / "recipe.json").read_bytes()
    for command in (["train", str(path), *trained.command[2:]], [*trained.command, "--seed", "3"]):
        assert main(command) == 1
        error = capsys.readouterr().err.strip()
        assert error.startswith("hywu: ") and "another recipe" in error and "\n" not in error
    assert (trained.run / "recipe.json").read_bytes() == before


@pytest.mark.parametrize("recipe, photos, words", (
    ("maxi", "{photos}", "there is no recipe 'maxi': give one of"), ("smoke", "{folder}/nowhere", "nowhere is no folder"),
    ("smoke", "{folder}", "holds 0 pictures")))
def test_refusals_are_one_line(recipe, photos, words, photo_folder, tmp_path, capsys):
    photos = photos.format(photos=photo_folder, folder=tmp_path)
    assert main(["train", recipe, "--photos", photos, "--run", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err.strip()
    assert words in error and len(error.splitlines()) == 1


def test_a_device_that_is_not_there_is_refused_before_any_work(photo_folder, tmp_path, capsys):
    assert main(["train", "smoke", "--photos", str(photo_folder), "--run", str(tmp_path / "run"), "--device", "nonsense"]) == 1
    assert "device 'nonsense'" in capsys.readouterr().err and not (tmp_path / "run").exists()
