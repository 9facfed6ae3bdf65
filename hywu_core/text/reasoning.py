"""The course of thinking, token by token: how it opens, what is forced, where it stops, what text it leaves (spec section 11).

Owns the plan of a run and the loop over its tokens. Where the scores come from is the caller's business (``think.py`` runs the
backbone), so that recorded scores can be played through the very same loop.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from ..config import GenerationConfig
from ..errors import RequestError
from ..progress import Tick, silent
from .logits import RatioSlice, Sampling, StageTransitions, draw
from .sections import TEMPLATES
from .tokenizer import BOI, END_RECAPTION, END_THINK, RECAPTION, THINK, THINKING_TAGS, Tokenizer

MODES = ("think_recaption", "think", "recaption")


@dataclass(frozen=True)
class Plan:
    """What one run of thinking forces and where it ends.

    opening and closing: the tags around the text; the opening one is the last token of the prompt. transitions: trigger id ->
    ids forced after it, once. stop_ids: ids that end the run. size_token, ratio_ids: the ratio slice.
    """

    mode: str
    opening: str
    opening_id: int
    closing_id: int
    size_token: int
    ratio_ids: tuple[int, ...]
    transitions: dict[int, tuple[int, ...]] = field(hash=False)
    stop_ids: frozenset[int] = frozenset()


def plan_reasoning(tokenizer: Tokenizer, generation: GenerationConfig, mode: str = "think_recaption",
                   want_ratio: bool = False) -> Plan:
    """The plan for one of MODES; with ``want_ratio`` the run goes on to the size ratio of the answer (spec section 11).

    Raises:
        RequestError: an unknown mode.
    """
    if mode not in MODES:
        raise RequestError(f"there is no thinking mode {mode!r}: choose one of {', '.join(MODES)}")
    opening = RECAPTION if mode == "recaption" else THINK
    closing = END_THINK if mode == "think" else END_RECAPTION
    transitions: dict[int, tuple[int, ...]] = {}
    if mode == "think_recaption":
        transitions[tokenizer.id(END_THINK)] = (tokenizer.id(RECAPTION),)
    if want_ratio:
        answer = TEMPLATES[generation.sequence_template].answer
        transitions[tokenizer.id(closing)] = tuple(
            tokenizer.id(token) for token in (answer, BOI, tokenizer.img_size) if token)
        stop_ids = frozenset(tokenizer.ratio_ids)
    else:
        # A plain thought that runs straight on into a recaption ends there at the latest.
        stop_ids = frozenset({tokenizer.id(closing), tokenizer.id(END_RECAPTION)})
    return Plan(mode, opening, tokenizer.id(opening), tokenizer.id(closing), tokenizer.id(tokenizer.img_size),
                tokenizer.ratio_ids, transitions, stop_ids)


def reason(next_scores: Callable[[list[int]], torch.Tensor], plan: Plan, sampling: Sampling, generator: torch.Generator,
           max_new_tokens: int, on_tick: Tick = silent) -> list[int]:
    """Play one run and return its new ids, the stop token included (spec section 11).

    next_scores: called with the tokens since its last call, none at first (the prompt ends with the opening tag); returns the
    language model's scores (1, V) for what follows. More than one: those that were forced. generator: the CPU generator that
    the draws come from.

    Raises:
        RequestError: no token is allowed.
    """
    if max_new_tokens < 1:
        raise RequestError(f"max_new_tokens {max_new_tokens} leaves nothing to write: give 1 or more")
    ratio, transitions = RatioSlice(plan.size_token, plan.ratio_ids), StageTransitions(plan.transitions)
    tokens: list[int] = []
    last, told, scores_BV = plan.opening_id, 0, next_scores([])
    while True:
        # A forced token is drawn like any other, so that the draws behind it do not depend on what was skipped.
        last = draw(transitions(last, ratio(last, scores_BV)), sampling, generator)
        tokens.append(last)
        on_tick(len(tokens), max_new_tokens, None)
        if last in plan.stop_ids or len(tokens) == max_new_tokens:
            return tokens
        if not transitions.forces(last):
            told, scores_BV = len(tokens), next_scores(tokens[told:])


def reasoning_text(tokenizer: Tokenizer, plan: Plan, tokens: Iterable[int], drop_think: bool = False) -> str:
    """The thinking text of a run: from the opening tag to the closing one, or the recaption alone with ``drop_think``.

    Differs from the reference in two cases that its own next step would misread: structure tokens that the model wrote inside
    (``<img>``, ``<|endoftext|>``, ...) are left out, and what the token budget cut off is closed with its tag.
    """
    tokens = list(tokens)
    finished = plan.closing_id in tokens
    if finished:
        tokens = tokens[:tokens.index(plan.closing_id) + 1]
    foreign = {token for token, name in tokenizer.structure.items() if name not in THINKING_TAGS}
    text = plan.opening + tokenizer.decode(token for token in tokens if token not in foreign)
    if not finished:
        if plan.opening == THINK and END_THINK not in text:
            text += END_THINK
        elif RECAPTION in text and END_RECAPTION not in text:
            text += END_RECAPTION
    if drop_think and plan.mode == "think_recaption" and RECAPTION in text:
        text = text[text.index(RECAPTION):]
    return text


def sampling_of(generation: GenerationConfig, temperature: float | None = None, top_k: int | None = None,
                top_p: float | None = None) -> Sampling:
    """The checkpoint's sampling settings, each replaced where a value is given.

    Raises:
        RequestError: a value out of range.
    """
    defaults = (generation.temperature if generation.do_sample else 0.0, generation.top_k, generation.top_p)
    given = (temperature, top_k, top_p)
    return Sampling(*(default if value is None else value for default, value in zip(defaults, given, strict=True)))
