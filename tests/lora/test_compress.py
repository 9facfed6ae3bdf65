"""LoRAs made small: the best approximation of every update, and an error that is what was lost."""

import math
from dataclasses import replace

import pytest
import torch
from comfyui_hywu.hywu_core.errors import LoRAError, RequestError
from comfyui_hywu.hywu_core.lora import spectrum
from comfyui_hywu.hywu_core.lora.algebra import NOTE_LENGTH, Selection, blend, joined, masked, mean, scaled
from comfyui_hywu.hywu_core.lora.attach import inject
from comfyui_hywu.hywu_core.lora.compress import compressed
from comfyui_hywu.hywu_core.lora.value import DTYPES, LoRA
from hypothesis import given
from hypothesis import strategies as st

from .test_algebra import EXPERTS, ORIGIN, W1_B, assert_same, dense, few, loras, make_lora, size
from .test_attach import random_lora, run

# What the norm of a loss is measured to, of the size of what cancels in it: the root of fp64's rounding, some products deep.
MEASURED = 1e-7


def whole(lora: LoRA) -> torch.Tensor:
    """The whole update in a row, fp64."""
    return torch.cat([update.flatten() for update in dense(lora).values()])


def best_loss(lora: LoRA, rank: int) -> float:
    """Frobenius norm of what no LoRA of this rank can hold (Eckart & Young)."""
    tails = [torch.linalg.svdvals(update)[..., rank:].square().sum() for update in dense(lora).values()]
    return math.sqrt(sum(map(float, tails)))


def rounding(dtype: torch.dtype) -> float:
    return 4 * torch.finfo(dtype).eps


@few
@given(loras(), st.integers(1, 9), st.sampled_from([None, torch.float64, torch.float32, torch.bfloat16]))
def test_the_error_is_what_was_lost_and_no_lora_of_the_rank_loses_less(lora, rank, dtype):
    small = compressed(lora, rank, dtype)
    if rank >= lora.rank:
        assert small.lora is lora and small.error == 0
        return
    norm, lost = float(whole(lora).norm()), float((whole(lora) - whole(small.lora)).norm())
    if not norm:
        assert not any(lora.rank_weights) and small.error == 0 and lost == 0
        return
    places = math.sqrt(len(whole(lora)))
    assert small.error == pytest.approx(lost / norm, rel=1e-6, abs=MEASURED * places * size(lora) / norm)
    best = best_loss(lora, rank)
    assert best * (1 - 1e-9) - MEASURED * size(lora) <= lost <= best + norm * rounding(small.lora.dtype) + MEASURED * size(lora)
    assert (small.lora.rank, small.lora.dtype) == (rank, dtype or lora.dtype)


@few
@given(loras(dtypes=(torch.float64,)), st.integers(1, 5))
def test_every_update_is_approximated_by_its_own_truncated_svd(lora, rank):
    small = compressed(lora, rank).lora
    for place, update in dense(lora).items():
        left, values, right = torch.linalg.svd(update, full_matrices=False)
        truncated = (left[..., :rank] * values[..., None, :rank]) @ right[..., :rank, :]
        found = dense(small)[place]
        # Compared by what is lost: of equal singular values any may stay.
        best, lost = (update - truncated).norm(dim=(-2, -1)), (update - found).norm(dim=(-2, -1))
        torch.testing.assert_close(lost, best, rtol=1e-6, atol=MEASURED * size(lora))


def test_what_has_the_rank_loses_nothing():
    """A blend of a LoRA with itself, and one of more ranks than its matrices have columns."""
    lora = make_lora(rank=3, dtype=torch.float64)
    twice = compressed(blend([lora, scaled(lora, 2)], [1, 0.5]), 3)
    assert twice.error < MEASURED
    assert_same(twice.lora, {place: 2 * update for place, update in dense(lora).items()}, tolerance=1e-9)
    tall = make_lora(rank=20, dtype=torch.float64)
    assert compressed(tall, 7).error < MEASURED < 1e-3 < compressed(tall, 3).error


@pytest.mark.parametrize("rank", [4, 5, 1000])
def test_a_lora_that_is_small_enough_is_returned_unchanged(rank):
    for lora in (make_lora(rank=4), scaled(make_lora(rank=4), 2), blend([make_lora(0), make_lora(1)], [1, 2])):
        assert compressed(lora, rank, torch.bfloat16).lora is lora and compressed(lora, rank).error == 0


def test_rounding_is_in_the_error():
    lora = blend([make_lora(0, 3, torch.float64)] * 2, [0.5, 0.5])  # of rank 3: nothing but rounding is lost
    errors = [compressed(lora, 3, dtype).error for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)]
    assert errors[0] < MEASURED < errors[2] < 1e-3 < errors[3] < 1e-2 and errors[1] < 1e-6
    found = compressed(lora, 3, torch.bfloat16)
    assert found.error == pytest.approx(float((whole(lora) - whole(found.lora)).norm() / whole(lora).norm()), rel=1e-6)


def test_a_larger_rank_loses_less():
    lora = make_lora(rank=8)
    errors = [compressed(lora, rank).error for rank in range(1, 8)]
    assert errors == sorted(errors, reverse=True) and errors[0] < 1
    again = compressed(compressed(lora, 4).lora, 2)
    assert_same(again.lora, dense(compressed(lora, 2).lora), tolerance=1e-5)


