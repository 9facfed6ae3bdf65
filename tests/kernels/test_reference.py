"""The reference arithmetic against a slow fp64 loop over tokens, over awkward routings."""

import pytest
import torch
from comfyui_hywu.kernels.reference import Adapter, adapted_linear, adapted_linear_rows, expert_mlp, expert_mlp_rows

D, F, E, K, R = 12, 10, 5, 2, 3


def adapter(generator, out_features, in_features, experts=(), scale=1.7):
    return Adapter(
        torch.randn(*experts, R, in_features, generator=generator), torch.randn(*experts, out_features, R, generator=generator),
        torch.full((R,), scale))


def naive_experts(x, gate_and_up, down, expert, weight, up, gate, last):
    """One token and one expert at a time, in fp64, straight from spec sections 2 and 3."""
    out = torch.zeros(len(x), D, dtype=torch.float64)
    for token in range(len(x)):
        for choice in range(expert.shape[1]):
            e, row = int(expert[token, choice]), x[token].double()
            halves = gate_and_up[e].double() @ row
            a, b = halves[:F], halves[F:]
            if up is not None:
                a = a + up.scale[0] * (up.b[e].double() @ (up.a[e].double() @ row))
                b = b + gate.scale[0] * (gate.b[e].double() @ (gate.a[e].double() @ row))
            hidden = a * torch.nn.functional.silu(b)
            y = down[e].double() @ hidden
            if last is not None:
                y = y + last.scale[0] * (last.b[e].double() @ (last.a[e].double() @ hidden))
            out[token] += weight[token, choice].double() * y
    return out


ROUTINGS = {
    "spread": torch.tensor([[0, 1], [2, 3], [4, 0], [1, 2], [3, 4], [0, 2], [1, 4]]),
    "one hot expert, the others empty": torch.tensor([[3, 3]] * 7),
    "first and last expert empty": torch.tensor([[1, 2], [2, 3], [3, 1]]),
    "one token": torch.tensor([[4, 0]]),
    "one token for one expert": torch.tensor([[2]]),
    "all experts for a token": torch.arange(E).repeat(3, 1),
}


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("with_lora", (False, True))
def test_experts_equal_a_slow_loop(name, with_lora):
    generator, expert = torch.Generator().manual_seed(1), ROUTINGS[name]
    x = torch.randn(len(expert), D, generator=generator)
    gate_and_up, down = torch.randn(E, 2 * F, D, generator=generator), torch.randn(E, D, F, generator=generator)
    weight = torch.rand(expert.shape, generator=generator)
    loras = (None, None, None)
    if with_lora:
        loras = (adapter(generator, F, D, (E,)), adapter(generator, F, D, (E,), 0.6), adapter(generator, D, F, (E,), -1.1))
    got = expert_mlp(x, gate_and_up, down, expert, weight, *loras)
    want = naive_experts(x, gate_and_up, down, expert, weight, *loras)
    assert (got.double() - want).abs().max() <= 1e-5 * want.abs().max()


def test_adapted_linear_equals_fp64():
    generator = torch.Generator().manual_seed(2)
    x, weight = torch.randn(9, D, generator=generator), torch.randn(F, D, generator=generator)
    lora = adapter(generator, F, D)
    want = x.double() @ weight.double().T + 1.7 * (x.double() @ lora.a.double().T) @ lora.b.double().T
    assert (adapted_linear(x, weight, lora).double() - want).abs().max() <= 1e-5 * want.abs().max()


def test_ranks_side_by_side_are_the_sum_of_two_loras():
    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(4, D, generator=generator), torch.zeros(F, D)
    one, two = adapter(generator, F, D, scale=0.5), adapter(generator, F, D, scale=-2.0)
    both = Adapter(torch.cat((one.a, two.a)), torch.cat((one.b, two.b), dim=1), torch.cat((one.scale, two.scale)))
    separately = adapted_linear(x, weight, one) + adapted_linear(x, weight, two)
    torch.testing.assert_close(adapted_linear(x, weight, both), separately)


def test_a_bf16_strength_is_not_rounded():
    """0.3 is 0.3008 in bf16: the scale must act in fp32. Identity matrices leave nothing else to round."""
    x, weight = torch.full((1, R), 1.0, dtype=torch.bfloat16), torch.zeros(R, R, dtype=torch.bfloat16)
    eye = torch.eye(R, dtype=torch.bfloat16)
    hundred = Adapter(eye * 1024, eye, torch.full((R,), 0.3003))
    # 1024 * 0.3003 = 307.5 -> bf16 308; through a bf16 scale it would be 0.30078 * 1024 = 308 as well, so use a finer probe.
    probe = Adapter(eye * 255, eye, torch.full((R,), 1.0 + 2**-9))
    assert adapted_linear(x, weight, hundred)[0, 0] == torch.tensor(1024 * 0.3003).bfloat16()
    assert adapted_linear(x, weight, probe)[0, 0] == torch.tensor(255 * (1.0 + 2**-9)).bfloat16()


def test_gradients_reach_the_lora():
    generator = torch.Generator().manual_seed(4)
    lora = [adapter(generator, F, D, (E,)), adapter(generator, F, D, (E,)), adapter(generator, D, F, (E,))]
    for part in lora:
        part.a.requires_grad_(), part.b.requires_grad_()
    expert = ROUTINGS["spread"]
    out = expert_mlp(
        torch.randn(len(expert), D, generator=generator), torch.randn(E, 2 * F, D, generator=generator),
        torch.randn(E, D, F, generator=generator), expert, torch.rand(expert.shape, generator=generator), *lora)
    out.square().sum().backward()
    assert all(part.a.grad.abs().sum() > 0 and part.b.grad.abs().sum() > 0 for part in lora)


def rows_adapter(generator, rows, out_features, in_features, experts=(), scale=1.3):
    return Adapter(
        torch.randn(rows, *experts, R, in_features, generator=generator),
        torch.randn(rows, *experts, out_features, R, generator=generator), torch.full((R,), scale))


@pytest.mark.parametrize("loras", (3, 1), ids=("one a row", "one for all rows"))
def test_rows_equal_one_row_at_a_time(loras):
    generator, rows, length = torch.Generator().manual_seed(2), 3, 5
    x = torch.randn(rows, length, D, generator=generator)
    linear, weight = rows_adapter(generator, loras, F, D), torch.randn(F, D, generator=generator)
    got = adapted_linear_rows(x, weight, linear)
    for row in range(rows):
        one = Adapter(linear.a[row % loras], linear.b[row % loras], linear.scale)
        assert torch.allclose(got[row], adapted_linear(x[row], weight, one), atol=1e-5)

    gate_and_up, down = torch.randn(E, 2 * F, D, generator=generator), torch.randn(E, D, F, generator=generator)
    expert = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(rows * length)]).view(rows, length, K)
    share = torch.rand(rows, length, K, generator=generator)
    adapters = [rows_adapter(generator, loras, F, D, (E,)), rows_adapter(generator, loras, F, D, (E,), 0.4),
                rows_adapter(generator, loras, D, F, (E,), -0.7)]
    got = expert_mlp_rows(x, gate_and_up, down, expert, share, *adapters)
    for row in range(rows):
        one = [Adapter(each.a[row % loras], each.b[row % loras], each.scale) for each in adapters]
        want = expert_mlp(x[row], gate_and_up, down, expert[row], share[row], *one)
        assert (got[row] - want).abs().max() <= 1e-5 * want.abs().max()
