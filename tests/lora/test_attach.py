"""Injecting and attaching: handles stay values, nothing stays attached, and no LoRA is applied by half."""

from dataclasses import replace

import pytest
import torch
from comfyui_hywu.hywu_core.backbone.mask import attention_mask
from comfyui_hywu.hywu_core.backbone.rope import positions, table
from comfyui_hywu.hywu_core.errors import LoRAError, RequestError
from comfyui_hywu.hywu_core.lora.attach import attached, inject
from comfyui_hywu.hywu_core.lora.value import LoRA, Provenance


def random_lora(model, seed=0, fingerprint=None, rank=3) -> LoRA:
    noise = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.backbone.adapted_modules():
        for target in module.targets():
            path = f"{name}.{target.name}".rstrip(".")
            tensors[f"{path}.lora_A"] = 0.2 * torch.randn(target.a_shape(rank), generator=noise)
            tensors[f"{path}.lora_B"] = 0.2 * torch.randn(target.b_shape(rank), generator=noise)
    return LoRA.from_tensors(tensors, 2.0 * rank, Provenance(fingerprint or model.fingerprint))


@torch.no_grad()
def run(model) -> torch.Tensor:
    """The hidden states of eight random tokens under the model's LoRAs."""
    config = model.config
    hidden = torch.randn(1, 8, config.hidden_size, generator=torch.Generator().manual_seed(9))
    rope = table(positions(8, []), config.attention_head_dim, config.rope_theta)
    with attached(model):
        return model.backbone.run(hidden, rope, attention_mask(8, []))


def carried(model) -> int:
    return sum(len(module.attached()) for _, module in model.backbone.adapted_modules())


def test_inject_returns_a_new_handle_that_shares_the_weights(tiny_model):
    lora = random_lora(tiny_model)
    injected = inject(tiny_model, lora, 0.5)
    assert injected is not tiny_model and injected.backbone is tiny_model.backbone
    assert tiny_model.loras == () and [entry.strength for entry in injected.loras] == [0.5]


def test_the_lora_acts_inside_the_block_only(tiny_model):
    plain, injected = run(tiny_model), inject(tiny_model, random_lora(tiny_model))
    assert (run(injected) - plain).abs().max() > 0.01
    assert torch.equal(run(tiny_model), plain)
    assert carried(tiny_model) == 0


def test_every_projection_matters(tiny_model):
    """Zeroing any single B changes the result: no target is attached but unused."""
    lora = random_lora(tiny_model)
    full = run(inject(tiny_model, lora))
    for key in [key for key in lora.tensors if key.endswith("lora_B")]:
        tensors = dict(lora.tensors)
        tensors[key] = torch.zeros_like(tensors[key])
        assert not torch.equal(run(inject(tiny_model, LoRA.from_tensors(tensors, lora.alpha, lora.provenance))), full), key


def test_two_branches_do_not_see_each_other(tiny_model):
    one, two = random_lora(tiny_model, 1), random_lora(tiny_model, 2)
    alone = run(inject(tiny_model, one)), run(inject(tiny_model, two))
    branches = inject(tiny_model, one), inject(tiny_model, two)
    together = run(branches[0]), run(branches[1]), run(branches[0])
    assert torch.equal(together[0], alone[0]) and torch.equal(together[1], alone[1]) and torch.equal(together[2], alone[0])
    assert not torch.equal(alone[0], alone[1])


def test_loras_in_a_row_add_up(tiny_model):
    lora = random_lora(tiny_model)
    twice = run(inject(inject(tiny_model, lora, 0.25), lora, 0.5))
    torch.testing.assert_close(twice, run(inject(tiny_model, lora, 0.75)), rtol=1e-5, atol=1e-5)


def test_strength_scales_and_negates(tiny_model):
    lora = random_lora(tiny_model)
    negated = LoRA.from_tensors(
        {key: -tensor if key.endswith("B") else tensor for key, tensor in lora.tensors.items()}, lora.alpha, lora.provenance)
    torch.testing.assert_close(run(inject(tiny_model, lora, -1.5)), run(inject(tiny_model, negated, 1.5)))


