"""Singular values, norms, ranks, cosines and angles of updates that are never formed, against the formed ones in fp64."""

import math

import pytest
import torch
from comfyui_hywu.hywu_core.errors import LoRAError
from comfyui_hywu.hywu_core.lora import spectrum
from comfyui_hywu.hywu_core.lora.algebra import Selection, blend, masked, scaled
from comfyui_hywu.hywu_core.lora.compress import compressed
from comfyui_hywu.hywu_core.lora.pictures import comparison_picture
from comfyui_hywu.hywu_core.lora.report import comparison_report
from comfyui_hywu.hywu_core.lora.spectrum import compare, effective_rank, inner, pairs, spectra
from comfyui_hywu.hywu_core.lora.stored import expert_energy
from comfyui_hywu.hywu_core.lora.value import LoRA, Provenance
from hypothesis import assume, given
from hypothesis import strategies as st

from .test_algebra import EXPERTS, LAYERS, TARGETS, W1_B, dense, few, loras, make_lora, size

QKV, SHARED, W1 = (name for name, *_ in TARGETS)


def with_matrices(**changes: torch.Tensor) -> LoRA:
    """Rank 2, both layers with these matrices: qkv_A (2, 6), qkv_B (9, 2), w1_A (3, 2, 8), w1_B (3, 4, 2)."""
    short = {"qkv": QKV, "w1": W1}
    tensors = dict(make_lora(3).tensors)
    for name, matrix in changes.items():
        for layer in range(LAYERS):
            tensors[f"model.layers.{layer}.{short[name[:-2]]}.lora_{name[-1]}"] = matrix
    return LoRA.from_tensors(tensors, 2.0, Provenance("backbone"))


def basis(matrix: torch.Tensor) -> torch.Tensor:
    """(..., dims) orthonormal columns that span the matrix's."""
    left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, values > 1e-6 * values.max()]


def angle(one: torch.Tensor, two: torch.Tensor) -> float:
    """Mean principal angle of two column spaces in degrees."""
    one, two = basis(one), basis(two)
    cosines = torch.linalg.svdvals(one.T @ two)[:min(one.shape[1], two.shape[1])]
    return float(torch.rad2deg(torch.acos(cosines.clamp(max=1))).mean())


# ---- singular values


@few
@given(loras())
def test_singular_values_are_those_of_the_formed_updates(lora):
    found = spectra(lora)
    assert found.values.keys() == dense(lora).keys()
    for place, update in dense(lora).items():
        wanted, values = torch.linalg.svdvals(update), found.values[place]
        count = min(lora.rank, wanted.shape[-1])
        assert values.shape == (*update.shape[:-2], lora.rank) and values.dtype == torch.float64
        torch.testing.assert_close(values[..., :count], wanted[..., :count], rtol=1e-7, atol=1e-7 * size(lora))
        assert (values[..., count:] < 1e-7 * size(lora)).all() and (values >= 0).all()


@few
@given(loras(), st.sampled_from([1, 40, 10**6]))
def test_norms_and_energies_are_those_of_the_formed_updates(lora, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spectrum, "CHUNK", chunk)
        found = spectra(lora)
        energy = expert_energy(lora)
    updates, close = dense(lora), {"rtol": 1e-9, "atol": 1e-7 * size(lora)}
    wanted = torch.stack([torch.stack([updates[layer, target.name].norm() for target in lora.targets])
                          for layer in range(LAYERS)])
    torch.testing.assert_close(found.norms(), wanted, **close)
    assert found.norm == pytest.approx(float(wanted.norm()), rel=1e-9, abs=1e-7 * size(lora))
    wanted = torch.stack([updates[layer, W1].square().sum((-1, -2)) for layer in range(LAYERS)])
    close["atol"] *= size(lora)
    torch.testing.assert_close(found.expert_energy(), wanted, **close)
    torch.testing.assert_close(energy, wanted, **close)


def test_the_energy_of_an_expert_is_of_all_its_projections():
    targets = (("mlp.experts.w1", 8, 4, EXPERTS), ("self_attn.o_proj", 5, 5, 0), ("mlp.experts.w2", 4, 8, EXPERTS))
    lora = make_lora(targets=targets)
    found = spectra(lora).expert_energy()
    wanted = dense(lora)[1, "mlp.experts.w1"][2].square().sum() + dense(lora)[1, "mlp.experts.w2"][2].square().sum()
    assert float(found[1, 2]) == pytest.approx(float(wanted), rel=1e-9)
    assert spectra(make_lora(targets=TARGETS[:2])).expert_energy().shape == (LAYERS, 0)


def test_the_effective_rank_counts_equal_singular_values():
    eye = torch.eye(6)
    equal = spectra(with_matrices(qkv_A=eye[:2], qkv_B=torch.eye(9)[:, 3:5] * 5)).effective_ranks()
    assert float(equal[0, 0]) == pytest.approx(2, abs=1e-9)
    one = spectra(with_matrices(qkv_A=torch.stack([eye[0], 2 * eye[0]]), qkv_B=torch.ones(9, 2))).effective_ranks()
    assert float(one[1, 0]) == pytest.approx(1, abs=1e-6)
    halves = effective_rank(torch.tensor([3.0, 1.0], dtype=torch.float64))
    assert float(halves) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))


