"""Scale, blend, mean and mask against the updates formed dense in fp64; which LoRAs, masks and texts are refused."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from comfyui_hywu.hywu_core.errors import LoRAError, RequestError
from comfyui_hywu.hywu_core.lora.algebra import (
    GROUPS,
    NOTE_LENGTH,
    RANK_LIMIT,
    Selection,
    blend,
    joined,
    masked,
    mean,
    numbers,
    scaled,
)
from comfyui_hywu.hywu_core.lora.attach import inject
from comfyui_hywu.hywu_core.lora.value import DTYPES, LoRA, Provenance
from hypothesis import given, settings
from hypothesis import strategies as st

from .test_attach import random_lora, run

LAYERS, EXPERTS = 2, 3
# Name, in, out, experts; no two sizes equal, in an order that is not alphabetical.
TARGETS = (("self_attn.qkv_proj", 6, 9, 0), ("mlp.shared_mlp.down_proj", 5, 7, 0), ("mlp.experts.w1", 8, 4, EXPERTS))
W1_B = "model.layers.1.mlp.experts.w1.lora_B"
ORIGIN = Provenance("backbone", "generator", "make it blue", "think", ("aa",), 7)

few = settings(derandomize=True, deadline=None, max_examples=25)


def make_lora(seed: int = 0, rank: int = 2, dtype: torch.dtype = torch.float32, *, alpha: float = 3.0, weights=None,
              targets=TARGETS, layers: int = LAYERS, prefix: str = "model.layers.", origin: Provenance = ORIGIN) -> LoRA:
    noise, tensors = torch.Generator().manual_seed(seed), {}
    for layer, (name, width, out, experts) in itertools.product(range(layers), targets):
        for side, shape in (("A", (rank, width)), ("B", (out, rank))):
            value = torch.randn((experts,) * bool(experts) + shape, generator=noise)
            tensors[f"{prefix}{layer}.{name}.lora_{side}"] = value.to(dtype)
    return LoRA.from_tensors(tensors, alpha, origin, rank_weights=weights)


def dense(lora: LoRA) -> dict[tuple[int, str], torch.Tensor]:
    """s·B·A formed, (O, I) or (E, O, I) fp64, by layer and target."""
    weights = torch.diag(torch.tensor([lora.alpha / lora.rank * weight for weight in lora.rank_weights], dtype=torch.float64))
    return {(layer, name): b.double() @ weights @ a.double()
            for layer in range(lora.num_layers) for name, (a, b) in lora.layer(layer).items()}


def size(lora: LoRA) -> float:
    """The largest value of the updates if nothing in them cancelled: what rounding goes by."""
    matrices = {key: matrix.abs() for key, matrix in lora.tensors.items()}
    weights = tuple(map(abs, lora.rank_weights))
    return max(float(update.max()) for update in dense(replace(lora, tensors=matrices, rank_weights=weights)).values())


def assert_same(lora: LoRA, wanted: dict[tuple[int, str], torch.Tensor], tolerance: float = 1e-12) -> None:
    """Equal updates, but for ``tolerance`` of their size."""
    found, largest = dense(lora), size(lora)
    assert found.keys() == wanted.keys()
    for place, update in wanted.items():
        torch.testing.assert_close(found[place], update, rtol=0, atol=tolerance * largest)


def summed(loras, weights) -> dict[tuple[int, str], torch.Tensor]:
    updates = [dense(lora) for lora in loras]
    return {place: sum(weight * update[place] for weight, update in zip(weights, updates, strict=True)) for place in updates[0]}


factors = st.sampled_from([0.0, 1.0, -1.0, 0.3, -2.5, 16.0])


@st.composite
def loras(draw, dtypes=DTYPES) -> LoRA:
    """Of any rank, also above the matrices' widths, scaled and with ranks switched off or turned round."""
    rank = draw(st.integers(1, 10))
    weights = draw(st.one_of(st.none(), st.lists(factors, min_size=rank, max_size=rank)))
    alpha = draw(st.sampled_from([0.25, 3.0, 16.0]))
    return make_lora(draw(st.integers(0, 99)), rank, draw(st.sampled_from(dtypes)), alpha=alpha, weights=weights)


