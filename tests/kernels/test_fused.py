"""Routing, grouped products, the kernel between them and the whole expert path against fp64, over awkward routings.

Triton's kernels run in its interpreter where there is no GPU; bf16 is left out there, because its ``tl.dot`` is wrong in it.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
from comfyui_hywu.kernels import choice, experts, grouped_gemm, linear, reference, swiglu_lora
from comfyui_hywu.kernels.padding import beside, with_room
from comfyui_hywu.kernels.reference import Adapter
from comfyui_hywu.kernels.routing import combine, route

from .test_reference import ROUTINGS, D, E, F, R, adapter, naive_experts

try:
    from comfyui_hywu.kernels import grouped_gemm_triton, swiglu_lora_triton
except ImportError:
    grouped_gemm_triton = swiglu_lora_triton = None

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEEDS_TRITON = pytest.mark.skipif(grouped_gemm_triton is None, reason="Triton is not installed: its kernels are not tried")
NEEDS_LIBRARY = pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="this torch has no grouped_mm")
GEMMS = [pytest.param("library", marks=NEEDS_LIBRARY), "loop", pytest.param("triton", marks=NEEDS_TRITON)]
WITH_TRITON = [False, pytest.param(True, marks=NEEDS_TRITON)]
# Rows of each expert: the Triton tiles have 64.
COUNTS = {
    "spread": (3, 1, 7, 2), "empty experts": (0, 5, 0, 0), "empty at the ends": (0, 0, 4, 0), "one hot": (0, 0, 0, 70),
    "on the edges of tiles": (64, 63, 65, 128), "one token": (0, 1, 0, 0), "none": (0, 0, 0, 0), "one expert": (66,),
    "64 experts, every second empty": tuple(number % 2 * 3 for number in range(64)),
}


def gemm_of(name):
    return grouped_gemm_triton.kernel if name == "triton" else {
        "library": grouped_gemm.library, "loop": grouped_gemm.looped}[name]


def ends_of(counts):
    return torch.tensor(counts, dtype=torch.int32).cumsum(0).int().to(DEVICE)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(got, want, part=1e-5):
    assert torch.isfinite(got).all()
    got, want = got.double().cpu(), want.double().cpu()
    assert (got - want).abs().max() <= part * max(1e-30, float(want.abs().max()))


@pytest.fixture
def poison(monkeypatch):
    """New memory is full of NaN: what a kernel does not write is seen."""
    def new_empty(self, *shape, **options):
        shape = shape[0] if isinstance(shape[0], tuple | list) else shape
        return self.new_full(shape, float("nan") if self.is_floating_point() else -1, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


def test_triton_where_it_works_and_its_twin_elsewhere(monkeypatch):
    def kernel():
        raise AssertionError("only chosen")

    def chosen(device, works=True):
        module = SimpleNamespace(kernel=kernel, works=lambda device, dtype: works)
        monkeypatch.setitem(sys.modules, "comfyui_hywu.kernels.made_up", module)
        return choice.triton_or(print, "print", "made_up", torch.device(device), torch.float32)

    assert chosen("cuda") == (kernel, "Triton")
    assert chosen("cuda", works=False) == chosen("cpu") == (print, "print")
    function, name = choice.triton_or(print, "print", "not_there", torch.device("cuda"), torch.float32)
    assert function is print and "not installed" in name


@NEEDS_TRITON
def test_the_triton_kernels_try_themselves_out():
    device = torch.device(DEVICE)
    assert grouped_gemm_triton.works(device, torch.float32) and swiglu_lora_triton.works(device, torch.float32)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize("inner, out", ((32, 48), (44, 132), (4, 8)))
def test_grouped_products(poison, gemm, counts, inner, out):
    x, weight = random(sum(counts), inner), random(len(counts), out, inner, seed=1)
    number = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(DEVICE)
    want = torch.bmm(weight[number].double(), x.double().unsqueeze(2)).squeeze(2)
    got = gemm_of(gemm)(x, weight, ends_of(counts))
    assert got.shape == want.shape
    if sum(counts):
        close(got, want)


@pytest.mark.parametrize("gemm", GEMMS)
def test_grouped_products_of_views(gemm):
    """Rows of something wider, NaN behind them."""
    wide_x, wide_weight = random(9, 48).fill_(float("nan")), random(3, 40, 48).fill_(float("nan"))
    x, weight = wide_x[:, :32].copy_(random(9, 32, seed=1)), wide_weight[:, :24, :32].copy_(random(3, 24, 32, seed=2))
    close(gemm_of(gemm)(x, weight, ends_of((4, 0, 5))), grouped_gemm.looped(x.double(), weight.double(), ends_of((4, 0, 5))))


@NEEDS_TRITON
def test_half_precision_in_triton():
    x, weight = random(70, 64, dtype=torch.float16), random(2, 80, 64, seed=1, dtype=torch.float16)
    want = grouped_gemm.looped(x.double(), weight.double(), ends_of((1, 69)))
    close(grouped_gemm_triton.kernel(x, weight, ends_of((1, 69))), want, 1e-3)


@pytest.mark.parametrize("inner", (3, 5, 30), ids=str)
def test_what_the_library_refuses_is_done_all_the_same(inner):
    x, weight = random(7, inner), random(2, 9, inner, seed=1)
    want = grouped_gemm.looped(x.double(), weight.double(), ends_of((3, 4)))
    close(grouped_gemm.grouped_gemm(x, weight, ends_of((3, 4))), want)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("triton", WITH_TRITON)
@pytest.mark.parametrize("inner, rank", ((48, 8), (70, 16), (96, 3)))
def test_between_the_products(poison, monkeypatch, triton, counts, inner, rank):
    fused = swiglu_lora_triton.kernel if triton else swiglu_lora.composed
    monkeypatch.setattr(swiglu_lora, "chosen", lambda device, dtype: fused)
    number = len(counts)
    up, gate, down = (
        Adapter(random(number, rank, inner, seed=place), random(number, inner, rank, seed=10 + place), None)
        for place in range(3))
    first, ends = random(sum(counts), 2 * inner + 2 * rank, seed=20), ends_of(counts)
    a, b, u3, u1 = first.double().split((inner, inner, rank, rank), dim=1)
    hidden = a + grouped_gemm.looped(u3, up.b.double(), ends)
    hidden = hidden * torch.nn.functional.silu(b + grouped_gemm.looped(u1, gate.b.double(), ends))
    last = grouped_gemm.looped(hidden, down.a.double(), ends)
    got = swiglu_lora.swiglu_lora(first.clone(), up, gate, down, ends)
    assert got.shape == (sum(counts), inner + rank)
    if sum(counts):
        close(got[:, :inner], hidden)
        close(got[:, inner:], last)


@pytest.mark.parametrize("name", ROUTINGS)
def test_routing_and_back(name):
    expert_TK = ROUTINGS[name].to(DEVICE)
    routes = route(expert_TK, E)
    counts = torch.bincount(expert_TK.flatten(), minlength=E)
    assert routes.ends_E.tolist() == counts.cumsum(0).tolist()
    assert expert_TK.flatten()[routes.pair_P].equal(expert_TK.flatten().sort().values)
    y, weight = random(len(routes.token_P), D), torch.rand(expert_TK.shape, device=DEVICE)
    want = torch.zeros(len(expert_TK), D, dtype=torch.float64, device=DEVICE)
    for row, pair in enumerate(routes.pair_P.tolist()):
        assert routes.token_P[row] == pair // expert_TK.shape[1]
        want[pair // expert_TK.shape[1]] += weight.flatten()[pair].double() * y[row].double()
    close(combine(y, routes, weight), want)


def with_loras(beside_weights: bool):
    """Weights and the adapters of E experts; behind the weights is NaN, or, ``beside_weights``, what fits there of the LoRA."""
    generator = torch.Generator().manual_seed(1)
    gate_and_up, down = torch.randn(E, 2 * F, D, generator=generator), torch.randn(E, D, F, generator=generator)
    loras = [adapter(generator, F, D, (E,)), adapter(generator, F, D, (E,), 0.6), adapter(generator, D, F, (E,), -1.1)]
    loras = [Adapter(*(part.to(DEVICE) for part in each)).folded() for each in loras]
    wide, long = with_room(gate_and_up.to(DEVICE), 1, 2 * R + 1), with_room(down.to(DEVICE), 2, R + 1)
    wide[:, 2 * F :], long[:, :, F:] = float("nan"), float("nan")
    gate_and_up, down = wide[:, : 2 * F], long[:, :, :F]
    if beside_weights:
        loras[0] = loras[0]._replace(a=wide[:, 2 * F : 2 * F + R].copy_(loras[0].a))
        loras[1] = loras[1]._replace(a=wide[:, 2 * F + R : 2 * F + 2 * R].copy_(loras[1].a))
        loras[2] = loras[2]._replace(b=long[:, :, F : F + R].copy_(loras[2].b))
    return gate_and_up, down, loras


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("lora", ("none", "beside", "apart"))
@pytest.mark.parametrize("triton", WITH_TRITON)
def test_experts_equal_a_slow_loop(poison, monkeypatch, name, lora, triton):
    if triton:
        monkeypatch.setattr(grouped_gemm, "chosen", lambda device, dtype, in_line: grouped_gemm_triton.kernel)
        monkeypatch.setattr(swiglu_lora, "chosen", lambda device, dtype: swiglu_lora_triton.kernel)
    expert = ROUTINGS[name].to(DEVICE)
    gate_and_up, down, loras = with_loras(lora == "beside")
    loras = loras if lora != "none" else [None] * 3
    x, weight = random(len(expert), D, seed=5), torch.rand(expert.shape, device=DEVICE)
    assert lora != "beside" or beside(gate_and_up, loras[0].a, loras[1].a, dim=1) is not None
    got = experts.expert_mlp(x, gate_and_up, down, expert, weight, *loras)
    slow = [each and Adapter(each.a.cpu(), each.b.cpu(), torch.ones(R)) for each in loras]
    close(got, naive_experts(x.cpu(), gate_and_up.cpu(), down.cpu(), expert.cpu(), weight.cpu(), *slow))
    close(got, reference.expert_mlp(x, gate_and_up, down, expert, weight, *loras))


@pytest.mark.parametrize("at_once", (1, 3, 6))
@pytest.mark.parametrize("lora", ("none", "beside"))
def test_tokens_in_pieces(monkeypatch, at_once, lora):
    expert = ROUTINGS["spread"].to(DEVICE)
    gate_and_up, down, loras = with_loras(True)
    loras = loras if lora != "none" else [None] * 3
    x, weight = random(len(expert), D, seed=5), torch.rand(expert.shape, device=DEVICE)
    whole = experts.expert_mlp(x, gate_and_up, down, expert, weight, *loras)
    monkeypatch.setattr(experts, "TOKENS_AT_ONCE", at_once)
    close(experts.expert_mlp(x, gate_and_up, down, expert, weight, *loras), whole.double())


def test_a_room_of_zeros_gives_the_bits_of_a_lora_of_zeros_and_the_base():
    gate_and_up, down, loras = with_loras(True)
    expert = ROUTINGS["spread"].to(DEVICE)
    x, weight = random(len(expert), D), torch.rand(expert.shape, device=DEVICE)
    for part in (loras[0].a, loras[1].a, loras[2].b):
        part.zero_()
    still = experts.expert_mlp(x, gate_and_up, down, expert, weight, *loras)
    for part in (loras[0].b, loras[1].b, loras[2].a):
        part.zero_()
    assert experts.expert_mlp(x, gate_and_up, down, expert, weight, *loras).equal(still)
    close(still, reference.expert_mlp(x, gate_and_up, down, expert, weight))


def test_bf16_is_as_close_to_fp64_as_the_reference():
    """The fused path rounds in other places, not more often: its error is at most 1.3 x the reference's."""
    gate_and_up, down, loras = with_loras(True)
    expert = ROUTINGS["spread"].repeat(9, 1).to(DEVICE)
    x, weight = random(len(expert), D), torch.rand(expert.shape, device=DEVICE)
    half = [part.bfloat16() for part in (x, gate_and_up, down)]
    small = [Adapter(each.a.bfloat16(), each.b.bfloat16(), None) for each in loras]
    want = reference.expert_mlp(*(part.double() for part in half), expert, weight.double(),
                                *(Adapter(each.a.double(), each.b.double(), None) for each in small))
    errors = [float((function(*half, expert, weight, *small).double() - want).square().mean().sqrt())
              for function in (experts.expert_mlp, reference.expert_mlp)]
    assert errors[0] <= 1.3 * errors[1] and errors[1] < 0.05 * float(want.square().mean().sqrt())


