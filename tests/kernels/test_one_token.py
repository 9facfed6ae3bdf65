"""What a single token runs on a GPU, against fp64: its experts, and its attention to as many slots as the device says.

Triton's kernels run in its interpreter where there is no GPU; bf16 is left out of ``tl.dot`` there, which is wrong in it.
"""

import pytest
import torch
from comfyui_hywu.hywu_core.checkpoint.formats import Float8
from comfyui_hywu.kernels import experts, few_tokens, reference, token_attention
from comfyui_hywu.kernels.padding import with_room

from .test_fused import DEVICE, NEEDS_TRITON, WITH_TRITON, close, poison, random  # noqa: F401
from .test_reference import naive_experts

try:
    from comfyui_hywu.kernels import few_tokens_triton, token_attention_triton
except ImportError:
    few_tokens_triton = token_attention_triton = None

# Chosen experts of one or two tokens, of five.
CHOICES = {"two": [[4, 1]], "one": [[2]], "all": [[0, 1, 2, 3, 4]], "two tokens, one expert shared": [[3, 0], [1, 3]],
           "twice the same": [[2, 2]]}


def weights_of(experts_count, width, inner, dtype=torch.float32):
    """Gate and up, and down, with NaN in the room behind them."""
    wide = with_room(random(experts_count, 2 * inner, width, seed=1, dtype=dtype), 1, 5)
    long = with_room(random(experts_count, width, inner, seed=2, dtype=dtype), 2, 3)
    wide[:, 2 * inner :], long[:, :, inner:] = float("nan"), float("nan")
    return wide[:, : 2 * inner], long[:, :, :inner]


@NEEDS_TRITON
@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("width, inner", ((12, 10), (600, 33), (64, 520)))
def test_experts_of_a_few_tokens(poison, name, width, inner):  # noqa: F811
    expert = torch.tensor(CHOICES[name], device=DEVICE)
    gate_and_up, down = weights_of(5, width, inner)
    untouched = [number for number in range(5) if number not in expert]
    gate_and_up[untouched], down[untouched] = float("nan"), float("nan")
    x, weight = random(len(expert), width, seed=3), random(*expert.shape, seed=4).abs()
    got = few_tokens_triton.kernel(x, gate_and_up, down, expert, weight)
    close(got, reference.expert_mlp(x.double(), gate_and_up.double(), down.double(), expert, weight.double()))


@NEEDS_TRITON
def test_experts_of_one_token_are_those_of_the_slow_loop():
    gate_and_up, down = weights_of(5, 12, 10)
    x, expert, weight = random(1, 12, seed=3), torch.tensor([[3, 0]], device=DEVICE), torch.tensor([[0.7, 0.3]], device=DEVICE)
    none = [None] * 3
    want = naive_experts(*(part.cpu() for part in (x, gate_and_up, down, expert, weight)), *none)
    close(few_tokens_triton.kernel(x, gate_and_up, down, expert, weight), want)


@NEEDS_TRITON
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision_is_summed_in_fp32(dtype):
    gate_and_up, down = weights_of(4, 300, 40, dtype)
    x, expert = random(1, 300, seed=3, dtype=dtype) / 16, torch.tensor([[1, 2]], device=DEVICE)
    weight = torch.tensor([[0.7, 0.3]], device=DEVICE)
    want = reference.expert_mlp(*(part.double() for part in (x, gate_and_up, down)), expert, weight.double())
    errors = [float((function(x, gate_and_up, down, expert, weight).double() - want).norm() / want.norm())
              for function in (few_tokens_triton.kernel, reference.expert_mlp)]
    # The interpreter cuts bf16 off instead of rounding it: up to twice the error.
    cut = dtype == torch.bfloat16 and DEVICE == "cpu"
    assert errors[0] <= (2 if cut else 1.05) * errors[1] and errors[1] < 0.02


@NEEDS_TRITON
@pytest.mark.parametrize("width, inner", ((48, 32), (600, 80)))
def test_fp8_experts_are_read_as_they_are(poison, width, inner):  # noqa: F811
    codec, weights, packed = Float8(), weights_of(5, width, inner), []
    for weight in weights:
        packed.append(codec.pack(weight * torch.logspace(-3, 0, weight.shape[1], device=DEVICE)[:, None]))
    plain = [codec.unpack(each, torch.empty_like(weight)) for each, weight in zip(packed, weights, strict=True)]
    x, expert, weight = random(2, width, seed=3), torch.tensor([[4, 1], [1, 2]], device=DEVICE), random(2, 2, seed=4).abs()
    got = few_tokens_triton.kernel(
        x, *(each["weight"] for each in packed), expert, weight, tuple(each["weight_scale"] for each in packed))
    close(got, reference.expert_mlp(x.double(), *(each.double() for each in plain), expert, weight.double()))


