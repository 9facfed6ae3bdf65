"""The small checkpoint's VAE, written by linear algebra instead of trained.

Owns turning crops into the weights of a published-layout 3-D VAE whose encoder is a greedy principal component analysis
(exactly linear, so that colour edits stay affine maps of the latent) and whose decoder is the least-squares inverse from
3x3 latent cells. Residual branches and attention keep zero output weights. No gradient step is taken.
"""

import numpy as np
import torch
from comfyui_hywu.hywu_core.config import VAEConfig
from comfyui_hywu.hywu_core.vision.vae import VAE
from torch.nn import functional as F

WIDTHS = (64, 32, 32, 64, 128)
LATENTS = 64
LATENT_STD = 3.0  # overall; large against the noise of 1, so that little of it can leak into the picture
CONFIG = dict(
    _class_name="AutoencoderKLConv3D",
    block_out_channels=list(WIDTHS),
    in_channels=3,
    out_channels=3,
    latent_channels=LATENTS,
    layers_per_block=0,
    ffactor_spatial=16,
    ffactor_temporal=4,
    sample_size=128,
    sample_tsize=4,
    downsample_match_channel=True,
    upsample_match_channel=True,
    scaling_factor=1.0,
    shift_factor=None,
)
NORM_LEVEL = 30.0  # constant that fills the norm groups of unused frames, so that the statistics hardly see the picture


def build(crops: list[np.ndarray], seed: int) -> VAE:
    """A VAE for pictures like ``crops`` ((n, h, w, 3) uint8 each)."""
    vae = VAE(VAEConfig.from_dict(CONFIG))
    _blank(vae, seed)
    images = [torch.from_numpy(part.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2) for part in crops]
    bases = _encoder(vae, images)
    _decoder(vae, images, bases)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def as_convolution(vae: VAE) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole encoder as one convolution with stride 16: kernel (z, 3, 16, 16) and bias (z,).

    It is linear and looks at each 16x16 block alone, so its answers to the 768 unit pictures say everything.
    """
    offset = vae.encode(torch.zeros(1, 3, 16, 16)).mean[:, :, 0, 0]
    units = torch.eye(768).view(768, 3, 16, 16)
    answers = torch.cat([vae.encode(part).mean[:, :, 0, 0] for part in units.split(128)]) - offset
    return answers.T.reshape(-1, 3, 16, 16).contiguous(), offset[0]


def _blank(vae: VAE, seed: int) -> None:
    """Zeros everywhere, but small random first convolutions in the residual branches, so that they could be trained later."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in vae.named_parameters():
        parameter.data.zero_()
        if "norm" in name and name.endswith("weight"):
            parameter.data.fill_(1.0)
        elif name.endswith("conv1.weight"):
            parameter.data[:, :, 1] = 0.02 * torch.randn(parameter.shape[:2] + parameter.shape[3:], generator=generator)


