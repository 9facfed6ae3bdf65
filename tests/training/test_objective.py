"""The generator's objective: the flow-matching error reaches the generator through the written LoRAs, and nothing else."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from comfyui_hywu.hywu_core.condition import encode
from comfyui_hywu.hywu_core.generator.handle import write_lora
from comfyui_hywu.hywu_core.lora.attach import inject
from comfyui_hywu.hywu_core.sampling.denoise import sample
from comfyui_hywu.hywu_core.training import generator_stage
from comfyui_hywu.hywu_core.training.batches import Draws
from comfyui_hywu.hywu_core.training.forward import embed_pictures, flow_loss, predict_clean, prefix_hidden
from comfyui_hywu.hywu_core.training.generator_stage import GeneratorObjective, train_generator
from comfyui_hywu.hywu_core.training.recipe import StageSettings
from comfyui_hywu.hywu_core.training.sheets import decoded
from PIL import Image


def carried(model) -> int:
    return sum(len(module.attached()) for _, module in model.adapted_modules())


@pytest.fixture
def objective(small_run, copying, start) -> GeneratorObjective:
    return GeneratorObjective(copying, deepcopy(start[0]), start[1], small_run.train)


@pytest.fixture
def batch(small_run):
    return small_run.train.draw(2, Draws.of(0, "objective", 0), pictures=1)


def test_gradients_reach_every_weight_of_the_generator_and_none_of_the_backbone(objective, batch):
    generator = objective.generator
    with torch.no_grad():  # as after the first steps: with B at zero nothing could reach the weights that write A
        generator.model.proj_out_B.weight.normal_(0, 0.01)
    flow_loss(objective.errors(batch, Draws.of(0, "noise", 0))).backward()
    without = [name for name, value in generator.named_parameters() if value.grad is None or not value.grad.any()]
    assert without == []
    assert [name for name, value in objective.model.named_parameters() if value.requires_grad or value.grad is not None] == []


def test_at_the_start_only_the_projection_of_B_learns(objective, batch):
    """B (A x) with B = 0: the gradient of A is zero, that of B is not."""
    flow_loss(objective.errors(batch, Draws.of(0, "noise", 0))).backward()
    learning = {name for name, value in objective.generator.named_parameters() if value.grad.any()}
    assert learning == {"model.proj_out_B.weight", "model.proj_out_B.bias"}


def test_the_stage_freezes_the_backbone_and_leaves_it_as_it_was(small_run, one_edit, copying, start, tmp_path):
    model, generator = deepcopy(copying).requires_grad_(True), deepcopy(start[0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = replace(small_run.recipe, generator_stage=StageSettings(steps=2, batch=2, rate=1e-3, warmup=1))
    train_generator(model, generator, start[1], small_run.train, one_edit, recipe, tmp_path,
                    torch.autocast("cpu", enabled=False))
    assert not any(value.requires_grad or value.grad is not None for value in model.parameters())
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])] == []
    assert carried(model) == 0
    assert not torch.equal(generator.model.proj_out_B.weight, start[0].model.proj_out_B.weight)


def test_every_B_that_is_written_at_the_start_is_zero_and_no_A_is(objective, batch):
    with torch.no_grad():
        condition = prefix_hidden(objective.model, batch, embed_pictures(objective.model, batch))
        matrices = objective.matrices(condition)
    assert not any(value.any() for key, value in matrices.items() if key.endswith("lora_B"))
    assert all(value.any() for key, value in matrices.items() if key.endswith("lora_A"))


def test_pictures_of_the_start_are_the_plain_backbones(objective, batch):
    """Bytes are equal; latents only nearly, because rows with LoRAs of their own take another order of additions."""
    model, shape = objective.model, batch.wanted_bchw.shape
    painted = objective.painted(batch, Draws.of(0, "paint", 0))
    noise = torch.randn(shape, generator=Draws.of(0, "paint", 0).torch)
    with torch.no_grad():
        plain = predict_clean(model, batch, embed_pictures(model, batch), noise, torch.ones(batch.rows))
    torch.testing.assert_close(painted, plain, rtol=0, atol=1e-4)
    assert (decoded(model, painted) == decoded(model, plain)).all()


def test_the_exported_start_samples_bit_for_bit_as_no_lora(handle, generator_handle, square_batches):
    source = square_batches.draw(1, Draws.of(0, "start", 0), pictures=1).sources[0]
    condition = encode(handle, [Image.fromarray(source.pixels[0])], "make it brighter")
    lora = write_lora(generator_handle, condition)
    assert torch.equal(sample(inject(handle, lora), condition, steps=2), sample(handle, condition, steps=2))


def test_nothing_stays_attached_after_a_step(objective, batch):
    objective.errors(batch, Draws.of(0, "noise", 0))
    assert carried(objective.model) == 0
    objective.painted(batch, Draws.of(0, "noise", 0))
    assert carried(objective.model) == 0


@pytest.mark.parametrize("error", (RuntimeError, KeyboardInterrupt))
@pytest.mark.parametrize("method, fails", (("errors", "flow_errors"), ("painted", "predict_clean")))
def test_nothing_stays_attached_when_the_forward_fails(objective, batch, monkeypatch, method, fails, error):
    seen = []

    def broken(model, *_):
        seen.append(carried(model))
        raise error

    monkeypatch.setattr(generator_stage, fails, broken)
    with pytest.raises(error):
        getattr(objective, method)(batch, Draws.of(0, "noise", 0))
    assert seen[0] > 0 and carried(objective.model) == 0


def test_each_row_is_painted_with_its_own_lora(objective, batch):
    """A B that differs from zero in row 1 only changes row 1 only."""
    plain = objective.painted(batch, Draws.of(0, "paint", 0))
    write = objective.matrices

    def second_only(condition):
        return {key: value if key.endswith("A") else torch.stack((value[0], torch.full_like(value[1], 0.01)))
                for key, value in write(condition).items()}

    objective.matrices = second_only
    painted = objective.painted(batch, Draws.of(0, "paint", 0))
    assert torch.equal(painted[0], plain[0]) and (painted[1] - plain[1]).abs().max() > 0.1
