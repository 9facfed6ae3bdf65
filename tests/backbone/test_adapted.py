"""Linears and experts as modules: a LoRA behind the weights comes and goes and leaves no trace."""

import copy

import pytest
import torch
from comfyui_hywu.hywu_core.backbone.adapted import AdaptedLinear, Experts
from comfyui_hywu.kernels import experts as fused
from comfyui_hywu.kernels import reference
from comfyui_hywu.kernels.padding import beside
from comfyui_hywu.kernels.reference import Adapter

WIDTH, INNER, EXPERTS = 16, 12, 4


def filled(module):
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return module


def adapters(module, rank, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {target.name: Adapter(torch.randn(target.a_shape(rank), generator=generator),
                                 torch.randn(target.b_shape(rank), generator=generator), torch.full((rank,), 0.7))
            for target in module.targets()}


def attach(module, loras):
    for name, lora in loras.items():
        module.attach(name, lora)


def detach(module):
    for name in module.attached():
        module.attach(name, None)


def call(module):
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(2, 5, WIDTH, generator=generator).to(next(module.parameters()).dtype)
    if isinstance(module, AdaptedLinear):
        return module(x)
    expert = torch.randint(EXPERTS, (10, 2), generator=generator)
    return module(x, expert, torch.rand(10, 2, generator=generator))


@pytest.fixture(params=("linear", "experts"))
def module(request):
    return filled(AdaptedLinear(WIDTH, INNER) if request.param == "linear" else Experts(EXPERTS, WIDTH, INNER))


@torch.no_grad()
def test_attached_and_detached(module):
    plain, weights = call(module), {name: value.clone() for name, value in module.state_dict().items()}
    for rank in (3, 8, 2):  # the room grows, and a smaller one leaves the larger one's rest behind
        loras = adapters(module, rank, seed=rank)
        attach(module, loras)
        with torch.enable_grad():
            wanted = call(module)  # by the reference
        assert not torch.allclose(wanted, plain, atol=1e-3)
        assert (call(module) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        detach(module)
        assert call(module).equal(plain)
        for name, value in module.state_dict().items():
            assert value.equal(weights[name])


@torch.no_grad()
def test_the_lora_lies_behind_the_weights():
    """So that one product computes both: nothing would fail without it, only be slow."""
    linear, experts = filled(AdaptedLinear(WIDTH, INNER)), filled(Experts(EXPERTS, WIDTH, INNER))
    attach(linear, adapters(linear, 4)), attach(experts, adapters(experts, 4))
    assert beside(linear.weight, linear.adapter.a, dim=0) is not None
    up, gate, down = (experts.adapters[name] for name in ("w3", "w1", "w2"))
    assert beside(experts.gate_and_up_proj, up.a, gate.a, dim=1) is not None
    assert beside(experts.down_proj, down.b, dim=2) is not None


@torch.no_grad()
def test_the_experts_take_as_many_large_products_with_a_lora_as_without(monkeypatch):
    module, widths = filled(Experts(EXPERTS, WIDTH, INNER)), []
    original = fused.grouped_gemm
    monkeypatch.setattr(fused, "grouped_gemm", lambda x, weight, ends: (
        widths.append(tuple(weight.shape[1:])), original(x, weight, ends))[1])
    call(module)
    assert widths == [(2 * INNER, WIDTH), (WIDTH, INNER)]
    widths.clear()
    attach(module, adapters(module, 4))
    call(module)
    assert widths == [(2 * INNER + 8, WIDTH), (WIDTH, INNER + 4)]


@torch.no_grad()
def test_matrices_in_any_layout(module):
    loras = adapters(module, 4)
    attach(module, loras)
    wanted = call(module)
    turned = {name: Adapter(lora.a.mT.contiguous().mT, lora.b.mT.contiguous().mT, lora.scale) for name, lora in loras.items()}
    attach(module, turned)
    assert (call(module) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    held = [module.adapter] if isinstance(module, AdaptedLinear) else module.adapters.values()
    # The kernels walk along the last axis.
    assert all(lora.a.stride(-1) == 1 and lora.b.stride(-1) == 1 for lora in held)


def test_in_and_out_of_inference_mode(module):
    loras = adapters(module, 4)
    with torch.inference_mode():
        attach(module, loras)
        first = call(module)
        detach(module)
    with torch.no_grad():
        attach(module, loras)
        assert call(module).equal(first)
        attach(module, adapters(module, 9))
        detach(module)
    with torch.inference_mode():
        attach(module, loras)
        assert (call(module) - first).abs().max() <= 1e-5 * first.abs().max()


@torch.no_grad()
def test_autocast_takes_the_reference(module):
    attach(module, adapters(module, 4))
    wanted = call(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (call(module).float() - wanted).abs().max() <= 0.02 * wanted.abs().max()


@torch.no_grad()
def test_a_moved_module_keeps_no_room():
    module = filled(Experts(EXPERTS, WIDTH, INNER))
    attach(module, adapters(module, 4))
    detach(module)
    moved = module.double()
    sizes = [parameter.untyped_storage().nbytes() for parameter in moved.parameters()]
    assert sizes == [8 * parameter.numel() for parameter in moved.parameters()]


@torch.no_grad()
def test_copies_and_moves_do_not_share_the_room(module):
    loras = adapters(module, 4)
    attach(module, loras)
    wanted = call(module)
    twin = copy.deepcopy(module)
    detach(module)
    assert (call(twin) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    attach(twin, adapters(twin, 4, seed=5))
    attach(module, loras)
    assert call(module).equal(wanted)
    detach(twin)
    moved = twin.double()
    attach(moved, {name: Adapter(*(part.double() for part in lora)) for name, lora in loras.items()})
    assert (call(moved).float() - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_gradients_take_the_reference(module, monkeypatch):
    seen = []
    name = "adapted_linear" if isinstance(module, AdaptedLinear) else "expert_mlp"
    original = getattr(reference, name)
    monkeypatch.setattr(reference, name, lambda *arguments, **options: (seen.append(1), original(*arguments, **options))[1])
    attach(module, adapters(module, 4))
    with torch.no_grad():
        call(module)
    assert not seen
    call(module)
    assert seen