def test_the_effective_rank_is_a_mean_over_experts_and_0_for_none():
    b = torch.eye(4)[:, :2].repeat(EXPERTS, 1, 1)
    b[1] = 0
    a = torch.eye(8)[:2].repeat(EXPERTS, 1, 1)
    assert float(spectra(with_matrices(w1_A=a, w1_B=b)).effective_ranks()[0, 2]) == pytest.approx(4 / 3, abs=1e-9)
    nothing = spectra(scaled(make_lora(), 0))
    assert not nothing.effective_ranks().any() and nothing.norm == 0 and not nothing.expert_energy().any()


@few
@given(loras(), st.sampled_from([1e-12, 1.0, 1e12]))
def test_scaling_scales_the_spectrum_and_leaves_the_rank(lora, factor):
    before, after = spectra(lora), spectra(scaled(lora, -factor))
    torch.testing.assert_close(after.norms() / factor, before.norms(), rtol=1e-9, atol=1e-12 * size(lora))
    torch.testing.assert_close(after.effective_ranks(), before.effective_ranks(), rtol=1e-4, atol=1e-4)


# ---- two LoRAs


def wanted_comparison(one: LoRA, two: LoRA) -> tuple[float, torch.Tensor]:
    first, second = dense(one), dense(two)
    cosines = [[torch.cosine_similarity(first[layer, target.name].flatten(), second[layer, target.name].flatten(), 0)
                for target in one.targets] for layer in range(one.num_layers)]
    flat = [torch.cat([update.flatten() for update in updates.values()]) for updates in (first, second)]
    return float(torch.cosine_similarity(*flat, 0)), torch.tensor(cosines, dtype=torch.float64)


@few
@given(loras(), loras(), st.sampled_from([40, 10**6]))
def test_cosines_and_angles_are_those_of_the_formed_updates(one, two, chunk):
    assume(any(one.rank_weights) and any(two.rank_weights))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spectrum, "CHUNK", chunk)
        found, turned = compare(one, two), compare(two, one)
    whole, cosines = wanted_comparison(one, two)
    assert found.cosine == pytest.approx(whole, abs=1e-9) == turned.cosine
    torch.testing.assert_close(found.cosines, cosines, rtol=0, atol=1e-9)
    assert found.norms == pytest.approx((spectra(one).norm, spectra(two).norm), rel=1e-9)
    used = [torch.tensor(lora.rank_weights) != 0 for lora in (one, two)]
    for column, target in enumerate(one.targets):
        (a, b), (other_a, other_b) = (lora.layer(1)[target.name] for lora in (one, two))
        sides = [(a.double()[..., used[0], :].mT, other_a.double()[..., used[1], :].mT),
                 (b.double()[..., used[0]], other_b.double()[..., used[1]])]
        for side, angles in zip(sides, (found.angles_in, found.angles_out), strict=True):
            each = [side] if not target.experts else list(zip(*side, strict=True))
            wanted = sum(angle(*matrices) for matrices in each) / len(each)
            assert float(angles[1, column]) == pytest.approx(wanted, abs=1e-4)


def test_a_lora_is_its_own_like_and_its_negative_opposite():
    lora = make_lora(rank=3)
    same, opposite = compare(lora, lora), compare(lora, scaled(lora, -0.1))
    assert same.cosine == pytest.approx(1, abs=1e-12) and opposite.cosine == pytest.approx(-1, abs=1e-12)
    for found in (same, opposite):
        assert abs(found.cosine) <= 1 and (found.cosines.abs() <= 1).all()
        assert (found.angles_in < 1e-4).all() and (found.angles_out < 1e-4).all()


def test_orthogonal_updates_are_at_90_degrees():
    eye = torch.eye(6)
    one, two = (with_matrices(qkv_A=eye[at : at + 2], qkv_B=torch.eye(9)[:, at : at + 2]) for at in (0, 2))
    found = compare(one, two)
    assert (found.cosines[:, 0].abs() < 1e-12).all()
    torch.testing.assert_close(found.angles_in[:, 0], torch.full((LAYERS,), 90.0, dtype=torch.float64))
    torch.testing.assert_close(found.angles_out[:, 0], torch.full((LAYERS,), 90.0, dtype=torch.float64))
    shared = compare(one, with_matrices(qkv_A=eye[1:3], qkv_B=torch.eye(9)[:, 2:4]))  # one of two directions
    assert float(shared.angles_in[0, 0]) == pytest.approx(45, abs=1e-4)


def test_a_rank_of_weight_0_is_not_read():
    one, two = make_lora(0), make_lora(1, 3)
    alone, beside = compare(one, two), compare(blend([one, two], [1, 0]), two)
    torch.testing.assert_close(beside.angles_in, alone.angles_in)
    torch.testing.assert_close(beside.angles_out, alone.angles_out)
    torch.testing.assert_close(beside.cosines, alone.cosines)