# ---- scale and blend


@few
@given(loras(), factors, factors)
def test_scaling_twice_is_scaling_by_the_product(lora, one, two):
    assert_same(scaled(scaled(lora, one), two), dense(scaled(lora, one * two)))
    assert_same(scaled(lora, one), {place: one * update for place, update in dense(lora).items()})


def test_scaled_by_0_is_zero_and_by_1_is_itself():
    lora = make_lora()
    assert not any(update.any() for update in dense(scaled(lora, 0)).values())
    assert scaled(lora, 1) is lora
    assert scaled(lora, 0.5).rank_weights == (0.5, 0.5) and scaled(lora, 0.5).alpha == lora.alpha


@few
@given(st.lists(st.tuples(loras(), factors), min_size=1, max_size=4))
def test_a_blend_is_the_weighted_sum_of_the_updates(parts):
    found = blend(*zip(*parts, strict=True))
    assert_same(found, summed(*zip(*parts, strict=True)))
    assert found.rank == sum(lora.rank for lora, _ in parts) == len(found.rank_weights)
    assert {matrix.dtype for matrix in found.tensors.values()} == {found.dtype}


@few
@given(st.tuples(loras(), loras(), loras()), st.tuples(factors, factors, factors), factors)
def test_a_blend_of_blends_is_one_blend(three, weights, outer):
    inside = blend(three[:2], weights[:2])
    assert_same(blend([inside, three[2]], [outer, weights[2]]),
                summed(three, (outer * weights[0], outer * weights[1], weights[2])))


@pytest.mark.parametrize("rank", [2, RANK_LIMIT + 1])
def test_one_lora_of_weight_1_is_its_blend(rank):
    lora = make_lora(rank=rank)
    assert blend([lora], [1]) is lora and mean([lora], "updates") is lora and mean([lora]) is lora


def test_values_are_not_rounded_by_a_blend():
    """bf16 beside fp16: only fp32 holds both. Each matrix comes back bit by bit."""
    one, two = make_lora(0, 2, torch.bfloat16), make_lora(1, 3, torch.float16)
    found = blend([one, two], [0.1, 0.2])
    assert found.dtype == torch.float32
    assert torch.equal(found.tensors[W1_B][..., :2], one.tensors[W1_B].float())
    assert torch.equal(found.tensors[W1_B][..., 2:], two.tensors[W1_B].float())


def test_a_backbone_computes_with_a_blend_what_it_computes_with_the_loras_in_a_row(tiny_model):
    one, two = random_lora(tiny_model, 1, rank=3), random_lora(tiny_model, 2, rank=5)
    row = run(inject(inject(tiny_model, one, 0.5), two, -0.75))
    assert (row - run(tiny_model)).abs().max() > 0.01 and (row - run(inject(tiny_model, one, 0.5))).abs().max() > 0.01
    # The same matrices in the same places, scales that differ in fp64 at most: fp32 rounding of the hidden states.
    torch.testing.assert_close(run(inject(tiny_model, blend([one, two], [0.5, -0.75]))), row, rtol=1e-5, atol=1e-5)
    half = blend([scaled(one, 2), two], [1, -3])
    torch.testing.assert_close(run(inject(tiny_model, half, 0.25)), row, rtol=1e-5, atol=1e-5)


def test_a_backbone_computes_with_both_parts_of_a_mask_what_it_computes_with_the_whole(tiny_model):
    lora = random_lora(tiny_model)
    selection = Selection(layers=(1,), groups=("experts",), experts=(0, 2))
    parts = masked(lora, selection), masked(lora, replace(selection, inverted=True))
    both = run(inject(inject(tiny_model, parts[0]), parts[1]))
    torch.testing.assert_close(both, run(inject(tiny_model, lora)), rtol=1e-5, atol=1e-5)
    assert (run(inject(tiny_model, parts[0])) - run(tiny_model)).abs().max() > 1e-4


