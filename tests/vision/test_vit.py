"""The SigLIP2 tower against the library's own forward, its names, positions, padding and loading; the aligner."""

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from comfyui_hywu.hywu_core.errors import CheckpointError
from comfyui_hywu.hywu_core.vision.vit import Aligner, VisionTower

# As published, keys included that steer nothing here and that newer libraries refuse.
VIT = {
    "_attn_implementation": "sdpa", "attention_dropout": 0.0, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
    "num_channels": 3, "output_attentions": False, "output_hidden_states": False, "use_return_dict": True,
    "vision_use_head": True,
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "num_patches": 16,
    "patch_size": 16}


def config(depth=2, **vit):
    return SimpleNamespace(vit=VIT | vit, hidden_size=40, vit_aligner_depth=depth)


def randomise(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            one = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(one + 0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def tower():
    tower = VisionTower(config()).eval()
    randomise(tower)
    return tower


def inputs(*grids, p=30, seed=1):
    """Patches with the tails of shorter pictures zero, and their mask."""
    patches = torch.randn(len(grids), p, 768, generator=torch.Generator().manual_seed(seed))
    mask = torch.tensor([[1] * (rows * cols) + [0] * (p - rows * cols) for rows, cols in grids], dtype=torch.int32)
    return patches * mask.unsqueeze(-1), mask, list(grids)


def test_published_names():
    names = {name for name, _ in VisionTower(config()).named_parameters()}
    layer = {f"{part}.{kind}" for kind in ("weight", "bias") for part in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "layer_norm1", "layer_norm2",
        "mlp.fc1", "mlp.fc2")}
    assert names == {
        "embeddings.patch_embedding.weight", "embeddings.patch_embedding.bias", "embeddings.position_embedding.weight",
        "post_layernorm.weight", "post_layernorm.bias"} | {f"encoder.layers.{i}.{part}" for i in range(2) for part in layer}


def test_equals_the_librarys_own_forward(tower):
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    keys = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_patches", "patch_size")
    library = Siglip2VisionModel(Siglip2VisionConfig(**{key: VIT[key] for key in keys}, vision_use_head=False)).eval()
    inner = getattr(library, "vision_model", library)
    inner.load_state_dict(tower.state_dict())
    patches, mask, grids = inputs((5, 6), (3, 4), (2, 11))
    with torch.no_grad():
        want = library(
            pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=torch.tensor(grids)).last_hidden_state
        got = tower(patches, mask, grids)
    assert got.shape == (3, 30, 32)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_grid_like_the_table_takes_it_as_it_is_and_padding_takes_entry_0(tower):
    table, bias = tower.embeddings.position_embedding.weight, tower.embeddings.patch_embedding.bias
    embedded = tower.embed(torch.zeros(1, 19, 768), [(4, 4)])[0] - bias
    torch.testing.assert_close(embedded[:16], table, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(embedded[16:], table[:1].expand(3, -1), rtol=1e-5, atol=1e-6)


def test_a_coarser_grid_is_antialiased(tower):
    """To one row, antialiased bilinear of a 4 x 4 table must weigh all four rows; without antialias it takes only two."""
    table = tower.embeddings.position_embedding.weight.detach().clone()
    before = tower.embed(torch.zeros(1, 4, 768), [(1, 4)])
    with torch.no_grad():
        tower.embeddings.position_embedding.weight[:4] += 1.0  # the first of the four rows
        after = tower.embed(torch.zeros(1, 4, 768), [(1, 4)])
        tower.embeddings.position_embedding.weight.copy_(table)
    assert ((after - before) > 0.05).all()


def test_padding_is_never_attended_to_but_has_outputs(tower):
    patches, mask, grids = inputs((3, 4))
    other = patches.clone()
    other[0, 12:] = 5.0
    with torch.no_grad():
        first, second = tower(patches, mask, grids), tower(other, mask, grids)
    torch.testing.assert_close(first[:, :12], second[:, :12], rtol=1e-5, atol=1e-5)
    assert first.shape[1] == 30 and (first[:, 12:] - second[:, 12:]).abs().max() > 0.1


def test_built_on_meta_and_filled_in_place_it_is_the_same(tower):
    with torch.device("meta"):
        empty = VisionTower(config()).eval()
    assert not list(empty.named_buffers())  # nothing that a loader of parameters would leave on meta
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    empty = empty.to_empty(device="cpu")
    filled = dict(empty.named_parameters())
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            filled[name].copy_(parameter)
        patches, mask, grids = inputs((5, 6), (3, 4))
        assert torch.equal(empty(patches, mask, grids), tower(patches, mask, grids))
    assert all(filled[name] is parameter for name, parameter in empty.named_parameters())


def test_gradients_reach_every_parameter(tower):
    patches, mask, grids = inputs((5, 6))
    tower(patches.requires_grad_(), mask, grids).square().mean().backward()
    assert patches.grad.abs().max() > 0
    without = [name for name, p in tower.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    tower.zero_grad()
    # A bias on all keys alike cancels in the softmax.
    assert [name for name in without if not name.endswith("k_proj.bias")] == []


def test_bf16_stays_near_fp32(tower):
    low = VisionTower(config()).eval()
    low.load_state_dict(tower.state_dict())
    low.to(torch.bfloat16)
    patches, mask, grids = inputs((5, 6), (3, 4))
    with torch.no_grad():
        got, want = low(patches, mask, grids), tower(patches, mask, grids)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).abs().max() < 0.05 * want.abs().max()


def test_grids_that_do_not_fit(tower):
    patches, mask, _ = inputs((5, 6))
    with pytest.raises(ValueError, match="6 x 6 has 36.*30"):
        tower(patches, mask, [(6, 6)])
    with pytest.raises(ValueError, match="2 grids for 1"):
        tower(patches, mask, [(5, 6), (5, 6)])


def test_a_position_table_that_is_no_square():
    with pytest.raises(CheckpointError, match="18"):
        VisionTower(config(num_patches=18))


@pytest.mark.parametrize("depth, layers", [(1, [0]), (2, [0, 2]), (3, [0, 2, 4])])
def test_aligner(depth, layers):
    aligner = Aligner(config(depth))
    names = [name for name, _ in aligner.named_parameters()]
    assert names == [f"layers.{i}.{kind}" for i in layers for kind in ("weight", "bias")]
    randomise(aligner)
    hidden = want = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    for i in layers:
        if i:
            want = want * 0.5 * (1 + torch.erf(want / math.sqrt(2)))
        want = F.linear(want, aligner.layers[i].weight, aligner.layers[i].bias)
    assert want.shape == (2, 5, 40)
    torch.testing.assert_close(aligner(hidden), want, rtol=1e-5, atol=1e-6)


def test_an_aligner_without_layers():
    with pytest.raises(CheckpointError, match="depth is 0"):
        Aligner(config(0))


def test_importing_does_not_load_transformers():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import conftest\n"
        "import comfyui_hywu.hywu_core.vision.vit, comfyui_hywu.hywu_core.vision.pictures, comfyui_hywu.hywu_core.vision.vae\n"
        "print([name for name in ('transformers', 'diffusers', 'torchvision') if name in sys.modules])")
    tests = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code, str(tests)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
