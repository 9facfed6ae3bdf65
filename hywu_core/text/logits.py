"""What happens to the logits of one step before a token is chosen (spec section 11).

Owns, in the order of their use: the ratio slice, the stage transitions, temperature / top-k / top-p, and the seeded draw.
Which tokens trigger what while thinking is decided in ``reasoning.py``. The maths of the three filters is that of transformers'
logits warpers in their fixed order, written out because importing those costs seconds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import RequestError


@dataclass(frozen=True)
class Sampling:
    """How freely tokens are drawn.

    temperature: 0 always takes the likeliest token. top_k: how many likeliest tokens stay, 0 for all. top_p: the smallest set
    of likeliest tokens with this much probability stays, 1 for all.

    Raises:
        RequestError: a value out of range.
    """

    temperature: float = 0.6
    top_k: int = 1024
    top_p: float = 0.95

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise RequestError(f"temperature {self.temperature} is out of range: give 0 (always the likeliest token) or more")
        if self.top_k < 0:
            raise RequestError(f"top_k {self.top_k} is out of range: give 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p {self.top_p} is out of range: give more than 0 and at most 1 (all tokens)")


def only(scores_BV: torch.Tensor, token: int) -> torch.Tensor:
    """Scores (rows, V) that leave one token: 0 for it, the lowest finite number for all others."""
    forced_BV = torch.full_like(scores_BV, torch.finfo(scores_BV.dtype).min)
    forced_BV[:, token] = 0.0
    return forced_BV


@dataclass(frozen=True)
class RatioSlice:
    """After ``trigger`` (the base size token) only a ratio token can follow, and it is the likeliest one, never a draw."""

    trigger: int
    ratio_ids: tuple[int, ...]

    def __call__(self, last_token: int, scores_BV: torch.Tensor) -> torch.Tensor:
        """(1, V) scores of the step after ``last_token``; unchanged unless that was the trigger."""
        if last_token != self.trigger:
            return scores_BV
        return only(scores_BV, self.ratio_ids[ratio_index(scores_BV, self.ratio_ids)])


def ratio_index(scores_BV: torch.Tensor, ratio_ids: Sequence[int]) -> int:
    """The likeliest bucket: which of ``ratio_ids`` scores highest in the only row of (1, V)."""
    return int(scores_BV[0, torch.tensor(ratio_ids, device=scores_BV.device)].argmax())


class StageTransitions:
    """Forces fixed tokens after a trigger token, once per trigger: how one stage of thinking leads into the next.

    transitions: trigger -> what must follow it. One instance serves one run, from the first step to the last.
    """

    def __init__(self, transitions: Mapping[int, Sequence[int]]):
        self._unused = {trigger: tuple(following) for trigger, following in transitions.items()}
        self._pending: list[int] = []

    def __call__(self, last_token: int, scores_BV: torch.Tensor) -> torch.Tensor:
        """(1, V) scores of the step after ``last_token``, to be called once a step; all but a forced token are ruled out."""
        if self._pending and self._pending[0] == last_token:
            self._pending.pop(0)
        if not self._pending and last_token in self._unused:
            self._pending = list(self._unused.pop(last_token))
        return only(scores_BV, self._pending[0]) if self._pending else scores_BV

    def forces(self, last_token: int) -> bool:
        """Whether the step after ``last_token`` will be forced, so that its scores need not be known."""
        arrived = bool(self._pending) and self._pending[0] == last_token
        return bool(self._pending[arrived:] or self._unused.get(last_token))


def filter_scores(scores_BV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """(rows, V) scores over the temperature (which must not be 0), with -inf for the tokens that top-k and top-p rule out."""
    scores_BV = scores_BV / sampling.temperature
    if 0 < sampling.top_k < scores_BV.shape[-1]:
        # Tokens that tie with the last one that stays do stay as well.
        lowest_B1 = scores_BV.topk(sampling.top_k).values[:, -1:]
        scores_BV = scores_BV.masked_fill(scores_BV < lowest_B1, float("-inf"))
    if sampling.top_p < 1:
        ascending_BV, order_BV = scores_BV.sort(descending=False)
        removed_BV = ascending_BV.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        removed_BV[:, -1] = False  # the likeliest token always stays
        scores_BV = scores_BV.masked_fill(removed_BV.scatter(1, order_BV, removed_BV), float("-inf"))
    return scores_BV


def draw(scores_BV: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw one token from the only row of (1, V) scores; on the CPU, so that a seed means the same on every device."""
    scores_V = scores_BV[0].float().cpu()
    if sampling.temperature == 0:
        return int(scores_V.argmax())
    tokens = torch.arange(len(scores_V))
    if 0 < sampling.top_k < len(scores_V):
        # The same tokens that filter_scores leaves, taken out first: sorting all 133120 for top-p takes several times as long.
        tokens = (scores_V >= scores_V.topk(sampling.top_k).values[-1]).nonzero().flatten()
    probabilities_BV = filter_scores(scores_V[tokens].unsqueeze(0), replace(sampling, top_k=0)).softmax(-1)
    return int(tokens[torch.multinomial(probabilities_BV[0], 1, generator=generator)])
