"""The LoRA value: order, validation, layers, digest, the reference's state, and that it cannot be changed."""

import copy
import dataclasses
import pickle

import pytest
import torch
from comfyui_hywu.hywu_core.config import LoRATarget
from comfyui_hywu.hywu_core.errors import LoRAError
from comfyui_hywu.hywu_core.lora.value import LoRA, Provenance

# Two layers; targets whose order is not alphabetical; no two sizes equal.
LINEAR_A, LINEAR_B = (2, 6), (10, 2)
EXPERT_A, EXPERT_B = (3, 2, 5), (3, 4, 2)


def matrices() -> dict[str, torch.Tensor]:
    """Tensors in the reference's order with values 0, 1, 2, ... over the whole set."""
    shapes = {"self_attn.qkv_proj.lora_A": LINEAR_A, "mlp.experts.w1.lora_A": EXPERT_A,
              "self_attn.qkv_proj.lora_B": LINEAR_B, "mlp.experts.w1.lora_B": EXPERT_B}
    tensors, start = {}, 0
    for layer in range(2):
        for name, shape in shapes.items():
            count = torch.Size(shape).numel()
            tensors[f"model.layers.{layer}.{name}"] = torch.arange(start, start + count, dtype=torch.float32).view(shape)
            start += count
    return tensors


def test_what_is_derived_from_the_tensors():
    lora = LoRA.from_tensors(matrices(), alpha=8)
    assert lora.targets == (LoRATarget("self_attn.qkv_proj", 6, 10), LoRATarget("mlp.experts.w1", 5, 4, experts=3))
    assert (lora.rank, lora.scale, lora.num_layers, lora.prefix) == (2, 4.0, 2, "model.layers.")
    assert lora.num_values == 2 * (12 + 30 + 20 + 24)
    assert lora.nbytes == 4 * lora.num_values
    assert list(lora.tensors) == list(matrices())


def test_any_order_comes_out_in_the_reference_order():
    shuffled = dict(sorted(matrices().items(), reverse=True))
    assert list(shuffled) != list(matrices())
    lora = LoRA.from_tensors(shuffled, 8, target_order=("self_attn.qkv_proj", "mlp.experts.w1"))
    assert list(lora.tensors) == list(matrices())


def test_ten_layers_are_ordered_as_numbers():
    one = {key.removeprefix("model.layers.0."): tensor for key, tensor in matrices().items() if ".0." in key}
    tensors = {f"model.layers.{layer}.{name}": tensor for layer in reversed(range(11)) for name, tensor in one.items()}
    lora = LoRA.from_tensors(tensors, 8)
    assert list(lora.tensors)[-1] == "model.layers.10.mlp.experts.w1.lora_B"
    assert list(lora.tensors)[4] == "model.layers.1.self_attn.qkv_proj.lora_A"


def test_layer_gives_the_pairs():
    lora = LoRA.from_tensors(matrices(), 8)
    a, b = lora.layer(1)["mlp.experts.w1"]
    assert a is lora.tensors["model.layers.1.mlp.experts.w1.lora_A"]
    assert b is lora.tensors["model.layers.1.mlp.experts.w1.lora_B"]
    with pytest.raises(LoRAError, match="layer 2 .* 0 to 1"):
        lora.layer(2)