# ---- mean


@few
@given(st.lists(loras(), min_size=1, max_size=4))
def test_the_mean_of_updates_is_theirs(several):
    assert_same(mean(several, "updates"), summed(several, [1 / len(several)] * len(several)))


@few
@given(st.lists(st.integers(0, 99), min_size=1, max_size=5), st.sampled_from(DTYPES), st.sampled_from([None, (0.5, -3.0)]))
def test_the_mean_of_matrices_is_theirs(seeds, dtype, weights):
    several = [make_lora(seed, dtype=dtype, weights=weights) for seed in seeds]
    found = mean(several)
    assert (found.rank, found.alpha, found.rank_weights) == (2, 3.0, several[0].rank_weights)
    assert {matrix.dtype for matrix in found.tensors.values()} == {found.dtype}
    for key, matrix in found.tensors.items():
        wanted = torch.stack([lora.tensors[key].double() for lora in several]).mean(0)
        tolerance = 1e-14 if found.dtype == torch.float64 else 1e-6
        torch.testing.assert_close(matrix.double(), wanted, rtol=0, atol=tolerance)


def test_the_two_means_are_not_the_same():
    several = [make_lora(0), make_lora(1)]
    with pytest.raises(AssertionError):
        assert_same(mean(several), dense(mean(several, "updates")), tolerance=0.01)


@pytest.mark.parametrize("others, message", [
    ([make_lora(1, 3)], "rank 2 .* rank 3 .* mean of the updates"),
    ([make_lora(1, alpha=4.0)], "scale 1.5 .* scale 2 .* mean of the updates"),
    ([make_lora(1, weights=(1, 2))], "other weights of ranks: take the mean of the updates")])
def test_matrices_that_do_not_correspond_have_no_mean(others, message):
    with pytest.raises(LoRAError, match=message):
        mean([make_lora(), *others])
    assert_same(mean([make_lora(), *others], "updates"), summed([make_lora(), *others], [0.5, 0.5]))


# ---- mask


def subsets(of):
    return st.one_of(st.none(), st.sets(st.sampled_from(of)).map(tuple))


@settings(few, max_examples=60)
@given(subsets(range(LAYERS)), subsets(GROUPS), subsets(range(EXPERTS)), st.booleans())
def test_a_mask_and_its_inversion_share_the_lora_out(layers, groups, experts, inverted):
    lora, selection = make_lora(), Selection(layers, groups, experts, inverted)
    kept = {}
    for (layer, name), update in dense(lora).items():
        group = {"self_attn.qkv_proj": "attention", "mlp.shared_mlp.down_proj": "shared", "mlp.experts.w1": "experts"}[name]
        inside = (layers is None or layer in layers) and (groups is None or group in groups)
        here = torch.full(update.shape, inside)
        if update.ndim == 3 and experts is not None:
            for expert in set(range(EXPERTS)) - set(experts):
                here[expert] = False
        kept[layer, name] = here ^ inverted
    for part, choice in ((selection, kept), (replace(selection, inverted=not inverted), {k: ~v for k, v in kept.items()})):
        if any(here.any() for here in choice.values()):
            found = masked(lora, part)
            assert (found is lora) == all(here.all() for here in choice.values())
            for place, update in dense(found).items():
                assert torch.equal(update, dense(lora)[place] * choice[place])
        else:
            with pytest.raises(RequestError, match="keeps 0 of 6 projections"):
                masked(lora, part)