@NEEDS_TRITON
def test_a_single_token_takes_the_kernel_where_there_is_one_and_has_no_lora(monkeypatch):
    calls = []
    kernel = few_tokens_triton.kernel
    monkeypatch.setattr(few_tokens, "chosen", lambda device, dtype: lambda *given: calls.append(1) or kernel(*given))
    gate_and_up, down = weights_of(5, 16, 12)
    for tokens, expected in ((1, 1), (2, 2), (3, 2)):
        x = random(tokens, 16, seed=3)
        expert, weight = torch.tensor([[3, 0]] * tokens, device=DEVICE), torch.tensor([[0.7, 0.3]] * tokens, device=DEVICE)
        given = x, gate_and_up, down, expert, weight
        close(experts.expert_mlp(*given), reference.expert_mlp(*given))
        assert len(calls) == expected
    sizes = (12, 16), (12, 16), (16, 12)
    lora = [reference.Adapter(random(5, 4, inner, seed=6), random(5, out, 4, seed=7), None) for out, inner in sizes]
    x, expert, weight = random(1, 16), torch.tensor([[3, 0]], device=DEVICE), torch.tensor([[0.7, 0.3]], device=DEVICE)
    close(experts.expert_mlp(x, gate_and_up, down, expert, weight, *lora),
          reference.expert_mlp(x, gate_and_up, down, expert, weight, *lora))
    assert len(calls) == 2


# ---- attention


@pytest.mark.parametrize("triton", WITH_TRITON)
@pytest.mark.parametrize("rows, group, kv_heads, head_dim", ((1, 4, 2, 16), (2, 1, 3, 8), (1, 3, 1, 40)))
@pytest.mark.parametrize("seen", (1, 2, 63, 64, 65, 1024, 1025, 1100))
def test_attention_to_the_slots_in_use(poison, triton, rows, group, kv_heads, head_dim, seen):  # noqa: F811
    """Block edges and part edges; NaN behind the slots in use, in a part of something larger."""
    function = token_attention_triton.kernel if triton else token_attention.composed
    keys, values = (random(rows, kv_heads, 1200, head_dim, seed=seed).narrow(2, 0, 1100) for seed in (1, 2))
    keys[:, :, seen:], values[:, :, seen:] = float("nan"), float("nan")
    q = random(rows, 1, group * kv_heads, head_dim).transpose(1, 2)
    got = function(q, keys, values, torch.tensor([seen - 1], device=DEVICE))
    assert got.shape == (rows, group * kv_heads, 1, head_dim)
    want = torch.nn.functional.scaled_dot_product_attention(
        q.double(), keys[:, :, :seen].double(), values[:, :, :seen].double(), enable_gqa=True)
    close(got, want)


@NEEDS_TRITON
def test_large_scores_do_not_overflow():
    keys, values = random(1, 1, 100, 16, seed=1) * 100, random(1, 1, 100, 16, seed=2)
    q, last = random(1, 2, 1, 16) * 100, torch.tensor([99], device=DEVICE)
    close(token_attention_triton.kernel(q, keys, values, last), token_attention.composed(q, keys, values, last), 1e-4)


@NEEDS_TRITON
def test_half_precision_attention():
    keys, values = (random(1, 2, 300, 32, seed=seed, dtype=torch.float16) for seed in (1, 2))
    q, last = random(1, 8, 1, 32, dtype=torch.float16), torch.tensor([280], device=DEVICE)
    close(token_attention_triton.kernel(q, keys, values, last),
          token_attention.composed(q.double(), keys.double(), values.double(), last), 2e-3)


@NEEDS_TRITON
def test_they_try_themselves_out():
    device = torch.device(DEVICE)
    assert few_tokens_triton.works_in_fp8(device, torch.float32)
    assert few_tokens_triton.works(device, torch.float32) and token_attention_triton.works(device, torch.float32)
    assert few_tokens_triton.works(device, torch.bfloat16)
