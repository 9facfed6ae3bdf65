"""The 3-D VAE: each block against an independent form of its definition, names, frames, posterior, scale, errors, gradients."""

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from comfyui_hywu.hywu_core.config import VAEConfig
from comfyui_hywu.hywu_core.errors import CheckpointError, PictureError
from comfyui_hywu.hywu_core.handle import load_model
from comfyui_hywu.hywu_core.vision import vae_blocks
from comfyui_hywu.hywu_core.vision.vae import VAE, Posterior
from comfyui_hywu.hywu_core.vision.vae_blocks import (
    AttnBlock,
    Conv3,
    Downsample,
    ResnetBlock,
    Upsample,
    depth_to_space,
    space_to_depth,
)
from einops import rearrange
from torch.utils.flop_counter import FlopCounterMode

BUNDLED = Path(__file__).parents[2] / "models" / "hywu-mini" / "backbone"
FACTORS = dict(ffactor_spatial=16, ffactor_temporal=4)
TINY = dict(block_out_channels=(32, 32, 32, 64, 64), latent_channels=4, layers_per_block=1, **FACTORS)
REAL = dict(block_out_channels=(128, 256, 512, 1024, 1024), latent_channels=32, layers_per_block=2, **FACTORS)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return VAE(VAEConfig(**TINY, scaling_factor=0.7, shift_factor=0.1)).eval()


# ---- Blocks