def test_nothing_can_be_changed_and_equal_means_the_same_object():
    lora, twin = LoRA.from_tensors(matrices(), 8), LoRA.from_tensors(matrices(), 8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        lora.alpha = 9.0
    with pytest.raises(TypeError):
        lora.tensors["model.layers.0.self_attn.qkv_proj.lora_A"] = torch.zeros(2, 6)
    assert lora != twin and lora == lora
    assert len({lora, twin}) == 2


def test_the_callers_dict_is_not_the_loras():
    tensors = matrices()
    lora = LoRA.from_tensors(tensors, 8)
    tensors.clear()
    assert len(lora.tensors) == 8


def test_gradients_pass_through():
    tensors = {key: tensor.requires_grad_() for key, tensor in matrices().items()}
    a, b = LoRA.from_tensors(tensors, 8).layer(0)["self_attn.qkv_proj"]
    (b @ a).sum().backward()
    assert tensors["model.layers.0.self_attn.qkv_proj.lora_A"].grad is not None


@pytest.mark.parametrize("send", [copy.deepcopy, lambda lora: pickle.loads(pickle.dumps(lora))])
def test_it_can_be_sent(send):
    lora = LoRA.from_tensors(matrices(), 8, Provenance(instruction="make it blue", seed=3))
    arrived = send(lora)
    assert arrived.digest == lora.digest
    assert (arrived.targets, arrived.provenance, arrived.alpha) == (lora.targets, lora.provenance, lora.alpha)


def test_digest_sees_values_names_shapes_dtype_and_alpha_but_not_provenance():
    first = LoRA.from_tensors(matrices(), 8)
    assert LoRA.from_tensors(matrices(), 8, Provenance(instruction="x")).digest == first.digest
    nudged = matrices()
    nudged["model.layers.1.mlp.experts.w1.lora_B"][2, 3, 1] += 1
    others = [
        LoRA.from_tensors(matrices(), 9), LoRA.from_tensors(nudged, 8),
        LoRA.from_tensors({key: tensor.to(torch.bfloat16) for key, tensor in matrices().items()}, 8),
        LoRA.from_tensors({key.replace("qkv", "o"): tensor for key, tensor in matrices().items()}, 8)]
    assert len({first.digest, *(lora.digest for lora in others)}) == 5


def test_digest_of_a_transposed_view_is_that_of_its_values():
    tensors = matrices()
    key = "model.layers.0.self_attn.qkv_proj.lora_A"
    tensors[key] = tensors[key].t().contiguous().t()
    assert not tensors[key].is_contiguous()
    assert LoRA.from_tensors(tensors, 8).digest == LoRA.from_tensors(matrices(), 8).digest


def change(key: str, tensor: torch.Tensor | None):
    """A set with one tensor replaced, added or (None) dropped."""
    tensors = matrices()
    tensors.pop(key, None)
    return tensors if tensor is None else {**tensors, key: tensor}


QKV_A, W1_B = "model.layers.1.self_attn.qkv_proj.lora_A", "model.layers.1.mlp.experts.w1.lora_B"


@pytest.mark.parametrize("tensors, message", [
    ({}, "no tensors"),
    (change("unet.down.lora_up.weight", torch.zeros(2, 2)), "unet.down.lora_up.weight.* another kind of model"),
    (change("transformer.0.x.lora_A", torch.zeros(2, 6)), "mixes tensors of different models"),
    (change("model.layers.3.x.lora_A", torch.zeros(2, 6)), "layer 2 is missing"),
    (change(QKV_A, None), "only lora_B is there"),
    (change(QKV_A, torch.zeros(3, 6)), r"\(3, 6\) does not fit lora_B \(10, 2\)"),
    (change(QKV_A, torch.zeros(2, 7)), "in_features=7.* expected .*in_features=6"),
    (change(QKV_A, torch.zeros(2, 6, dtype=torch.int8)), "int8"),
    (change(QKV_A, torch.zeros(2, 6, dtype=torch.bfloat16)), "bfloat16"),
    (change(QKV_A, torch.zeros(2, 0)), "does not fit"),
    (change(QKV_A, torch.tensor(1.0)), "does not fit"),
    (change(W1_B, torch.zeros(2, 4, 2)), r"\(3, 2, 5\) does not fit lora_B \(2, 4, 2\)"),
    (change(W1_B, torch.zeros(4, 2)), "does not fit"),
    (change("model.layers.1.extra.lora_A", torch.zeros(2, 6)), "layer 1 .* expected"),
    (change("model.layers." + "9" * 5000 + ".x.lora_A", torch.zeros(2, 6)), "no HY-WU LoRA tensor"),
])
def test_what_is_no_lora_is_refused(tensors, message):
    with pytest.raises(LoRAError, match=message):
        LoRA.from_tensors(tensors, 8)


def test_two_ranks_in_one_layer_are_refused():
    tensors = {key: tensor for key, tensor in matrices().items() if ".0." in key}
    tensors["model.layers.0.mlp.experts.w1.lora_A"] = torch.zeros(3, 4, 5)
    tensors["model.layers.0.mlp.experts.w1.lora_B"] = torch.zeros(3, 4, 4)
    with pytest.raises(LoRAError, match="qkv_proj has rank 2 but mlp.experts.w1 has rank 4"):
        LoRA.from_tensors(tensors, 8)


def test_two_ranks_in_two_layers_are_refused():
    tensors = {key: torch.cat([tensor, tensor], -2 if "lora_A" in key else -1) if ".1." in key else tensor
               for key, tensor in matrices().items()}
    with pytest.raises(LoRAError, match="layer 1 .*: 4, expected 2"):
        LoRA.from_tensors(tensors, 8)


@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf")])
def test_alpha_must_be_positive(alpha):
    with pytest.raises(LoRAError, match="alpha"):
        LoRA.from_tensors(matrices(), alpha)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_are_looked_at_only_on_request(value):
    tensors = matrices()
    tensors[W1_B][0, 1, 1] = value
    LoRA.from_tensors(tensors, 8)
    with pytest.raises(LoRAError, match=r"layers\.1\.mlp\.experts\.w1\.lora_B holds NaN or Inf in 1 of 24"):
        LoRA.from_tensors(tensors, 8, check_finite=True)


def test_reference_state():
    state = {key: tensor[None] for key, tensor in matrices().items()}
    lora = LoRA.from_reference_state({**state, "scale": torch.tensor(2.5)})
    assert (lora.rank, lora.alpha, lora.scale) == (2, 5.0, 2.5)
    assert torch.equal(lora.tensors[W1_B], matrices()[W1_B])
    assert LoRA.from_reference_state(state, alpha=5).scale == 2.5
    with pytest.raises(LoRAError, match="scale 2.5, but alpha 8"):
        LoRA.from_reference_state({**state, "scale": torch.tensor(2.5)}, alpha=8)
    with pytest.raises(LoRAError, match="no 'scale'"):
        LoRA.from_reference_state(state)
    with pytest.raises(LoRAError, match="leading batch axis"):
        LoRA.from_reference_state({**state, QKV_A: torch.zeros(2, 2, 6), "scale": torch.tensor(2.5)})
