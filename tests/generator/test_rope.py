"""The generator's rotary positions."""

import math

import torch
from comfyui_hywu.hywu_core.generator.rope import rotary_table, rotate


def test_one_axis_is_a_rotation_of_neighbouring_features():
    positions = torch.tensor([0, 3])
    x = torch.randn(1, 2, 1, 4)
    out = rotate(x, rotary_table((positions,), 4))
    assert torch.equal(out[0, 0], x[0, 0])  # position 0 turns nothing
    for pair, frequency in enumerate((1.0, 0.01)):  # 10000^(-0/4), 10000^(-2/4)
        turned = complex(*x[0, 1, 0, 2 * pair:2 * pair + 2].tolist()) * complex(
            math.cos(3 * frequency), math.sin(3 * frequency))
        assert torch.allclose(out[0, 1, 0, 2 * pair:2 * pair + 2], torch.tensor([turned.real, turned.imag]), atol=1e-6)


def test_two_axes_share_the_head():
    rows, columns = torch.tensor([5, 5, 9]), torch.tensor([2, 7, 7])
    x = torch.randn(1, 3, 2, 16)
    out = rotate(x, rotary_table((rows, columns), 16))
    assert torch.equal(out[..., :8], rotate(x[..., :8], rotary_table((rows,), 8)))
    assert torch.equal(out[..., 8:], rotate(x[..., 8:], rotary_table((columns,), 8)))


def test_scores_depend_on_distance_only():
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(p: int, s: int) -> torch.Tensor:
        return (rotate(q, rotary_table((torch.tensor([p]),), 8)) * rotate(k, rotary_table((torch.tensor([s]),), 8))).sum()

    assert torch.allclose(score(4, 9), score(104, 109), atol=1e-4)
    assert not torch.allclose(score(4, 9), score(4, 10), atol=1e-4)


def test_rotation_is_done_in_fp32():
    x = torch.randn(1, 300, 2, 8).to(torch.bfloat16)
    table = rotary_table((torch.arange(300) * 17,), 8)
    out = rotate(x, table)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, rotate(x.float(), table).to(torch.bfloat16))


def test_rows_of_a_table():
    table = rotary_table((torch.arange(9), torch.arange(9) * 2), 8)
    part = rotary_table((torch.arange(4, 7), torch.arange(4, 7) * 2), 8)
    assert all(torch.equal(a, b) for a, b in zip(table.rows(4, 7), part, strict=True))
