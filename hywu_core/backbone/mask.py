"""Who may attend to whom: causal, with full attention inside pictures (spec section 6)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class CanvasSight(NamedTuple):
    """Who sees what on a canvas, which is a few special tokens and a picture: the picture sees the first ``keys`` keys, all of
    them, so it needs no mask; each of the S special tokens sees what stands before it, ``causal_SK`` (S, start + S).
    """

    causal_SK: torch.Tensor
    keys: int

    @classmethod
    def of(cls, start: int, picture: tuple[int, int]) -> "CanvasSight":
        """Of a canvas that begins with its special tokens at ``start`` and ends with its picture, a half-open span."""
        special, seen = picture[0] - start, picture[0]
        return cls(torch.ones(special, seen, dtype=torch.bool).tril(start), picture[1])

    def to(self, device: torch.device) -> "CanvasSight":
        return self._replace(causal_SK=self.causal_SK.to(device))


class UpToSlot(NamedTuple):
    """A single token that sees the slots 0 to ``last_L`` (1,) int64 of the cache, a number that only the device knows."""

    last_L: torch.Tensor


def attention_mask(length: int, full_spans: Sequence[tuple[int, int]], rows: torch.Tensor | None = None) -> torch.Tensor:
    """(rows, L) bool, True = may attend: the lower triangle plus everything inside each half-open span.

    rows: indices of the query tokens (int64), all tokens if None.
    """
    index_L = torch.arange(length)
    query_L = index_L if rows is None else rows
    mask_LL = query_L.unsqueeze(1) >= index_L
    for start, stop in full_spans:
        inside = (query_L >= start) & (query_L < stop)
        mask_LL[inside, start:stop] = True
    return mask_LL


def as_numbers(mask: torch.Tensor | CanvasSight, dtype: torch.dtype) -> torch.Tensor | CanvasSight:
    """What attention adds to its scores: 0 for True, -inf for False. Made once a pass: of a bool mask every layer makes it."""
    if isinstance(mask, CanvasSight):
        return mask._replace(causal_SK=as_numbers(mask.causal_SK, dtype))
    return torch.full_like(mask, -torch.inf, dtype=dtype).masked_fill_(mask, 0.0)