def test_what_is_masked_out_is_zero_even_where_it_was_nan():
    lora = make_lora()
    tensors = dict(lora.tensors)
    tensors[W1_B] = tensors[W1_B].clone()
    tensors[W1_B][1] = math.nan
    found = masked(LoRA.from_tensors(tensors, lora.alpha), Selection(experts=(0, 2)))
    assert not found.tensors[W1_B][1].any() and torch.equal(found.tensors[W1_B][2], lora.tensors[W1_B][2])


@pytest.mark.parametrize("selection, message", [
    (Selection(layers=(1, 2)), r"layers \[2\], the LoRA has 0 to 1"), (Selection(layers=(-1,)), r"layers \[-1\]"),
    (Selection(experts=(3,)), r"experts \[3\], the LoRA has 0 to 2"), (Selection(experts=range(3, 10**6)), r"\[3, 4, 5, 6\]"),
    (Selection(groups=("router",)), r"groups \['router'\]"), (Selection(layers=(2,), inverted=True), r"layers \[2\]"),
    (Selection(layers=()), "keeps 0 of 6"), (Selection(groups=("shared",), layers=()), "keeps 0 of 6"),
    (Selection(inverted=True), "keeps 0 of 6 projections of the LoRA: widen it")])
def test_masks_that_fit_nothing_are_refused(selection, message):
    with pytest.raises(RequestError, match=message):
        masked(make_lora(), selection)


def test_a_lora_without_experts_has_none_to_choose():
    with pytest.raises(RequestError, match="has 0 experts"):
        masked(make_lora(targets=TARGETS[:2]), Selection(experts=(0,)))
    with pytest.raises(RequestError, match="0 of them: leave this empty"):
        numbers("0", 0, "experts")


@few
@given(st.sets(st.integers(0, 40), min_size=1), st.sampled_from("-–"), st.sampled_from([", ", ",", " ,\t"]), st.randoms())
def test_numbers_reads_what_a_person_writes(chosen, dash, comma, random):
    parts = [str(number) for number in chosen]
    for number in chosen:
        if number + 1 in chosen:
            parts.append(f"{number}{dash}{number + 1}" if random.random() < 0.5 else f" {number:03d} {dash} {number + 1}")
    random.shuffle(parts)
    assert numbers(comma.join(parts) + random.choice(["", ","]), 41, "layers") == tuple(sorted(chosen))


def test_numbers_reads_ranges_and_nothing_as_all():
    assert numbers("0-3, 7", 8, "layers") == (0, 1, 2, 3, 7) and numbers("2-2", 8, "layers") == (2,)
    assert [numbers(text, 8, "layers") for text in ("", "  ", ",", " , ")] == [None] * 4


@pytest.mark.parametrize("text, message", [
    ("7-3", "range from 7 down to 3: write the smaller"), ("8", "'8' is outside 0-7: the LoRA has 8"), ("0-8", "outside 0-7"),
    ("-1", "neither"), ("3-", "neither"), ("-", "neither"), ("1-2-3", "neither"), ("1;2", "neither"), ("1 2", "neither"),
    ("0x1", "neither"), ("1e1", "neither"), ("1.0", "neither"), ("+1", "neither"), ("1_0", "neither"), ("all", "neither"),
    ("９", "neither"), ("٣", "neither"), ("²", "neither"), ("9" * 5000, "neither"), ("0-" + "9" * 5000, "neither"),
    ("99999", "outside 0-7"), ("\0", "neither")])
def test_numbers_refuses_everything_else(text, message):
    with pytest.raises(RequestError, match=message) as caught:
        numbers(f"0, {text}", 8, "layers")
    assert len(str(caught.value)) < 200


# ---- what is refused


@pytest.mark.parametrize("other, message", [
    (make_lora(origin=Provenance("another")), r"2 backbones \(another, backbone\)"),
    (make_lora(layers=1), "2 layers .* another 1"), (make_lora(prefix="other.layers."), r"\(other\.layers\.\)"),
    (make_lora(targets=TARGETS[:2]), r"differ in 1 .*w1"),
    (make_lora(targets=(*TARGETS[:2], ("mlp.experts.w1", 8, 4, 4))), "differ in 2")])
