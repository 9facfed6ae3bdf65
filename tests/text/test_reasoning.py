"""A whole run of thinking on scripted scores: what is forced, where it stops, and the text it leaves."""

from dataclasses import replace

import pytest
import torch
from comfyui_hywu.hywu_core.errors import RequestError
from comfyui_hywu.hywu_core.text.reasoning import plan_reasoning, reason, reasoning_text, sampling_of
from comfyui_hywu.hywu_core.text.sections import TEMPLATES, thinking_sections

SIZE = 400


class Script:
    """Scores that prefer one written token a step, and a record of what the loop told about the steps before."""

    def __init__(self, tokenizer, text):
        self.ids = tokenizer.encode(text)
        self.told = []

    def __call__(self, tokens):
        self.told.append(tokens)
        scores_BV = torch.zeros(1, SIZE)
        step = sum(map(len, self.told))
        scores_BV[0, self.ids[step] if step < len(self.ids) else 0] = 1e4
        return scores_BV


def run(tokenizer, generation, text, mode="think_recaption", want_ratio=False, budget=100, **more):
    plan = plan_reasoning(tokenizer, generation, mode, want_ratio)
    script = Script(tokenizer, text)
    tokens = reason(script, plan, sampling_of(generation), torch.Generator().manual_seed(0), budget, **more)
    return plan, tokens, script


def test_thinking_is_led_into_the_recaption(tokenizer, generation):
    """What the model wants right after </think> is overruled."""
    plan, tokens, script = run(tokenizer, generation, "why</think>?a coat</recaption>more")
    assert tokenizer.decode(tokens) == "why</think><recaption>a coat</recaption>"
    # What was forced is told with what forced it.
    led = len(tokenizer.encode("why</think>"))
    assert script.told == [[], *([token] for token in tokens[: led - 1]), tokens[led - 1 : led + 1],
                           *([token] for token in tokens[led + 1 : -1])]
    assert reasoning_text(tokenizer, plan, tokens) == "<think>why</think><recaption>a coat</recaption>"


def test_the_run_goes_on_to_the_likeliest_ratio(tokenizer, generation):
    class Favourite(Script):
        def __call__(self, tokens):
            scores_BV = super().__call__(tokens)
            scores_BV[0, tokenizer.ratio_ids[34]] = 0.5
            return scores_BV

    plan = plan_reasoning(tokenizer, generation, "think_recaption", want_ratio=True)
    script = Favourite(tokenizer, "a</think>?b</recaption>")
    tokens = reason(script, plan, sampling_of(generation), torch.Generator().manual_seed(0), 100)
    assert tokenizer.decode(tokens) == "a</think><recaption>b</recaption><answer><boi><img_size_64><img_ratio_34>"
    assert reasoning_text(tokenizer, plan, tokens) == "<think>a</think><recaption>b</recaption>"


@pytest.mark.parametrize(("template", "lead"), [("instruct", "<answer><boi><img_size_64>"), ("pretrain", "<boi><img_size_64>")])
def test_the_plain_template_has_no_answer_tag(tokenizer, generation, template, lead):
    plan = plan_reasoning(tokenizer, replace(generation, sequence_template=template), "recaption", want_ratio=True)
    assert plan.transitions == {tokenizer.id("</recaption>"): tuple(tokenizer.encode(lead))}
    assert plan.stop_ids == frozenset(tokenizer.ratio_ids)


@pytest.mark.parametrize(("mode", "opening", "stops"), [
    ("think_recaption", "<think>", ["</recaption>"]),
    ("recaption", "<recaption>", ["</recaption>"]),
    ("think", "<think>", ["</think>", "</recaption>"]),
])
def test_modes(tokenizer, generation, mode, opening, stops):
    plan = plan_reasoning(tokenizer, generation, mode)
    assert plan.opening == opening and plan.opening_id == tokenizer.id(opening)
    assert plan.stop_ids == frozenset(map(tokenizer.id, stops))


def test_a_plain_thought_stops_at_its_closing_tag(tokenizer, generation):
    plan, tokens, _ = run(tokenizer, generation, "why</think>more", mode="think")
    assert reasoning_text(tokenizer, plan, tokens) == "<think>why</think>"


def test_end_of_text_does_not_stop_the_run(tokenizer, generation):
    _, tokens, _ = run(tokenizer, generation, "a<|endoftext|>b</recaption>", mode="recaption")
    assert tokenizer.decode(tokens) == "a<|endoftext|>b</recaption>"


def test_with_drop_think_the_recaption_alone_is_kept(tokenizer, generation):
    plan, tokens, _ = run(tokenizer, generation, "why</think>?b</recaption>")
    assert reasoning_text(tokenizer, plan, tokens, drop_think=True) == "<recaption>b</recaption>"
    plan, tokens, _ = run(tokenizer, generation, "why</think>", mode="think")
    assert reasoning_text(tokenizer, plan, tokens, drop_think=True) == "<think>why</think>"


@pytest.mark.parametrize(("budget", "text"), [
    (2, "<think>wh</think>"),
    (4, "<think>why</think>"),
    (5, "<think>why</think><recaption></recaption>"),
    (7, "<think>why</think><recaption>a </recaption>"),
])
def test_a_run_that_the_budget_cut_off_is_closed(tokenizer, generation, budget, text):
    plan, tokens, _ = run(tokenizer, generation, "why</think>?a coat</recaption>", budget=budget)
    assert len(tokens) == budget
    assert reasoning_text(tokenizer, plan, tokens) == text


def test_the_text_can_be_fed_back_whatever_the_model_wrote(tokenizer, generation):
    """Structure tokens among the thoughts would be refused by the next step, so they do not reach the text."""
    plan, tokens, _ = run(tokenizer, generation, "a<img><boi></think>?b<|endoftext|><cfg></recaption>")
    text = reasoning_text(tokenizer, plan, tokens)
    assert text == "<think>a</think><recaption>b</recaption>"
    assert [section.text for section in thinking_sections(TEMPLATES["instruct"], text, False) if section.text] == [
        "<think>", "a", "</think>", "<recaption>", "b", "</recaption>"]


def test_every_token_ticks_and_a_cancel_passes_through(tokenizer, generation):
    ticks = []
    run(tokenizer, generation, "abc</recaption>", mode="recaption", on_tick=lambda *tick: ticks.append(tick))
    assert ticks == [(1, 100, None), (2, 100, None), (3, 100, None), (4, 100, None)]

    class Cancelled(Exception):
        pass

    def cancel(done, total, latent):
        if done == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        run(tokenizer, generation, "abc</recaption>", mode="recaption", on_tick=cancel)


def test_bad_requests_are_named(tokenizer, generation):
    with pytest.raises(RequestError, match="'dream'.*think_recaption"):
        plan_reasoning(tokenizer, generation, "dream")
    with pytest.raises(RequestError, match="max_new_tokens 0"):
        run(tokenizer, generation, "a", budget=0)


def test_sampling_takes_the_checkpoints_values_where_none_is_given(generation):
    settings = replace(generation, temperature=0.5, top_k=7, top_p=0.4)
    chosen = sampling_of(settings, top_k=3)
    assert (chosen.temperature, chosen.top_k, chosen.top_p) == (0.5, 3, 0.4)
    assert sampling_of(replace(settings, do_sample=False)).temperature == 0
    assert sampling_of(settings, temperature=0).temperature == 0
