"""The network against a slow one written straight from the spec, in slices, in batches, and backwards."""

import pytest
import torch
from comfyui_hywu.hywu_core.backbone.layer import RMSNorm
from comfyui_hywu.hywu_core.config import GeneratorConfig
from comfyui_hywu.hywu_core.errors import CheckpointError
from comfyui_hywu.hywu_core.generator import blocks
from comfyui_hywu.hywu_core.generator.model import ParameterGenerator

N, P, R, G, C, HEAD, PIECES = 3, 19, 4, 24, 5, 8, 2  # sizes of conftest's configuration; dim_accumulation is 2, too


def naive(state: dict[str, torch.Tensor], condition_SD: torch.Tensor) -> torch.Tensor:
    """Spec section 4 in fp64, one head and one pair of axes at a time, rotations as complex numbers."""
    w = {name: tensor.double() for name, tensor in state.items()}

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def rms(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"model.{name}.weight"]

    def turn(x, positions):  # x (L, HEAD), positions: one list per axis
        width = HEAD // len(positions)
        frequencies = torch.tensor([10000.0 ** (-2 * j / width) for j in range(width // 2)]).double()
        angles = torch.cat([torch.tensor(axis).double()[:, None] * frequencies for axis in positions], -1)
        turned = torch.view_as_complex(x.reshape(len(x), -1, 2)) * torch.exp(1j * angles)
        return torch.view_as_real(turned).reshape(len(x), -1)

    def attend(x, source, name, here, there):
        q, k, v = linear(x, f"{name}.W_q"), linear(source, f"{name}.W_k"), linear(source, f"{name}.W_v")
        heads = []
        for h in range(G // HEAD):
            part = slice(h * HEAD, (h + 1) * HEAD)
            scores = turn(q[:, part], here) @ turn(k[:, part], there).T / HEAD**0.5
            heads.append(scores.softmax(-1) @ v[:, part])
        return linear(torch.cat(heads, -1), f"{name}.W_o")

    context = rms(linear(condition_SD.double(), "hidden_in"), "norm_input")
    x = torch.zeros(N, P * PIECES, G).double()
    for n in range(N):
        for hi in range(P):
            for wi in range(PIECES):
                x[n, hi * PIECES + wi] = torch.cat([
                    w["model.hw_pos.weight"][hi * R + wi * 2 + a] + w["model.layer_pos.weight"][n] for a in range(2)])
    x = rms(x, "norm_tokens")
    along, row = [list(range(N))], [[i // PIECES for i in range(P * PIECES)], [i % PIECES for i in range(P * PIECES)]]
    everywhere = [[n for n in range(N) for _ in range(P * PIECES)], list(range(P * PIECES)) * N]
    diagonal = [[i + P for i in range(len(context))]] * 2
    for i in range(2):
        name = f"blocks.{i}"
        y = rms(x, f"{name}.norm1")
        x = x + torch.stack([attend(y[:, j], y[:, j], f"model.{name}.self_attn_n", along, along) for j in range(P * PIECES)], 1)
        y = rms(x, f"{name}.norm2")
        x = x + torch.stack([attend(y[n], y[n], f"model.{name}.self_attn_hw", row, row) for n in range(N)])
        y = rms(x, f"{name}.norm3").reshape(N * P * PIECES, G)
        x = x + attend(y, context, f"model.{name}.self_attn_cross", everywhere, diagonal).reshape(x.shape)
        y = linear(rms(x, f"{name}.norm4"), f"model.{name}.feed_forward.fc1")
        x = x + linear(y * y.sigmoid(), f"model.{name}.feed_forward.fc2")
    x = rms(x, "norm_final")
    raw = torch.zeros(N, P, R, C).double()
    for n in range(N):
        for p in range(P):
            side = "A" if p < 9 else "B"
            for r in range(R):
                half = x[n, p * PIECES + r // 2, (r % 2) * 12:(r % 2) * 12 + 12]
                raw[n, p, r] = linear(half, f"model.proj_out_{side}")
    return raw


@pytest.mark.parametrize("length", [1, 2, 40])  # one token; less than a row; more than a row's 38 tokens
def test_equals_the_spec(model, length):
    condition = torch.randn(length, 10)
    with torch.no_grad():
        got, want = model(condition[None])[0].double(), naive(model.state_dict(), condition)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("tokens_at_once", [1, 50, 77, 113])  # single rows; odd cuts along both axes; just under everything
def test_slices_change_nothing(model, monkeypatch, tokens_at_once):
    condition = torch.randn(2, 6, 10)
    with torch.no_grad():
        whole = model(condition)
        monkeypatch.setattr(blocks, "TOKENS_AT_ONCE", tokens_at_once)
        sliced = model(condition)
    assert (sliced - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_slices_bound_what_the_feed_forward_holds(model, monkeypatch):
    monkeypatch.setattr(blocks, "TOKENS_AT_ONCE", 50)
    seen = []
    wide = model.model.blocks[0].feed_forward.fc1
    wide.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:3].numel()))
    with torch.no_grad():
        model(torch.randn(1, 6, 10))
    assert seen == [38, 38, 38]


def test_rows_of_a_batch_do_not_see_each_other(model):
    conditions = torch.randn(3, 7, 10)
    with torch.no_grad():
        together = model(conditions)
        for i in range(3):
            alone = model(conditions[i:i + 1])
            assert torch.allclose(together[i], alone[0], atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_gradients_reach_every_weight_whatever_the_slices(model, monkeypatch):
    condition = torch.randn(2, 6, 10, requires_grad=True)
    model(condition).square().mean().backward()
    whole = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert condition.grad.abs().min() > 0
    # Key biases barely matter (without rotation they would not at all), so only that a gradient arrived is asked.
    assert all(grad.abs().max() > 0 for grad in whole.values())
    monkeypatch.setattr(blocks, "TOKENS_AT_ONCE", 50)
    model.zero_grad()
    model(condition).square().mean().backward()
    assert all(torch.equal(parameter.grad, whole[name]) for name, parameter in model.named_parameters())


def test_norm_rounds_before_the_weight():
    torch.manual_seed(0)
    norm, x = RMSNorm(64, 1e-6).to(torch.bfloat16), (3 * torch.randn(50, 64)).to(torch.bfloat16)
    torch.nn.init.normal_(norm.weight)
    wide = x.float()
    normalised = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(torch.bfloat16)
    with torch.no_grad():
        # One bf16 step apart at most where fp32 sums round differently, and nearly nowhere.
        assert (norm(x) == normalised * norm.weight).float().mean() > 0.995


def test_bf16_follows_fp32(model):
    condition = torch.randn(1, 12, 10)
    with torch.no_grad():
        exact = model(condition)
        rounded = model.to(torch.bfloat16)(condition.to(torch.bfloat16))
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


@pytest.mark.parametrize("changes, message", [
    ({"output_dim": 6}, "output_dim is 6, .* 5 wide"),
    ({"head_dim": 6}, "head_dim 6 is not a multiple of 4"),
    ({"head_dim": 16}, "d_model 24 is not a multiple of head_dim 16"),
])
def test_contradicting_sizes_are_refused(raw_config, changes, message):
    with pytest.raises(CheckpointError, match=message):
        ParameterGenerator(GeneratorConfig.from_dict({**raw_config, **changes}))
