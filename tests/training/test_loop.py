"""The training loop: a run that was stopped goes on bit for bit, its state is whole, and what cannot go on is refused."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from comfyui_hywu.hywu_core.errors import RequestError
from comfyui_hywu.hywu_core.training.generator_stage import train_generator
from comfyui_hywu.hywu_core.training.loop import Stage
from comfyui_hywu.hywu_core.training.recipe import StageSettings
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

SETTINGS = StageSettings(steps=12, batch=2, rate=0.05, warmup=3, sample_every=5)


class Toy:
    """A little network that learns a rule from noise; ``run`` trains it in a folder from its start or from the state there."""

    def __init__(self, folder, settings=SETTINGS, name="toy", masks=None):
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
        parameters = dict(self.network.named_parameters())
        self.stage = Stage(
            name, folder, settings, 7, parameters, {parameters[key]: mask for key, mask in (masks or {}).items()})
        self.lost = []

    def step(self, draws):
        x = torch.randn(16, 4, generator=draws.torch) + draws.numpy.normal() + draws.choose.random()
        loss = (self.network(x) - x[:, :1].tanh()).square().mean()
        self.lost.append(loss.item())
        return loss, {"twice": 2 * loss.item()}

    def run(self, **more):
        self.stage.run(self.step, **more)
        return self


def stopping_at(step: int, error: type[BaseException]):
    def on_tick(done, total, latent):
        if done == step:
            raise error
    return on_tick


def test_training_learns(tmp_path):
    lost = Toy(tmp_path, replace(SETTINGS, steps=150)).run().lost
    assert sum(lost[-20:]) < 0.5 * sum(lost[:20])


@pytest.mark.parametrize("error", (KeyboardInterrupt, RuntimeError))
@pytest.mark.parametrize("step", (1, 5, 11))
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, error, step):
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = Toy(tmp_path / "whole").run()
    first = Toy(tmp_path / "stopped")
    with pytest.raises(error):
        first.run(on_tick=stopping_at(step, error))
    second = Toy(tmp_path / "stopped").run()
    assert first.lost + second.lost == whole.lost
    states = [load_file(tmp_path / name / "toy.state.safetensors") for name in ("whole", "stopped")]
    assert states[0].keys() == states[1].keys() and len(states[0]) == 3 * 4
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_the_generator_stage_goes_on_bit_for_bit(small_run, one_edit, copying, start, tmp_path):
    recipe = replace(small_run.recipe, generator_stage=StageSettings(steps=4, batch=2, rate=1e-3, warmup=2))

    def trained(folder, on_tick):
        folder.mkdir(exist_ok=True)
        generator = deepcopy(start[0])
        train_generator(copying, generator, start[1], small_run.train, one_edit, recipe, folder,
                        torch.autocast("cpu", enabled=False), on_tick)
        return generator.state_dict()

    whole = trained(tmp_path / "whole", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped", stopping_at(2, KeyboardInterrupt))
    gone_on = trained(tmp_path / "stopped", lambda *_: None)
    assert [key for key in whole if not torch.equal(whole[key], gone_on[key])] == []
    assert not torch.equal(whole["model.proj_out_B.weight"], start[0].model.proj_out_B.weight)


def test_the_state_is_whole_after_a_cancel(tmp_path):
    toy = Toy(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        toy.run(on_tick=stopping_at(5, KeyboardInterrupt))
    assert [path.name for path in tmp_path.glob("toy*")] == ["toy.state.safetensors"]
    with safe_open(tmp_path / "toy.state.safetensors", "pt") as file:
        assert file.metadata()["step"] == "5"
        kept = {name: file.get_tensor(name) for name in file.keys()}
    assert all(torch.equal(kept[name], value) for name, value in toy.network.state_dict().items())
    assert all(torch.isfinite(value).all() for value in kept.values())


def test_a_step_that_fails_costs_none_of_those_before(tmp_path):
    toy = Toy(tmp_path)

    def step(draws):
        if len(toy.lost) == 3:
            raise MemoryError
        return toy.step(draws)

    with pytest.raises(MemoryError):
        toy.stage.run(step)
    (tmp_path / "whole").mkdir()
    assert Toy(tmp_path).run().lost == Toy(tmp_path / "whole").run().lost[3:]


def test_a_state_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        Toy(tmp_path).run(on_tick=stopping_at(2, KeyboardInterrupt))
    before = (tmp_path / "toy.state.safetensors").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(RequestError, match="No space left"):
        patch.setattr("os.fsync", full)
        Toy(tmp_path).run(on_tick=stopping_at(4, KeyboardInterrupt))
    assert (tmp_path / "toy.state.safetensors").read_bytes() == before and not list(tmp_path.glob("*.part"))


def test_a_disk_that_refuses_the_weights_is_a_request_error(tmp_path):
    toy = Toy(tmp_path)
    toy.stage.folder = tmp_path / "gone"
    with pytest.raises(RequestError, match="could not be written"):
        toy.stage.save()


def test_a_finished_stage_does_no_step_again(tmp_path):
    done = Toy(tmp_path).run()
    ticks = []
    again = Toy(tmp_path).run(on_tick=lambda *tick: ticks.append(tick))
    assert again.lost == [] and ticks == [(12, 12, None)]
    assert all(torch.equal(one, two) for one, two in zip(done.network.parameters(), again.network.parameters(), strict=True))
    assert not any(value.requires_grad for value in again.network.parameters())


def test_a_state_of_other_parameters_is_refused(tmp_path):
    Toy(tmp_path).run()
    wider = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1), nn.Linear(1, 1))
    names = dict(wider.named_parameters())
    with pytest.raises(RequestError, match=r"lacks 2 of 6 parameters \(3.bias\).*another recipe"):
        Stage("toy", tmp_path, SETTINGS, 7, names).load()
    names = {name: value for name, value in names.items() if not name.startswith("3")}
    with pytest.raises(RequestError, match=r"0.weight is \(5, 4\), expected \(6, 4\).*another recipe"):
        Stage("toy", tmp_path, SETTINGS, 7, names).load()


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_a_loss_that_is_not_finite_is_refused_and_the_steps_before_are_kept(tmp_path, value):
    toy = Toy(tmp_path)

    def step(draws):
        loss, numbers = toy.step(draws)
        return (loss * value if len(toy.lost) == 4 else loss), numbers

    with pytest.raises(RequestError, match=r"toy step 3: .*lower 'rate' \(0.05\)"):
        toy.stage.run(step)
    with safe_open(tmp_path / "toy.state.safetensors", "pt") as file:
        assert file.metadata()["step"] == "3"
        assert all(torch.isfinite(file.get_tensor(name)).all() for name in file.keys())


def test_masked_values_never_change(tmp_path):
    mask = torch.ones(5, 4)
    mask[1:3] = 0
    toy = Toy(tmp_path, masks={"0.weight": mask, "0.bias": torch.ones(5)})
    before = toy.network[0].weight.detach().clone()
    toy.run()
    same = (toy.network[0].weight == before).all(1)
    assert same.tolist() == [False, True, True, False, False]


def test_the_rate_warms_up_and_falls_to_a_fiftieth(tmp_path):
    rates = [Toy(tmp_path, replace(SETTINGS, steps=100, warmup=10)).stage.rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.005, rel=0.01) and max(rates) == pytest.approx(0.05, rel=0.05)
    assert rates.index(max(rates)) == 9 and rates[100] == pytest.approx(0.05 / 50)
    assert sorted(rates[9:], reverse=True) == rates[9:]


def test_the_log_has_a_line_every_25_steps_and_samples_are_painted(tmp_path):
    lines = []
    settings = replace(SETTINGS, steps=60, sample_every=25)
    Toy(tmp_path, settings).run(sample=lambda: Image.new("RGB", (2, 2)), on_log=lines.append)
    written = [json.loads(line) for line in (tmp_path / "toy.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written] == [25, 50, 60] and len(lines) == 3
    assert all(line["twice"] == pytest.approx(2 * line["loss"], abs=1e-4) for line in written)
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["toy-000025.png", "toy-000050.png", "toy-000060.png"]