ZEROS = {
    "scaled by 0": lambda lora: scaled(lora, 0),
    "a zero B": lambda lora: LoRA.from_tensors(
        {key: matrix * (key[-1] == "A") for key, matrix in lora.tensors.items()}, lora.alpha, lora.provenance),
    "a zero A": lambda lora: LoRA.from_tensors(
        {key: matrix * (key[-1] == "B") for key, matrix in lora.tensors.items()}, lora.alpha, lora.provenance),
    "ranks that cancel": lambda lora: blend([lora, make_lora(5, 4), lora, make_lora(5, 4)], [1, 0.1, -1, -0.1]),
}


@pytest.mark.parametrize("nothing", [make(make_lora()) for make in ZEROS.values()], ids=ZEROS)
def test_nothing_has_no_direction_and_is_still_shown(nothing):
    names = [target.name for target in nothing.targets]
    for one, two in ((nothing, make_lora(1)), (make_lora(1), nothing), (nothing, nothing)):
        found = compare(one, two)
        assert math.isnan(found.cosine)
        for values in (found.cosines, found.angles_in, found.angles_out):
            assert values.isnan().all()
        assert found.norms[one is not nothing] == 0
        assert comparison_picture(names, found).width > 400
        assert all(name in comparison_report(one, two, found) for name in names)


def test_zero_targets_and_experts_are_left_out_of_what_is_compared():
    one, two = make_lora(0), make_lora(1)
    whole = compare(one, two)
    attention = compare(masked(one, Selection(groups=("attention",))), two)
    torch.testing.assert_close(attention.cosines[:, :1], whole.cosines[:, :1])
    torch.testing.assert_close(attention.angles_in[:, :1], whole.angles_in[:, :1])
    for values in (attention.cosines, attention.angles_in, attention.angles_out):
        assert values[:, 1:].isnan().all()
    single = [compare(masked(one, Selection(experts=(expert,))), two) for expert in range(EXPERTS)]
    for name in ("angles_in", "angles_out"):
        each = torch.stack([getattr(found, name)[:, 2] for found in single])
        torch.testing.assert_close(each.mean(0), getattr(whole, name)[:, 2])
        pair = compare(one, masked(two, Selection(experts=(0, 2))))
        torch.testing.assert_close(each[[0, 2]].mean(0), getattr(pair, name)[:, 2])


@pytest.mark.parametrize("seed", range(12))
def test_a_squared_norm_is_never_below_0(seed):
    lora = make_lora(seed, 7)
    for pair in pairs(blend([lora, lora, lora], [1, -3, 2])):
        assert float(inner(pair, pair)) == 0
    for pair in pairs(blend([lora, lora], [1, -0.9999])):
        assert float(inner(pair, pair)) > 0


# ---- what is refused, and progress


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", [W1_B, "model.layers.0.self_attn.qkv_proj.lora_A"])
@pytest.mark.parametrize("measure", [
    spectra, lambda lora: compare(lora, make_lora(1)), lambda lora: compare(make_lora(1), lora), expert_energy,
    lambda lora: compressed(lora, 1), lambda lora: spectra(blend([make_lora(1), lora], [1, 0]))])
def test_damaged_values_are_refused_not_measured(measure, key, value):
    tensors = dict(make_lora().tensors)
    tensors[key] = tensors[key].clone()
    tensors[key][1, 1] = value
    if measure is expert_energy and tensors[key].ndim == 2:
        tensors[W1_B] = torch.full_like(tensors[W1_B], value)
    with pytest.raises(LoRAError, match=r"lora_[AB] holds NaN or Inf in \d+ of \d+ values, expected none"):
        measure(LoRA.from_tensors(tensors, 3.0, make_lora().provenance))


def test_loras_of_different_backbones_are_not_compared():
    with pytest.raises(LoRAError, match="2 backbones"):
        compare(make_lora(), make_lora(origin=Provenance("another")))
    with pytest.raises(LoRAError, match="differ in 1"):
        compare(make_lora(), make_lora(targets=TARGETS[:2]))


def test_targets_in_another_order_are_compared_by_name():
    one, two = make_lora(0), make_lora(1)
    turned = LoRA.from_tensors(two.tensors, two.alpha, two.provenance, target_order=(W1, QKV, SHARED))
    assert turned.targets != two.targets
    torch.testing.assert_close(compare(one, turned).cosines, compare(one, two).cosines)
    torch.testing.assert_close(compare(turned, one).cosines, compare(two, one).cosines[:, [2, 0, 1]])


def test_every_target_of_every_layer_ticks():
    for measure in (lambda tick: spectra(make_lora(), tick), lambda tick: compare(make_lora(), make_lora(1, 3), tick),
                    lambda tick: compressed(make_lora(), 1, on_tick=tick)):
        ticks = []
        measure(lambda *tick, ticks=ticks: ticks.append(tick))
        assert ticks == [(done, 6, None) for done in range(1, 7)]
