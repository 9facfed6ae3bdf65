"""Masks drawn by hand."""

import torch
from comfyui_hywu.hywu_core.backbone.mask import attention_mask


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