def test_strength_0_is_the_plain_backbone(tiny_model):
    assert torch.equal(run(inject(tiny_model, random_lora(tiny_model), 0.0)), run(tiny_model))


@pytest.mark.parametrize("error", (KeyboardInterrupt, RuntimeError))
def test_nothing_stays_attached_after_an_error_or_cancel(tiny_model, error):
    plain = run(tiny_model)
    with pytest.raises(error), attached(inject(tiny_model, random_lora(tiny_model))):
        assert carried(tiny_model) > 0
        raise error
    assert carried(tiny_model) == 0 and torch.equal(run(tiny_model), plain)


def test_a_failure_while_attaching_leaves_nothing_behind(tiny_model):
    injected = inject(tiny_model, random_lora(tiny_model))
    broken = dict(injected.loras[0].lora.tensors)
    broken.popitem()
    object.__setattr__(injected.loras[0].lora, "tensors", broken)  # as if a file had been swapped behind our back
    with pytest.raises(KeyError), attached(injected):
        pass
    assert carried(tiny_model) == 0


def test_cancel_between_two_layers_leaves_nothing_behind(tiny_model):
    class Cancelled(Exception):
        pass

    seen = []

    def cancel():
        seen.append(carried(tiny_model))
        raise Cancelled

    with pytest.raises(Cancelled), attached(inject(tiny_model, random_lora(tiny_model)), cancel):
        pass
    whole = sum(len(module.targets()) for _, module in tiny_model.backbone.adapted_modules())
    assert seen == [whole // 2] and carried(tiny_model) == 0  # two layers


def test_a_backbone_in_use_is_refused(tiny_model):
    injected = inject(tiny_model, random_lora(tiny_model))
    with attached(injected), pytest.raises(LoRAError, match="already carries"), attached(injected):
        pass


def test_a_lora_of_another_backbone_is_refused_with_both_fingerprints(tiny_model):
    with pytest.raises(LoRAError) as caught:
        inject(tiny_model, random_lora(tiny_model, fingerprint="feedbeef"))
    assert "feedbeef" in str(caught.value) and tiny_model.fingerprint in str(caught.value)


def test_a_missing_and_a_surplus_layer_are_refused(tiny_model):
    lora = random_lora(tiny_model)
    half = {key: tensor for key, tensor in lora.tensors.items() if ".layers.0." in key}
    with pytest.raises(LoRAError, match="missing model.layers.1"):
        inject(tiny_model, LoRA.from_tensors(half, 1.0, lora.provenance))
    more = dict(lora.tensors) | {key.replace(".layers.0.", ".layers.2."): tensor for key, tensor in half.items()}
    with pytest.raises(LoRAError, match="surplus model.layers.2"):
        inject(tiny_model, LoRA.from_tensors(more, 1.0, lora.provenance))


def test_another_width_is_refused_with_both_shapes(tiny_model):
    lora = random_lora(tiny_model)
    tensors = {key: torch.zeros(3, 7) if key.endswith("o_proj.lora_A") else tensor for key, tensor in lora.tensors.items()}
    with pytest.raises(LoRAError, match=r"expected \(3, 32\), found \(3, 7\)"):
        inject(tiny_model, LoRA.from_tensors(tensors, 1.0, lora.provenance))


@pytest.mark.parametrize("strength", (4.01, -5.0, float("nan"), float("inf")))
def test_a_strength_out_of_range_is_refused(tiny_model, strength):
    with pytest.raises(RequestError, match="-4 .. 4"):
        inject(tiny_model, random_lora(tiny_model), strength)


def test_a_frozen_handle_cannot_be_changed(tiny_model):
    with pytest.raises(AttributeError):
        tiny_model.loras = ()
    assert replace(tiny_model).backbone is tiny_model.backbone