def test_linear_with_the_lora_behind_its_rows():
    generator = torch.Generator().manual_seed(2)
    x, weight, lora = torch.randn(9, D, generator=generator), torch.randn(F, D, generator=generator), adapter(generator, F, D)
    buffer = with_room(weight, 0, R + 2).clone()
    buffer[F + R :] = float("nan")
    behind = lora._replace(a=buffer[F : F + R].copy_(lora.a))
    want = reference.adapted_linear(x.double(), weight.double(), Adapter(*(part.double() for part in lora)))
    close(linear.adapted_linear(x, buffer[:F], behind), want)
    close(linear.adapted_linear(x, weight, lora), want)
    assert linear.adapted_linear(x, weight).equal(reference.adapted_linear(x, weight))


def test_beside_only_what_is():
    buffer = torch.arange(60.0).view(2, 6, 5)
    first, second = buffer[:, :3], buffer[:, 3:5]
    assert beside(first, second, dim=1).equal(buffer[:, :5])
    assert beside(buffer[:, :, :2], buffer[:, :, 2:], dim=2).equal(buffer)
    assert beside(first, buffer[:, 4:], dim=1) is None
    assert beside(second, first, dim=1) is None
    assert beside(first, second.clone(), dim=1) is None
    assert beside(buffer[0], buffer[1, :2], dim=0).equal(buffer.view(12, 5)[:8])


def test_room_keeps_the_weight_and_its_alignment():
    weight = random(3, 7, 5)
    for dim in (1, 2):
        buffer = with_room(weight, dim, 3)
        assert buffer.narrow(dim, 0, weight.shape[dim]).equal(weight) and buffer.shape[dim] >= weight.shape[dim] + 3
    assert with_room(weight, 2, 3).stride(1) % 4 == 0