@pytest.mark.parametrize("combine", [lambda two: blend(two, [1, 1]), mean, lambda two: mean(two, "updates")])
def test_loras_of_different_backbones_are_refused(other, message, combine):
    for two in ([make_lora(), other], [other, make_lora()]):
        with pytest.raises(LoRAError, match="use LoRAs of one backbone together"):
            combine(two)
    with pytest.raises(LoRAError, match=message):
        combine([make_lora(), other])


def test_a_lora_of_unknown_backbone_goes_with_any():
    assert blend([make_lora(origin=Provenance()), make_lora(1)], [1, 1]).provenance.backbone_fingerprint == "backbone"


@pytest.mark.parametrize("refused", [
    lambda: blend([], []), lambda: mean([]), lambda: mean([], "updates"), lambda: blend([make_lora()], [1, 2]),
    lambda: blend([make_lora()], [math.nan]), lambda: scaled(make_lora(), math.inf), lambda: mean([make_lora()], "things"),
    lambda: joined([make_lora(), make_lora()], [1, -math.inf])])
def test_nothing_to_combine_is_refused(refused):
    with pytest.raises(RequestError, match="give|finite|expected"):
        refused()


@pytest.mark.parametrize("too_large", [
    lambda big: scaled(big, 1e30), lambda big: blend([big, big], [1e30, 1]), lambda big: joined([big], [-1e30])])
def test_factors_that_fp32_cannot_hold_are_refused(too_large):
    """Adapters multiply in fp32: Inf there is a black picture."""
    with pytest.raises(RequestError, match=r"at most 3\.4e\+38"):
        too_large(scaled(make_lora(), 1e30))
    with pytest.raises(LoRAError, match="2 numbers that fp32 holds"):
        make_lora(weights=(1.0, 1e39))
    with pytest.raises(LoRAError, match="alpha"):
        make_lora(alpha=1e39)


# ---- where it comes from


def test_a_blend_and_a_mean_belong_to_no_request_but_to_the_backbone():
    one = make_lora(origin=Provenance("backbone", "generator", "make it blue", "think", ("aa", "bb"), 7))
    two = make_lora(1, origin=Provenance("backbone", "generator", "make it old", "", ("bb", "cc"), 8))
    for found in (blend([one, two], [0.5, 1]), mean([one, two]), mean([one, two], "updates")):
        assert replace(found.provenance, made="") == Provenance(
            "backbone", "generator", picture_digests=("aa", "bb", "cc"))
        assert "make it blue" in found.provenance.made and "make it old" in found.provenance.made
    other = replace(two, provenance=replace(two.provenance, generator_fingerprint="another"))
    assert blend([one, other], [1, 1]).provenance.generator_fingerprint == ""


def test_a_scaled_or_masked_lora_still_belongs_to_its_request():
    for found in (scaled(make_lora(), -0.5), masked(make_lora(), Selection(layers=(0,)), "layer 0")):
        assert replace(found.provenance, made="") == ORIGIN
    assert scaled(make_lora(), -0.5).provenance.made == "-0.5 × “make it blue”"
    assert masked(scaled(make_lora(), 2), Selection(layers=(0,)), "layer 0").provenance.made == (
        "layer 0 of (2 × “make it blue”)")


def test_notes_stay_short_whatever_an_instruction_holds():
    hostile = make_lora(origin=replace(ORIGIN, instruction="x" * 10_000_000))
    nested = hostile
    for _ in range(3):
        nested = blend([nested, scaled(hostile, 2), masked(hostile, Selection(layers=(0,)), "y" * 5000)], [1, 2, 3])
        assert len(nested.provenance.made) == NOTE_LENGTH and nested.provenance.made.endswith("…")
    assert len(mean([hostile, hostile]).provenance.made) == NOTE_LENGTH
