"""Masks drawn by hand."""

import torch
from comfyui_hywu.hywu_core.backbone.layer import attend
from comfyui_hywu.hywu_core.backbone.mask import CanvasSight, attention_mask


def test_causal_with_a_full_span():
    got = attention_mask(5, [(1, 4)])
    assert got.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1]]


def test_rows_are_rows_of_the_full_mask():
    rows = torch.tensor([2, 3, 6])
    assert torch.equal(attention_mask(8, [(1, 3), (5, 7)], rows), attention_mask(8, [(1, 3), (5, 7)])[rows])


def test_a_canvas_without_a_mask_sees_what_the_mask_says():
    """Two special tokens at 6 and 7, a picture of four, and tokens behind it that nobody sees."""
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, tokens, 8, generator=random) for heads, tokens in ((4, 6), (2, 14), (2, 14)))
    v[:, :, 12:] = 1e6
    want = attend(q, k, v, attention_mask(14, [(1, 5), (8, 12)], torch.arange(6, 12)))
    torch.testing.assert_close(attend(q, k, v, CanvasSight.of(6, (8, 12))), want)
    assert torch.equal(CanvasSight.of(6, (8, 12)).causal_SK, attention_mask(14, [], torch.arange(6, 8))[:, :8])
