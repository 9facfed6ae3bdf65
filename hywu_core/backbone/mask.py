"""Who may attend to whom: causal, with full attention inside pictures (spec section 6)."""

from collections.abc import Sequence

import torch


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