def _stack(x: torch.Tensor) -> torch.Tensor:
    """(n, c, h, w) -> (n, 4c, h/2, w/2), channels (row, column, c): one step of the encoder without time."""
    n, c, h, w = x.shape
    return x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(n, 4 * c, h // 2, w // 2)


def _principal(parts: list[torch.Tensor], keep: int) -> torch.Tensor:
    """(keep, c) orthonormal directions of largest variance of (n, c, h, w) features."""
    flat = torch.cat([part.permute(0, 2, 3, 1).reshape(-1, part.shape[1])[::7] for part in parts])
    _, vectors = torch.linalg.eigh(torch.cov(flat[:: max(1, len(flat) // 200_000)].double().T))
    return vectors.flip(1)[:, :keep].T.float()


def _apply(projection: torch.Tensor, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.einsum("oc,nchw->nohw", projection, part) for part in parts]


def _write_down(conv: torch.nn.Conv3d, first: torch.Tensor, rest: torch.Tensor | None = None) -> None:
    """Let a Downsample compute ``first`` (o, c) in frame 0 and ``rest`` in all later frames, its averaging shortcut included.

    Frame 0 has zeros before it, so the tap on the previous frame reaches the later frames only.
    """
    out, channels = conv.weight.shape[:2]
    shortcut = torch.zeros(out, channels)
    for row in range(out):
        shortcut[row, row * channels // out : (row + 1) * channels // out] = out / channels
    conv.weight.data[:, :, 1, 1, 1] = first - shortcut
    if rest is not None:
        conv.weight.data[:, :, 0, 1, 1] = rest - first


def _padded(projection: torch.Tensor, rows: int, columns: int, places: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(rows, columns)
    out[: len(projection), places] = projection
    return out


def _encoder(vae: VAE, images: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the encoder; returns nothing but the bases of 4x4 and 8x8 blocks that the decoder speaks."""
    encoder = vae.encoder
    encoder.conv_in.weight.data[range(3), range(3), 1, 1, 1] = 1.0
    # 0: RGB stays, in 8 slots of which 3 are used.
    slots0 = WIDTHS[1] // 4
    _write_down(encoder.down[0].downsample.conv, _padded(torch.eye(3), slots0, WIDTHS[0], torch.arange(3)))
    pairs = [_stack(part) for part in images]  # 12 numbers of 2x2 pixels
    places = torch.cat([torch.arange(3) + slots0 * corner for corner in range(4)])
    # 1: 12 -> 8.
    slots1 = WIDTHS[2] // 4
    first = _principal(pairs, slots1)
    _write_down(encoder.down[1].downsample.conv, _padded(first, slots1, WIDTHS[1], places))
    quads = [_stack(part) for part in _apply(first, pairs)]  # 32 numbers of 4x4 pixels
    # 2: 32 -> 16, eight in the first frame and eight in the second.
    slots2 = WIDTHS[3] // 8
    second = _principal(quads, 2 * slots2)
    _write_down(encoder.down[2].downsample.conv, second[:slots2], second[slots2:])
    kept = _apply(second, quads)
    eights = [torch.cat((_stack(part[:, :slots2]), _stack(part[:, slots2:])), 1) for part in kept]  # 64 numbers of 8x8 pixels
    # 3: 64 -> 16 of every 8x8 block; four blocks are one latent cell.
    slots3 = WIDTHS[4] // 8
    third = _principal(eights, slots3)
    latents = torch.cat([part.flatten(2).transpose(1, 2).reshape(-1, slots3) for part in _apply(third, eights)])
    spread, centre = latents.std(0), latents.mean(0)
    # Halfway to whitening: fine structure keeps some weight against the noise.
    gain = spread**-0.5
    gain *= LATENT_STD / ((spread * gain).square().mean().sqrt())
    third, centre = third * gain[:, None], centre * gain
    conv = encoder.down[3].downsample.conv
    _write_down(conv, third)
    conv.bias.data = -centre
    # The shortcut hands the 128 channels on as moments: 64 means, and 64 log variances that must say "certain".
    encoder.conv_out.bias.data[LATENTS:] = -50.0
    blocks = [_stack(_stack(pair)) for pair in pairs]  # 192 pixels of an 8x8 block, in nested order
    return _principal([_stack(pair) for pair in pairs], 31), _principal(blocks, 63)


def _decoder(vae: VAE, images: list[torch.Tensor], bases: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Write the decoder: 3x3 latent cells -> 63 coefficients of each 8x8 block -> 31 of each 4x4 -> 12 of each 2x2 -> pixels.

    The last channel of every level carries the constant that fills the frames nobody looks at.
    """
    basis4, basis8 = bases
    decoder = vae.decoder
    width0, width1, width2, width3 = WIDTHS[4], WIDTHS[3], WIDTHS[2], WIDTHS[1]
    kernel16, offset16 = as_convolution(vae)
    # Regression from the 3x3 neighbourhood, zero-padded as the convolution pads it.
    unknowns = 9 * LATENTS + 1
    gram, cross = torch.zeros(unknowns, unknowns).double(), torch.zeros(unknowns, 4 * 63).double()
    for part in images:
        for chunk in part.split(256):
            z = F.conv2d(chunk, kernel16, offset16, stride=16)
            seen = F.unfold(z, 3, padding=1).transpose(1, 2).reshape(-1, 9 * LATENTS)
            seen = torch.cat((seen, torch.ones(len(seen), 1)), 1).double()
            blocks = _apply(basis8, [_stack(_stack(_stack(chunk)))])[0]
            cells = _stack(blocks).permute(0, 2, 3, 1).reshape(-1, 4 * 63).double()
            gram += seen.T @ seen
            cross += seen.T @ cells
    gram += 1e-4 * gram.diagonal().mean() * torch.eye(unknowns)
    solution = torch.linalg.solve(gram, cross).float()
    kernel = solution[:-1].T.reshape(4, 63, LATENTS, 3, 3)
    conv = decoder.up[0].upsample.conv
    weight = torch.zeros(2, 4, width1, width0, 3, 3)
    weight[1, :, :63, 0::2] = kernel  # conv_in repeats every latent channel twice; the first of the two is read
    bias = torch.zeros(2, 4, width1)
    bias[1, :, :63] = solution[-1].reshape(4, 63)
    bias[0, :, 63] = 1.0
    _write_up(conv, weight.flatten(0, 2), bias.flatten())
    # 8x8 -> four 4x4 blocks. Both orders are nested (row, column) of halves, so a block's quarter is a slice.
    quarter = torch.einsum("ap,rpb->rab", basis4, basis8.T.reshape(4, 48, 63))
    weight = torch.zeros(2, 4, width2, width1, 3, 3)
    weight[:, :, :31, :63, 1, 1] = quarter
    weight[:, :, 31, 63, 1, 1] = 1.0
    _write_up(decoder.up[1].upsample.conv, weight.flatten(0, 2))
    weight = torch.zeros(4, width3, width2, 3, 3)
    weight[:, :12, :31, 1, 1] = basis4.T.reshape(4, 12, 31)
    weight[:, 12, 31, 1, 1] = 1.0
    _write_up(decoder.up[2].upsample.conv, weight.flatten(0, 1))
    weight = torch.zeros(4, WIDTHS[0], width3, 3, 3)
    for corner in range(4):
        for colour in range(3):
            for sign, channel in ((1.0, 2 * colour), (-1.0, 2 * colour + 1)):
                weight[corner, channel, 3 * corner + colour, 1, 1] = sign
                weight[corner, channel, 12, 1, 1] = sign * NORM_LEVEL
    _write_up(decoder.up[3].upsample.conv, weight.flatten(0, 1))
    # silu(a) - silu(-a) = a: the activation drops out; the norm divides by about NORM_LEVEL / sqrt(2).
    decoder.norm_out.weight.data[:6] = NORM_LEVEL / 2**0.5
    for colour in range(3):
        decoder.conv_out.weight.data[colour, 2 * colour, 1, 1, 1] = 1.0
        decoder.conv_out.weight.data[colour, 2 * colour + 1, 1, 1, 1] = -1.0


def _write_up(conv: torch.nn.Conv3d, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Let an Upsample compute ``weight`` (o, c, 3, 3) at every frame, its repeating shortcut included."""
    out, channels = conv.weight.shape[:2]
    weight = weight.clone()
    row = torch.arange(out)
    weight[row, row * channels // out, 1, 1] -= 1.0
    conv.weight.data[:, :, 1] = weight
    if bias is not None:
        conv.bias.data = bias
