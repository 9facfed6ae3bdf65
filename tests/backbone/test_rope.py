"""Positions and rotation, worked out by hand."""

import math

import pytest
import torch
from comfyui_hywu.hywu_core.backbone import rope


def test_text_lies_on_the_diagonal_and_pictures_are_centred():
    # A 2 x 3 grid at 4: y = 4 + (6-2)/2 + r, x = floor(4 + (6-3)/2 + c) = floor(5.5 + c)
    got = rope.positions(11, [((4, 10), (2, 3))])
    assert got[:4].tolist() == [[i, i] for i in range(4)]
    assert got[4:10].tolist() == [[6, 5], [6, 6], [6, 7], [7, 5], [7, 6], [7, 7]]
    assert got[10].tolist() == [10, 10]


def test_padding_behind_a_grid_is_plain_text():
    assert rope.positions(9, [((1, 8), (2, 2))])[5:].tolist() == [[i, i] for i in range(5, 9)]


def test_a_grid_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="3x3.*20 tokens"):
        rope.positions(20, [((1, 8), (3, 3))])


def test_even_frequencies_turn_with_y_and_odd_ones_with_x():
    cos, sin = rope.table(torch.tensor([[2, 5]]), head_dim=8, base=100.0)
    angles = [(2, 5)[k % 2] * 100.0 ** (-2 * k / 8) for k in range(4)]
    torch.testing.assert_close(cos[0], torch.tensor([math.cos(a) for a in angles] * 2))
    torch.testing.assert_close(sin[0], torch.tensor([math.sin(a) for a in angles] * 2))


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 1, 1, 8, generator=generator), torch.randn(1, 1, 1, 8, generator=generator)

    def score(at, other):
        def turn(x, yx):
            return rope.rotate(x, *rope.table(torch.tensor([yx]), 8, 100.0))
        return (turn(q, at) * turn(k, other)).sum()

    torch.testing.assert_close(score((3, 4), (1, 9)), score((13, 24), (11, 29)))
    assert abs(score((3, 4), (1, 9)) - score((3, 4), (2, 9))) > 1e-4
