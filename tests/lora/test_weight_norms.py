"""Norms of the backbone's weights: right for plain, streamed and packed layers, measured once, nothing left behind."""

import pytest
import torch
from comfyui_hywu.hywu_core.lora.weight_norms import weight_norms

from ..placement.plans import stage, through_the_ring
from ..placement.test_arrangements import ARRANGEMENTS, LAYERS, folder, load, rounded  # noqa: F401


def expected(backbone) -> dict:
    found = {}
    for name, module in backbone.adapted_modules():
        layer, path = int(name.split(".")[2]), name.split(".", 3)[3]
        if path == "mlp.experts":
            inner = module.down_proj.shape[2]
            up, gate = module.gate_and_up_proj[:, :inner], module.gate_and_up_proj[:, inner:]
            for target, weight in (("w1", gate), ("w2", module.down_proj), ("w3", up)):
                found[layer, f"{path}.{target}"] = torch.stack([matrix.double().norm() for matrix in weight])
        else:
            found[layer, path] = module.weight.double().norm()
    return found


def check(found, wanted) -> None:
    assert found.values.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found.values[key], value, rtol=1e-6, atol=0)


def test_the_targets_are_those_of_a_lora(tiny_model):
    norms = weight_norms(tiny_model.backbone)
    names = {f"{name}.{target.name}".rstrip(".") for name, module in tiny_model.backbone.adapted_modules()
             for target in module.targets()}
    assert {f"model.layers.{layer}.{target}" for layer, target in norms.values} == names
    check(norms, expected(tiny_model.backbone))
    assert norms.whole(0, "mlp.experts.w1") == pytest.approx(float(norms.values[0, "mlp.experts.w1"].square().sum().sqrt()))


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_an_arrangement_changes_nothing(folder, name):  # noqa: F811
    check(weight_norms(load(folder, *ARRANGEMENTS[name])), expected(load(folder)))


@pytest.mark.parametrize("form", ["fp8", "int8", "int4"])
def test_packed_weights_are_measured_as_they_are_computed_with(folder, form, monkeypatch):  # noqa: F811
    through_the_ring(monkeypatch)
    packed = load(folder, stage(0, 2), stage(2, LAYERS - 2, (3, 4)), form=form)
    check(weight_norms(packed), expected(rounded(folder, form)))
    # The weights have left again.
    assert all(getattr(module, name).is_meta for _, module in packed.adapted_modules() for name in module.ROOMS)


def test_bf16_is_not_summed_in_bf16(tiny_model):
    from comfyui_hywu.hywu_core.lora.weight_norms import _norm

    matrix = torch.randn(300, 500, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch.testing.assert_close(_norm(matrix), matrix.double().norm(), rtol=1e-6, atol=0)


def test_it_is_measured_once_and_a_cancel_leaves_nothing(folder):  # noqa: F811
    class Cancelled(Exception):
        pass

    def stop(done, total, latent):
        if done == 3:
            raise Cancelled

    backbone, ticks = load(folder, *ARRANGEMENTS["some from disk, ring of three"]), []
    with pytest.raises(Cancelled):
        weight_norms(backbone, stop)
    found = weight_norms(backbone, lambda done, total, latent: ticks.append((done, total)))
    assert ticks == [(done, LAYERS) for done in range(1, LAYERS + 1)]
    assert weight_norms(backbone, stop) is found