@pytest.mark.parametrize("frames", [1, 2, 3, 4])  # 1 sees one slice of the kernel, 2 never all three
@pytest.mark.parametrize("limit", [0, 10**9])  # the 3-D kernel of torch, frame by frame
def test_convolution_equals_zero_padding_written_out(monkeypatch, frames, limit):
    monkeypatch.setattr(vae_blocks, "_ONEDNN_FROM", limit)
    conv, x = Conv3(5, 7), randn(2 if frames == 2 else 1, 5, frames, 6, 9)
    padded = F.pad(x, (1, 1, 1, 1, 1, 1))
    patches = padded.unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1)  # (b, c, t, h, w, 3, 3, 3)
    want = torch.einsum("bcthwxyz,ocxyz->bothw", patches, conv.weight) + conv.bias[:, None, None, None]
    torch.testing.assert_close(conv(x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reach", [None, *itertools.product((0, 1), repeat=3)])
@pytest.mark.parametrize("frames", [1, 3])
def test_weights_of_zeros_are_seen_and_change_nothing(reach, frames):
    conv, x = Conv3(5, 7).requires_grad_(False), randn(2, 5, frames, 6, 9)
    centre = torch.zeros(3, 3, 3)
    centre[tuple(slice(1 - each, 2 + each) for each in reach or (0, 0, 0))] = 0 if reach is None else 1
    conv.weight *= centre
    assert conv.reach() == reach
    torch.testing.assert_close(conv(x), F.conv3d(x, conv.weight, conv.bias, padding=1), rtol=1e-5, atol=1e-5)


def test_one_weight_anywhere_is_seen():
    for place in itertools.product(range(3), repeat=3):
        conv = Conv3(4, 6).requires_grad_(False)
        conv.weight.zero_()[3, 2][place] = 1e-30
        assert conv.reach() == tuple(int(each != 1) for each in place)
        conv.weight[3, 2][place] = float("nan")
        assert conv.reach() == tuple(int(each != 1) for each in place)


def test_weights_that_learn_are_used_whole():
    conv, x = Conv3(2, 2), randn(1, 2, 2, 4, 4)
    torch.nn.init.zeros_(conv.weight)
    assert conv.reach() == (1, 1, 1)
    conv(x).square().sum().backward()
    assert conv.weight.grad.abs().amin() > 0


@pytest.mark.parametrize(("channels", "bias"), [(32, 0.0), (64, 0.5)])
def test_a_residual_branch_that_ends_in_zeros_is_not_computed(channels, bias, monkeypatch):
    block, x = ResnetBlock(channels, 32).requires_grad_(False), randn(1, channels, 2, 4, 4)
    block.conv2.bias.fill_(bias)
    block.conv2.weight.zero_()
    want = bias + (F.conv3d(x, block.nin_shortcut.weight, block.nin_shortcut.bias) if channels != 32 else x)
    monkeypatch.setattr(block.conv1, "forward", None)
    torch.testing.assert_close(block(x), want)


@torch.no_grad()
def test_the_bias_of_a_convolution_without_weights_stays_as_it_is():
    block, x = Upsample(8, 4, temporal=False).requires_grad_(False), randn(1, 8, 1, 1, 1)
    block.conv.weight.zero_()
    before = block.conv.bias.clone()
    first = block(x)
    assert torch.equal(block(x), first) and torch.equal(block.conv.bias, before)


def test_the_bundled_vae_costs_little_and_says_the_same(monkeypatch):
    vae = load_model(BUNDLED, dtype=torch.float32).backbone.vae
    picture, latent = randn(1, 3, 64, 48).clamp(-1, 1), randn(1, 64, 4, 3)

    def both():
        with FlopCounterMode(display=False) as count, torch.no_grad():
            return vae.encode(picture).mean, vae.decode(latent), count.get_total_flops()

    mean, pixels, cost = both()
    monkeypatch.setattr(Conv3, "reach", lambda self: (1, 1, 1))
    wanted_mean, wanted_pixels, whole = both()
    torch.testing.assert_close(mean, wanted_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pixels, wanted_pixels, rtol=1e-5, atol=1e-5)
    assert cost < whole / 20


@pytest.mark.parametrize("time", [1, 2])
def test_space_to_depth_orders_channels_time_row_column(time):
    x = torch.arange(1 * 3 * 4 * 4 * 6).reshape(1, 3, 4, 4, 6)
    out = space_to_depth(x, time, 2)
    assert torch.equal(out, rearrange(x, "b c (t r1) (h r2) (w r3) -> b (r1 r2 r3 c) t h w", r1=time, r2=2, r3=2))
    assert torch.equal(depth_to_space(out, time, 2), x)


@pytest.mark.parametrize("temporal", [False, True])
def test_downsample_shortcut_averages_neighbouring_channels(temporal):
    block = Downsample(4, 16, temporal)  # rearranged input has 16 or 32 channels: groups of 1 or 2
    torch.nn.init.zeros_(block.conv.weight)
    torch.nn.init.zeros_(block.conv.bias)
    x = randn(1, 4, 4, 6, 8)
    moved = rearrange(
        x, "b c (t r1) (h r2) (w r3) -> b (r1 r2 r3 c) t h w", r1=2 if temporal else 1, r2=2, r3=2)
    want = moved if not temporal else (moved[:, 0::2] + moved[:, 1::2]) / 2
    torch.testing.assert_close(block(x), want)


@pytest.mark.parametrize("temporal", [False, True])
def test_upsample_shortcut_repeats_channels(temporal):
    block = Upsample(8, 4, temporal)  # 16 or 32 channels before depth-to-space: each of 8 is repeated 2 or 4 times
    torch.nn.init.zeros_(block.conv.weight)
    torch.nn.init.zeros_(block.conv.bias)
    x = randn(1, 8, 2, 3, 5)
    repeated = torch.stack([x[:, i // (4 if temporal else 2)] for i in range(32 if temporal else 16)], dim=1)
    want = rearrange(repeated, "b (r1 r2 r3 c) t h w -> b c (t r1) (h r2) (w r3)", r1=2 if temporal else 1, r2=2, r3=2)
    torch.testing.assert_close(block(x), want)


def test_the_convolutions_of_both_resamplers_are_added():
    x = randn(1, 32, 2, 4, 4)
    down, up = Downsample(32, 32, True), Upsample(32, 32, True)
    for block, arrange in ((down, space_to_depth), (up, depth_to_space)):
        bare = block(x) - arrange(block.conv(x), 2, 2)
        torch.nn.init.zeros_(block.conv.weight)
        torch.nn.init.zeros_(block.conv.bias)
        torch.testing.assert_close(bare, block(x), rtol=1e-5, atol=1e-5)


def test_residual_block():
    block, x = ResnetBlock(32, 64), randn(1, 32, 2, 4, 4)
    torch.nn.init.normal_(block.norm1.weight)

    def normal(layer, h):
        grouped = h.reshape(1, 32, -1)
        grouped = (grouped - grouped.mean(-1, keepdim=True)) / (grouped.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        h = grouped.reshape(h.shape) * layer.weight[:, None, None, None] + layer.bias[:, None, None, None]
        return h * torch.sigmoid(h)

    want = block.conv2(normal(block.norm2, block.conv1(normal(block.norm1, x)))) + block.nin_shortcut(x)
    torch.testing.assert_close(block(x), want, rtol=1e-4, atol=1e-5)


def test_attention_sees_all_positions_of_all_frames():
    block, x = AttnBlock(32), randn(2, 32, 2, 3, 4)
    flat = [F.conv3d(block.norm(x), m.weight, m.bias).flatten(2) for m in (block.q, block.k, block.v)]
    scores = torch.einsum("bci,bcj->bij", flat[0], flat[1]) / math.sqrt(32)
    mixed = torch.einsum("bij,bcj->bci", scores.softmax(-1), flat[2]).reshape(x.shape)
    torch.testing.assert_close(block(x), x + block.proj_out(mixed), rtol=1e-5, atol=1e-5)


def test_swish_in_place_leaves_gradients_right():
    block, x = ResnetBlock(32, 32).double(), randn(1, 32, 1, 2, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: block(t)[:, ::7], (x,), fast_mode=True)


# ---- The whole


def test_published_names_and_shapes():
    with torch.device("meta"):
        published = dict(VAE(VAEConfig(**REAL)).named_parameters())
    assert len(published) == 280
    assert sum(p.numel() for p in published.values()) == 1_260_674_947
    for name, shape in {
        "encoder.conv_in.weight": (128, 3, 3, 3, 3),
        "encoder.down.0.downsample.conv.weight": (64, 128, 3, 3, 3),
        "encoder.down.1.downsample.conv.weight": (128, 256, 3, 3, 3),
        "encoder.down.2.downsample.conv.weight": (128, 512, 3, 3, 3),
        "encoder.down.3.downsample.conv.weight": (128, 1024, 3, 3, 3),
        "encoder.down.4.block.1.conv2.weight": (1024, 1024, 3, 3, 3),
        "encoder.mid.attn_1.proj_out.weight": (1024, 1024, 1, 1, 1),
        "encoder.conv_out.weight": (64, 1024, 3, 3, 3),
        "decoder.conv_in.weight": (1024, 32, 3, 3, 3),
        "decoder.mid.block_2.norm1.weight": (1024,),
        "decoder.up.0.upsample.conv.weight": (8192, 1024, 3, 3, 3),
        "decoder.up.1.upsample.conv.weight": (4096, 1024, 3, 3, 3),
        "decoder.up.2.upsample.conv.weight": (1024, 512, 3, 3, 3),
        "decoder.up.3.upsample.conv.weight": (512, 256, 3, 3, 3),
        "decoder.up.4.block.2.conv1.weight": (128, 128, 3, 3, 3),
        "decoder.conv_out.bias": (3,),
    }.items():
        assert tuple(published[name].shape) == shape, name
    assert not any("nin_shortcut" in name for name in published)


def test_a_still_is_four_equal_frames(vae):
    pixels = randn(1, 3, 32, 48)
    moments = vae.encoder(pixels.unsqueeze(2).repeat(1, 1, 4, 1, 1))
    posterior = vae.encode(pixels)
    torch.testing.assert_close(torch.cat([posterior.mean, posterior.logvar], 1), moments[:, :, 0])
    assert posterior.mean.shape == (1, 4, 2, 3)


def test_the_last_of_four_frames_is_the_picture(vae):
    z = randn(1, 4, 2, 3)
    frames = vae.decoder(z.unsqueeze(2))
    assert frames.shape == (1, 3, 4, 32, 48)
    assert torch.equal(vae.decode(z), frames[:, :, 3])
    assert not torch.allclose(frames[:, :, 3], frames[:, :, 0])


def test_the_moments_have_the_channel_mean_as_shortcut(vae):
    """With conv_out silent, moment i is the mean of the i-th run of 64 / 8 channels before the last norm."""
    seen = {}
    handle = vae.encoder.mid.register_forward_hook(lambda module, inputs, output: seen.update(h=output))
    kept = {name: tensor.clone() for name, tensor in vae.encoder.conv_out.state_dict().items()}
    with torch.no_grad():
        for parameter in vae.encoder.conv_out.parameters():
            parameter.zero_()
        moments = vae.encoder(randn(1, 3, 4, 32, 32))
    handle.remove()
    vae.encoder.conv_out.load_state_dict(kept)
    want = torch.stack([seen["h"][:, 8 * i:8 * i + 8].mean(1) for i in range(8)], 1)
    torch.testing.assert_close(moments, want)


def test_the_decoder_starts_with_each_latent_channel_repeated(vae):
    seen, z = {}, randn(1, 4, 1, 2, 2)
    handle = vae.decoder.mid.register_forward_pre_hook(lambda module, inputs: seen.update(h=inputs[0]))
    vae.decoder(z)
    handle.remove()
    repeated = torch.stack([z[:, i // 16] for i in range(64)], 1)  # 64 channels from 4
    torch.testing.assert_close(seen["h"], vae.decoder.conv_in(z) + repeated)


@pytest.mark.parametrize("half, shape", [("encoder", (1, 3, 4, 32, 32)), ("decoder", (1, 4, 1, 2, 2))])
def test_both_halves_end_with_norm_swish_convolution(vae, half, shape):
    module, seen = getattr(vae, half), {}
    handles = [
        module.norm_out.register_forward_pre_hook(lambda module, inputs: seen.update(before=inputs[0])),
        module.conv_out.register_forward_pre_hook(lambda module, inputs: seen.update(after=inputs[0]))]
    module(randn(*shape))
    for handle in handles:
        handle.remove()
    normal = F.group_norm(seen["before"], 32, module.norm_out.weight, module.norm_out.bias, eps=1e-6)
    torch.testing.assert_close(seen["after"], normal * torch.sigmoid(normal))


def test_a_batch_equals_its_pictures_one_by_one(vae):
    pixels, z = randn(2, 3, 32, 32), randn(2, 4, 2, 2)
    torch.testing.assert_close(vae.encode(pixels).mean[1:], vae.encode(pixels[1:]).mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(z)[:1], vae.decode(z[:1]), rtol=1e-4, atol=1e-5)


def test_posterior_by_hand():
    posterior = Posterior(torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[0.0, math.log(9.0)]]]]))
    sample = posterior.sample(torch.tensor([[[[2.0, -1.0]]]]))
    torch.testing.assert_close(sample, torch.tensor([[[[3.0, -1.0]]]]))
    assert posterior.mode() is posterior.mean
    with pytest.raises(ValueError, match=r"\(1, 1, 1, 3\).*\(1, 1, 1, 2\)"):
        posterior.sample(torch.zeros(1, 1, 1, 3))


@pytest.mark.parametrize("bias, clamped", [(1e4, 20.0), (-1e4, -30.0)])
def test_logvar_is_clamped(vae, bias, clamped):
    kept = vae.encoder.conv_out.bias.detach().clone()
    with torch.no_grad():
        vae.encoder.conv_out.bias[4:] += bias
        posterior = vae.encode(randn(1, 3, 16, 16))
        vae.encoder.conv_out.bias.copy_(kept)
    assert torch.equal(posterior.logvar, torch.full_like(posterior.logvar, clamped))
    assert posterior.mean.abs().max() < 100


def test_scale_and_back(vae):
    z = torch.tensor([0.1, 1.1, -0.9])
    torch.testing.assert_close(vae.scale(z), torch.tensor([0.0, 0.7, -0.7]))
    torch.testing.assert_close(vae.unscale(vae.scale(z)), z)
    plain = VAE(VAEConfig(**TINY, scaling_factor=0.5, shift_factor=None))
    torch.testing.assert_close(plain.scale(z), z / 2)
    torch.testing.assert_close(plain.unscale(z), z * 2)


@pytest.mark.parametrize("shape, words", [
    ((1, 3, 40, 32), "40 x 32.*32 x 32"), ((1, 3, 32, 47), "32 x 47"), ((1, 3, 8, 16), "8 x 16.*16 x 16"),
    ((1, 3, 0, 16), "0 x 16"), ((1, 4, 32, 32), r"\(1, 4, 32, 32\)"), ((3, 32, 32), r"\(3, 32, 32\)"),
    ((1, 3, 1, 32, 32), r"\(1, 3, 1, 32, 32\)")])
def test_pictures_of_a_wrong_size(vae, shape, words):
    with pytest.raises(PictureError, match=words):
        vae.encode(torch.zeros(shape))


def test_a_latent_of_another_model(vae):
    with pytest.raises(PictureError, match=r"\(b, 4, h, w\).*\(1, 16, 2, 2\)"):
        vae.decode(torch.zeros(1, 16, 2, 2))


@pytest.mark.parametrize("change, words", [
    (dict(ffactor_spatial=12), "ffactor_spatial is 12"), (dict(ffactor_temporal=32), "32.*16"),
    (dict(ffactor_spatial=64), "16.*64"), (dict(block_out_channels=(32, 32, 40, 64, 64)), "40"),
    (dict(latent_channels=24), "24.*64")])
def test_configurations_that_contradict_themselves(change, words):
    with pytest.raises(CheckpointError, match=words):
        VAE(VAEConfig(**(TINY | change)))


def test_gradients_reach_the_input_and_every_parameter(vae):
    pixels = randn(1, 3, 32, 32).requires_grad_()
    decoded = vae.decode(vae.encode(pixels).sample(randn(1, 4, 2, 2)))
    decoded.square().mean().backward()
    assert pixels.grad.abs().max() > 0
    assert [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []
    vae.zero_grad()


def test_bf16_stays_near_fp32_and_hands_out_fp32(vae):
    low = VAE(vae.config).eval()
    low.load_state_dict(vae.state_dict())
    low.to(torch.bfloat16)
    pixels, z = randn(1, 3, 32, 32), randn(1, 4, 2, 2)
    with torch.no_grad():
        for got, want in ((low.encode(pixels).mean, vae.encode(pixels).mean), (low.decode(z), vae.decode(z))):
            assert got.dtype == torch.float32
            assert (got - want).abs().max() < 0.05 * want.abs().max()