def test_the_result_is_a_plain_lora_in_memory_of_its_own():
    lora = blend([make_lora(0), make_lora(1)], [1, 2])
    small = compressed(lora, 3).lora
    checked = LoRA.from_tensors(small.tensors, small.alpha, check_finite=True)
    assert (small.rank, small.scale, small.rank_weights) == (3, 1.0, (1.0,) * 3) and checked.digest == small.digest
    assert small.targets == lora.targets and list(small.tensors) == list(lora.tensors)
    assert all(small.tensors[key] is small.tensors[key] for key in small.tensors)
    a, b = small.layer(0)["self_attn.qkv_proj"]  # singular values are shared evenly: neither side outgrows a narrow dtype
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))


def test_a_backbone_computes_with_the_compressed_lora_what_it_computes_with_the_blend(tiny_model):
    lora = random_lora(tiny_model, 1, rank=3)
    twice = blend([lora, lora], [0.3, 0.4])
    small = compressed(twice, 3)
    wanted = run(inject(tiny_model, twice))
    assert (wanted - run(tiny_model)).abs().max() > 0.01 and small.error < 1e-6
    torch.testing.assert_close(run(inject(tiny_model, small.lora)), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 60])
def test_experts_in_pieces_are_the_same_experts(monkeypatch, chunk):
    lora = make_lora(rank=4, dtype=torch.float64)
    wanted = compressed(lora, 2)
    monkeypatch.setattr(spectrum, "CHUNK", chunk)
    found = compressed(lora, 2)
    assert found.error == pytest.approx(wanted.error, rel=1e-9)
    assert_same(found.lora, dense(wanted.lora), tolerance=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_updates_stay_zero(dtype):
    lora = make_lora(rank=4, dtype=dtype)
    for nothing in (scaled(lora, 0), blend([lora, lora], [1, -1])):
        found = compressed(nothing, 2)
        assert found.error == 0
        assert all(float(update.abs().max()) < 1e-12 * size(lora) for update in dense(found.lora).values())
    part = compressed(masked(lora, Selection(experts=(1,), groups=("experts",))), 2)
    assert 0 < part.error < 1 and not part.lora.tensors[W1_B][0].any() and part.lora.tensors[W1_B][1].any()
    assert not part.lora.tensors["model.layers.0.self_attn.qkv_proj.lora_B"].any()


@pytest.mark.parametrize("seed", range(8))
def test_an_error_is_a_number_whatever_cancels(seed):
    one = make_lora(seed, 5)
    for rest in (0.0, 1e-15, 1e-12, 1e-9, 1e-6):
        found = compressed(blend([one, one, make_lora(seed + 1)], [1, -1, rest]), 2)
        assert math.isfinite(found.error) and 0 <= found.error < 1.5


def test_sixty_four_loras_at_once():
    several, weights = [make_lora(seed, 5) for seed in range(64)], [1 / 64] * 64
    for refused in (lambda: blend(several, weights), lambda: mean(several, "updates")):
        with pytest.raises(RequestError, match="64 LoRAs add up to 320, .* at most 256: choose a rank to compress"):
            refused()
    found = compressed(joined(several, weights), 3)
    assert found.lora.rank == 3 and len(found.lora.provenance.made) <= NOTE_LENGTH
    wanted = sum(whole(lora) for lora in several) / 64
    lost = float((wanted - whole(found.lora)).norm())
    assert found.error == pytest.approx(lost / float(wanted.norm()), rel=1e-6)
    assert lost == pytest.approx(best_loss(joined(several, weights), 3), rel=1e-5)


@pytest.mark.parametrize("rank", [0, -1])
def test_no_rank_is_refused(rank):
    with pytest.raises(RequestError, match=f"is {rank}, expected at least 1"):
        compressed(make_lora(), rank)


def test_values_that_a_dtype_cannot_hold_are_refused():
    large = scaled(make_lora(rank=3, dtype=torch.float16), 1e12)
    with pytest.raises(LoRAError, match=r"do not fit torch\.float16, whose largest is 6\.55e\+04: scale the LoRA down"):
        compressed(large, 2)
    assert compressed(large, 2, torch.bfloat16).error == pytest.approx(compressed(scaled(large, 1e-12), 2).error, abs=0.01)


def test_it_says_where_it_comes_from():
    small = compressed(make_lora(rank=4), 2)
    made = small.lora.provenance.made
    assert made == f"LoRA compressed from rank 4 to 2, error {small.error:.2%}"
    assert replace(small.lora.provenance, made="") == ORIGIN
    mixed = compressed(blend([make_lora(0), make_lora(1)], [1, 2]), 2).lora.provenance
    assert mixed.instruction == "" and mixed.backbone_fingerprint == "backbone"
    assert mixed.made.startswith("1 × “make it blue” + 2 × “make it blue” compressed from rank 4")
    long = replace(make_lora(rank=4), provenance=replace(ORIGIN, made="x" * NOTE_LENGTH))
    assert len(compressed(long, 2).lora.provenance.made) == NOTE_LENGTH


def test_experts_are_compressed_one_by_one():
    """The first expert has one direction and loses nothing; the others lose their second."""
    lora = make_lora(dtype=torch.float64)
    tensors = {key: matrix.clone() for key, matrix in lora.tensors.items()}
    for key, matrix in tensors.items():
        if "experts" in key and key[-1] == "A":
            matrix[0, 1] = 3 * matrix[0, 0]
    lora = LoRA.from_tensors(tensors, 2.0)
    small = dense(compressed(lora, 1).lora)[0, "mlp.experts.w1"]
    lost = (small - dense(lora)[0, "mlp.experts.w1"]).norm(dim=(-2, -1))
    assert len(lost) == EXPERTS and lost[0] < MEASURED * size(lora) and (lost[1:] > 0.1).all()
