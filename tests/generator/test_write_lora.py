"""Loading a generator folder and writing a LoRA with it."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from comfyui_hywu.hywu_core.errors import CheckpointError, LoRAError
from comfyui_hywu.hywu_core.generator.handle import GeneratorHandle, load_generator, write_lora
from comfyui_hywu.hywu_core.generator.tokens import detokenise
from safetensors.torch import save_file


@pytest.fixture
def folder(tmp_path: Path, raw_config, model) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(raw_config))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    return tmp_path


def make_condition(hidden_SD: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(hidden_SD=hidden_SD, backbone_fingerprint="base", instruction="brighter", thinking="why not",
                           picture_digests=("one", "two"), seed=11)


def test_the_lora_holds_what_the_network_said(folder, model):
    handle, hidden_SD = load_generator(folder), torch.randn(9, 10)
    lora = write_lora(handle, make_condition(hidden_SD))
    with torch.no_grad():
        expected = detokenise(model(hidden_SD[None]), model.layout, "model.layers.")
    assert list(lora.tensors) == list(expected)
    # Not bit for bit: torch folds a linear's rows in another order where the weight wants a gradient.
    assert all(torch.allclose(lora.tensors[key], expected[key][0], rtol=1e-5, atol=1e-5) for key in expected)
    assert (lora.rank, lora.alpha, lora.scale, lora.num_layers) == (4, 6.0, 1.5, 3)
    assert lora.targets == handle.config.targets
    origin = lora.provenance
    assert (origin.backbone_fingerprint, origin.generator_fingerprint) == ("base", handle.fingerprint)
    assert (origin.instruction, origin.thinking, origin.seed) == ("brighter", "why not", 11)
    assert origin.picture_digests == ("one", "two")


def test_matrices_carry_no_graph_and_own_their_memory(folder):
    lora = write_lora(load_generator(folder), make_condition(torch.randn(9, 10)))
    for tensor in lora.tensors.values():
        assert not tensor.requires_grad and tensor.device.type == "cpu"
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_other_condition_other_weights(folder):
    handle = load_generator(folder)
    first, second = (write_lora(handle, make_condition(torch.randn(9, 10))) for _ in range(2))
    assert first.digest != second.digest


def test_ticks_per_block_and_cancel(folder):
    handle, ticks = load_generator(folder), []
    write_lora(handle, make_condition(torch.randn(9, 10)), lambda *tick: ticks.append(tick))
    assert ticks == [(0, 2, None), (1, 2, None), (2, 2, None)]

    class Cancelled(Exception):
        pass

    def cancel(done, total, latent):
        ticks.append("again")
        if done == 1:
            raise Cancelled

    with pytest.raises(Cancelled):
        write_lora(handle, make_condition(torch.randn(9, 10)), cancel)
    assert ticks[3:] == ["again", "again"]


def test_dtype_is_the_configurations_or_the_callers(folder, raw_config):
    assert load_generator(folder).model.hidden_in.weight.dtype == torch.float32
    (folder / "config.json").write_text(json.dumps({**raw_config, "torch_dtype": "bfloat16"}))
    handle = load_generator(folder)
    assert handle.model.hidden_in.weight.dtype == torch.bfloat16
    assert write_lora(handle, make_condition(torch.randn(9, 10))).dtype == torch.bfloat16
    assert load_generator(folder, dtype=torch.float32).model.hidden_in.weight.dtype == torch.float32
    (folder / "config.json").write_text(json.dumps({**raw_config, "torch_dtype": "float8"}))
    with pytest.raises(CheckpointError, match="torch_dtype 'float8' is none of"):
        load_generator(folder)


def test_loaded_weights_are_frozen_and_the_handle_too(folder):
    handle = load_generator(folder)
    assert not any(parameter.requires_grad for parameter in handle.model.parameters())
    assert not any(parameter.is_meta for parameter in handle.model.parameters())
    with pytest.raises(dataclasses.FrozenInstanceError):
        handle.fingerprint = "x"


def test_a_folder_that_is_not_what_its_configuration_says(folder, raw_config):
    (folder / "config.json").write_text(json.dumps({**raw_config, "num_pg_layers": 3}))
    with pytest.raises(CheckpointError, match="model.blocks.2"):
        load_generator(folder)


def test_a_condition_of_another_backbone(folder):
    with pytest.raises(CheckpointError, match=r"\(9, 12\), but this generator reads \(tokens, 10\)"):
        write_lora(load_generator(folder), make_condition(torch.randn(9, 12)))


def test_a_condition_with_a_row_axis(folder):
    with pytest.raises(CheckpointError, match=r"\(1, 9, 10\)"):
        write_lora(load_generator(folder), make_condition(torch.randn(1, 9, 10)))


def test_a_condition_with_nan(folder):
    hidden_SD = torch.randn(9, 10)
    hidden_SD[4, 4] = float("nan")
    with pytest.raises(LoRAError, match="condition holds NaN or Inf in 1 of 90 values"):
        write_lora(load_generator(folder), make_condition(hidden_SD))


def test_a_generator_that_overflows(model, config):
    with torch.no_grad():
        model.model.proj_out_B.bias.fill_(3e38)
        model.model.proj_out_B.weight.mul_(1e38)
    with pytest.raises(LoRAError, match="generator wrote NaN or Inf in [1-9][0-9]* of 1140 values"):
        write_lora(GeneratorHandle(model, config, "x"), make_condition(torch.randn(9, 10)))


def test_a_large_sum_alone_is_no_reason_to_refuse(model, config):
    with torch.no_grad():
        model.model.proj_out_B.bias.fill_(1e38)
    lora = write_lora(GeneratorHandle(model, config, "x"), make_condition(torch.randn(9, 10)))
    assert lora.num_values == 3 * 312
