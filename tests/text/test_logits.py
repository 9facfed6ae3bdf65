"""The ratio slice, forced transitions, the three filters against transformers' own, and the seeded draw."""

import pytest
import torch
from comfyui_hywu.hywu_core.errors import RequestError
from comfyui_hywu.hywu_core.text.logits import RatioSlice, Sampling, StageTransitions, draw, filter_scores, ratio_index

LOWEST = torch.finfo(torch.float32).min


def scores(size=12, seed=0, rows=1):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 3


def forced(scores_BV):
    """The one token that is left, None if the scores are free."""
    left = (scores_BV[0] == 0).nonzero().flatten().tolist()
    rest = torch.cat([scores_BV[0, :left[0]], scores_BV[0, left[0] + 1:]]) if len(left) == 1 else scores_BV[0]
    return left[0] if len(left) == 1 and bool((rest == LOWEST).all()) else None


def test_each_trigger_forces_its_tokens_once():
    transitions = StageTransitions({5: [9, 7], 6: [], 7: [2]})
    outcome = [forced(transitions(last, scores(seed=last))) for last in (3, 5, 9, 7, 2, 5, 6, 7)]
    # After 5 come 9 and 7; that forced 7 is itself a trigger, and afterwards neither 5 nor 7 triggers again.
    assert outcome == [None, 9, 7, 2, None, None, None, None]


def test_what_will_be_forced_is_known_before_its_step():
    transitions = StageTransitions({5: [9, 7], 6: [], 7: [2]})
    for last in (3, 5, 9, 7, 2, 5, 6, 7):
        known = transitions.forces(last)
        assert known == transitions.forces(last) == (forced(transitions(last, scores(seed=last))) is not None)


def test_free_scores_pass_through_unchanged():
    free = scores()
    assert StageTransitions({5: [9]})(4, free) is free
    assert RatioSlice(5, (1, 2))(4, free) is free


def test_a_forced_token_is_repeated_until_it_was_chosen():
    transitions = StageTransitions({5: [9, 7]})
    assert [forced(transitions(last, scores())) for last in (5, 4, 9, 7)] == [9, 9, 7, None]


def test_two_runs_do_not_share_their_used_triggers():
    table = {5: [9]}
    for _ in range(2):
        assert forced(StageTransitions(table)(5, scores())) == 9
    assert table == {5: [9]}


def test_the_ratio_slice_takes_the_likeliest_ratio_even_if_other_tokens_score_higher():
    free = torch.tensor([[9.0, 1.0, 2.0, 8.0, 3.0, -1.0]])
    assert forced(RatioSlice(0, (2, 5, 4, 1))(0, free)) == 4
    assert ratio_index(free, (2, 5, 4, 1)) == 2


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.8), (5, 0.8), (500, 0.95), (1, 0.01), (12, 0.5)])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.5])
def test_filters_equal_those_of_transformers(temperature, top_k, top_p):
    hf = pytest.importorskip("transformers.generation.logits_process")
    free = scores(size=200, rows=3)
    want = hf.TemperatureLogitsWarper(temperature)(None, free)
    want = hf.TopKLogitsWarper(top_k)(None, want) if top_k else want
    want = hf.TopPLogitsWarper(top_p)(None, want) if top_p < 1 else want
    assert torch.equal(filter_scores(free, Sampling(temperature, top_k, top_p)), want)


def test_top_k_keeps_ties_and_top_p_always_keeps_one():
    tied = torch.tensor([[1.0, 2.0, 2.0, 0.0]])
    assert filter_scores(tied, Sampling(1.0, 1, 1.0)).isfinite().tolist() == [[False, True, True, False]]
    # Rounding lets the last sum of some rows miss 1, and then no token would be left: 50 rows are sure to have such a one.
    assert filter_scores(scores(size=9973, rows=50), Sampling(1.0, 0, 1e-9)).isfinite().sum(-1).tolist() == [1] * 50


def test_the_draw_follows_its_seed_and_the_probabilities():
    free = torch.tensor([[0.0, 1.0, 2.0, -30.0]])
    plain = Sampling(1.0, 0, 1.0)

    def draws(seed, count=400):
        generator = torch.Generator().manual_seed(seed)
        return [draw(free, plain, generator) for _ in range(count)]

    assert draws(1) == draws(1) and draws(1) != draws(2)
    share = torch.bincount(torch.tensor(draws(3, 4000)), minlength=4) / 4000
    assert torch.allclose(share, free.softmax(-1)[0], atol=0.03)


@pytest.mark.parametrize(("top_k", "top_p"), [(4, 1.0), (4, 0.7), (0, 0.7)])
def test_the_draw_reaches_exactly_what_the_filters_leave(top_k, top_p):
    free, sampling = scores(size=30, seed=4) / 3, Sampling(1.0, top_k, top_p)
    left = filter_scores(free, sampling)[0].isfinite().nonzero().flatten().tolist()
    generator = torch.Generator().manual_seed(0)
    assert len(left) > 2 and {draw(free, sampling, generator) for _ in range(3000)} == set(left)


def test_the_draw_leaves_the_global_seed_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    draw(scores(), Sampling(), torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


def test_temperature_zero_is_greedy_and_half_precision_is_fine():
    free = torch.tensor([[0.0, 3.0, 2.9]])
    generator = torch.Generator().manual_seed(0)
    assert {draw(free, Sampling(0.0), generator) for _ in range(20)} == {1}
    assert draw(torch.tensor([[LOWEST, 0.0, LOWEST]]).bfloat16(), Sampling(), generator) == 1


@pytest.mark.parametrize(("field", "value"), [
    ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")), ("top_k", -1), ("top_p", 0.0),
    ("top_p", 1.1), ("top_p", float("nan"))])
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(RequestError, match=f"{field} {value}"):
        Sampling(**{field: value})
