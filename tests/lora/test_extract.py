"""A LoRA out of two checkpoints: exact where the difference has low rank, else the best of its rank; and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from comfyui_hywu.hywu_core.checkpoint import backbone_fingerprint, open_shards
from comfyui_hywu.hywu_core.checkpoint.convert import convert
from comfyui_hywu.hywu_core.errors import CheckpointError, LoRAError, RequestError
from comfyui_hywu.hywu_core.handle import load_model
from comfyui_hywu.hywu_core.lora.attach import attached, inject
from comfyui_hywu.hywu_core.lora.extract import extract_lora, truncated
from comfyui_hywu.tests.tiny import write_backbone
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

ADAPTED = ("self_attn.qkv_proj", "self_attn.o_proj", "gate_and_up_proj", "down_proj")


def is_adapted(name: str) -> bool:
    return name.startswith("model.layers.") and name.removesuffix(".weight").endswith(ADAPTED)


def tuned(base: Path, folder: Path, rank: int, also: str = "") -> Path:
    """A copy of ``base`` with noise of ``rank`` added to every adapted matrix, to an expert's gate and up each."""
    shutil.copytree(base, folder)
    tensors, noise = load_file(base / "model.safetensors"), torch.Generator().manual_seed(5)

    def low(outputs: int, inputs: int) -> torch.Tensor:
        return torch.randn(outputs, rank, generator=noise) @ torch.randn(rank, inputs, generator=noise) / inputs

    for name, tensor in tensors.items():
        if is_adapted(name):
            parts = 2 if "experts" in name and "gate_and_up" in name else 1
            tensors[name] = tensor + torch.cat([low(len(tensor) // parts, tensor.shape[1]) for _ in range(parts)])
        elif also and name == also:
            tensors[name] = tensor + 1
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def base(tiny_folders) -> Path:
    return tiny_folders[0]


def test_a_difference_of_low_rank_comes_back_exactly(base, tmp_path):
    other, ticks = tuned(base, tmp_path / "tuned", rank=3), []
    found = extract_lora(base, other, rank=3, on_tick=lambda *tick: ticks.append(tick))
    assert found.error < 1e-5 and found.others == ()
    assert [tick[0] for tick in ticks] == list(range(1, ticks[0][1] + 1))
    assert found.lora.provenance.backbone_fingerprint == backbone_fingerprint(open_shards(base))
    assert "tuned" in found.lora.provenance.made and "rank 3" in found.lora.provenance.made
    # What the tuned backbone computes: the base with the LoRA, layer by layer through a whole pass.
    model, wanted = load_model(base), load_model(other)
    ids = torch.arange(9)[None] + 20
    hidden, expected = model.backbone.embed(ids), wanted.backbone.embed(ids)
    rope = torch.ones(9, model.config.attention_head_dim), torch.zeros(9, model.config.attention_head_dim)
    with torch.no_grad(), attached(inject(model, found.lora)):
        result = model.backbone.run(hidden, rope, None)
    with torch.no_grad():
        expected, plain = wanted.backbone.run(expected, rope, None), model.backbone.run(hidden, rope, None)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(plain, expected, rtol=1e-2, atol=1e-2)


def test_a_smaller_rank_says_what_is_lost(base, tmp_path):
    other = tuned(base, tmp_path / "tuned", rank=4)
    errors = [extract_lora(base, other, rank=rank).error for rank in (1, 2, 3, 4)]
    before, after = (load_file(folder / "model.safetensors") for folder in (base, other))
    lost = whole = 0.0
    for name in filter(is_adapted, before):
        parts = 2 if "experts" in name and "gate_and_up" in name else 1
        for part in (after[name] - before[name]).double().chunk(parts):
            values = torch.linalg.svdvals(part)
            lost, whole = lost + float(values[2:].square().sum()), whole + float(values.square().sum())
    assert errors[1] == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    assert errors[0] > errors[1] > errors[2] > errors[3] and errors[3] < 1e-5


def test_the_dtype_is_in_the_error(base, tmp_path):
    other = tuned(base, tmp_path / "tuned", rank=2)
    found = extract_lora(base, other, rank=2, dtype=torch.bfloat16)
    assert found.lora.dtype == torch.bfloat16 and 1e-4 < found.error < 1e-2


def test_what_no_lora_holds_is_named(base, tmp_path):
    other = tuned(base, tmp_path / "tuned", rank=1, also="model.layers.1.mlp.gate.wg.weight")
    assert extract_lora(base, other, rank=1).others == ("model.layers.1.mlp.gate.wg.weight",)


@settings(max_examples=30, deadline=None)
@given(outputs=st.integers(1, 20), inputs=st.integers(1, 20), rank=st.integers(1, 24), seed=st.integers(0, 1000))
def test_the_decomposition_is_the_best_of_its_rank(outputs, inputs, rank, seed):
    matrix = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    a, b = truncated(matrix, rank)
    assert a.shape == (rank, inputs) and b.shape == (outputs, rank)
    best = torch.linalg.svdvals(matrix)[rank:].norm()
    assert float((matrix - b @ a).norm()) == pytest.approx(float(best), abs=1e-9)


def test_large_matrices_are_found_by_iteration_nearly_as_well_and_always_alike():
    noise = torch.Generator().manual_seed(0)
    matrix = torch.randn(700, 6, generator=noise) @ torch.randn(6, 900, generator=noise) + 0.1 * torch.randn(
        700, 900, generator=noise)
    a, b = truncated(matrix, 6)
    best = float(torch.linalg.svdvals(matrix)[6:].norm())
    assert best <= float((matrix - b @ a).norm()) * (1 + 1e-4) <= best * 1.01
    assert all(map(torch.equal, truncated(matrix, 6), (a, b)))


# ---- refusals


def test_other_architectures_are_refused_with_both_sizes(base, tmp_path):
    other = write_backbone(tmp_path / "other", num_hidden_layers=3)
    with pytest.raises(LoRAError, match="has 2 layers .* has 3 layers .* one architecture"):
        extract_lora(base, other)


def test_equal_checkpoints_have_no_lora(base):
    with pytest.raises(LoRAError, match="differ in 0 of [0-9]+ adapted"):
        extract_lora(base, base)


def test_packed_weights_are_refused(base, tmp_path):
    convert(base, tmp_path / "fp8", "fp8")
    for pair in ((base, tmp_path / "fp8"), (tmp_path / "fp8", base)):
        with pytest.raises(CheckpointError, match="quantised .* use the published bf16 folder"):
            extract_lora(*pair)


@pytest.mark.parametrize("rank", [0, -1, 257])
def test_ranks_that_are_none(base, rank):
    with pytest.raises(RequestError, match="expected 1 to 256"):
        extract_lora(base, base, rank=rank)


def test_missing_and_misshapen_weights_are_named(base, tmp_path):
    other = tuned(base, tmp_path / "tuned", rank=1)
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.0.mlp.experts.1.down_proj.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, other / "model.safetensors")
    with pytest.raises(LoRAError, match=f"missing are {name}"):
        extract_lora(base, other)
    save_file(tensors | {name: tensors[name].mT.contiguous()}, other / "model.safetensors")
    with pytest.raises(LoRAError, match=f"'{name}' has the shape .* as config.json says"):
        extract_lora(base, other)
    (other / "config.json").write_text(json.dumps({"model_type": "other"}))
    with pytest.raises(CheckpointError, match="config.json"):
        extract_lora(base, other)
