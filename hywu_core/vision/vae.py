"""The 3-D VAE for single pictures: pixels to a latent posterior and back (spec section 9).

Owns the stacking of blocks, the frames that a single picture is repeated to, and the scale between VAE latents and diffusion
latents. Videos are out of its reach on purpose. Tensor names are the published ones below ``vae.``.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from ..config import VAEConfig
from ..errors import CheckpointError, PictureError
from .vae_blocks import AttnBlock, Conv3, Downsample, ResnetBlock, Upsample, norm, swish


@dataclass(frozen=True)
class Posterior:
    """A Gaussian for every latent value; ``mean`` and ``logvar`` are ``(b, c, h, w)`` in at least fp32."""

    mean: torch.Tensor
    logvar: torch.Tensor

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        """mean + std * noise; ``noise`` is standard normal of the shape of ``mean``.

        The caller draws the noise, so that this class never depends on a random generator.
        """
        if noise.shape != self.mean.shape:
            raise ValueError(f"posterior noise is {tuple(noise.shape)}, the latent {tuple(self.mean.shape)}")
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean)

    def mode(self) -> torch.Tensor:
        """The most likely latent ``(b, c, h, w)``."""
        return self.mean


class _Level(nn.Module):
    """The blocks of one resolution, and the step to the next one."""

    def __init__(self, blocks: list[ResnetBlock]):
        super().__init__()
        self.block = nn.ModuleList(blocks)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        for block in self.block:
            h = block(h)
        if hasattr(self, "downsample"):
            return self.downsample(h)
        return self.upsample(h) if hasattr(self, "upsample") else h


class _Middle(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    """Frames ``(b, 3, t, h, w)`` -> moments ``(b, 2z, t/4, h/16, w/16)``."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = config.block_out_channels
        halvings = int(math.log2(config.ffactor_spatial))
        first_temporal = int(math.log2(config.ffactor_spatial // config.ffactor_temporal))
        self.conv_in = Conv3(config.in_channels, widths[0])
        self.down = nn.ModuleList()
        channels = widths[0]
        for i, width in enumerate(widths):
            level = _Level([ResnetBlock(channels if j == 0 else width, width) for j in range(config.layers_per_block)])
            channels = width
            if i < halvings:
                # The step already has the next level's width, so its blocks need no shortcut convolution.
                channels = widths[min(i + 1, len(widths) - 1)]
                level.downsample = Downsample(width, channels, temporal=i >= first_temporal)
            self.down.append(level)
        self.mid = _Middle(channels)
        self.norm_out = norm(channels)
        self.conv_out = Conv3(channels, 2 * config.latent_channels)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(frames)
        for level in self.down:
            h = level(h)
        h = self.mid(h)
        moments = self.conv_out(swish(self.norm_out(h)))
        return moments + h.unflatten(1, (moments.shape[1], -1)).mean(2)


class Decoder(nn.Module):
    """Latent frames ``(b, z, t, h, w)`` -> frames ``(b, 3, 4t, 16h, 16w)``; ``up.0`` is the deepest level."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = tuple(reversed(config.block_out_channels))
        doublings, temporal_doublings = int(math.log2(config.ffactor_spatial)), int(math.log2(config.ffactor_temporal))
        self.repeats = widths[0] // config.latent_channels
        self.conv_in = Conv3(config.latent_channels, widths[0])
        self.mid = _Middle(widths[0])
        self.up = nn.ModuleList()
        channels = widths[0]
        for i, width in enumerate(widths):
            blocks = config.layers_per_block + 1
            level = _Level([ResnetBlock(channels if j == 0 else width, width) for j in range(blocks)])
            channels = width
            if i < doublings:
                channels = widths[min(i + 1, len(widths) - 1)]
                level.upsample = Upsample(width, channels, temporal=i < temporal_doublings)
            self.up.append(level)
        self.norm_out = norm(channels)
        self.conv_out = Conv3(channels, config.out_channels)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(z) + z.repeat_interleave(self.repeats, dim=1)
        h = self.mid(h)
        for level in self.up:
            h = level(h)
        return self.conv_out(swish(self.norm_out(h)))


class VAE(nn.Module):
    """Pictures to latents and back, differentiable, in the dtype of its parameters."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        _check(config)
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.encoder.conv_in.weight.device

    def encode(self, pixels_bchw: torch.Tensor) -> Posterior:
        """Posterior ``(b, z, h/16, w/16)`` of pictures ``(b, 3, h, w)`` in -1..1 (spec section 9).

        Raises:
            PictureError: wrong channels, or sides that are no multiples of ``ffactor_spatial``.
        """
        channels, height, width = pixels_bchw.shape[-3:]
        cell = self.config.ffactor_spatial
        if pixels_bchw.dim() != 4 or channels != self.config.in_channels:
            raise PictureError(f"the VAE takes (b, {self.config.in_channels}, h, w), got {tuple(pixels_bchw.shape)}")
        if height % cell or width % cell or not height or not width:
            raise PictureError(
                f"the VAE takes sides that are multiples of {cell} pixels, got {height} x {width} (height x width); "
                f"crop or resize to {max(cell, height // cell * cell)} x {max(cell, width // cell * cell)}")
        # A still: as many equal frames as make one latent frame.
        frames = pixels_bchw.to(self.dtype).unsqueeze(2).expand(-1, -1, self.config.ffactor_temporal, -1, -1)
        mean, logvar = _at_least_fp32(self.encoder(frames)).squeeze(2).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, z_bchw: torch.Tensor) -> torch.Tensor:
        """Pictures ``(b, 3, 16h, 16w)``, about -1..1 and not clamped, of VAE latents ``(b, z, h, w)`` (spec section 9).

        Raises:
            PictureError: the latent has another number of channels, so it belongs to another VAE.
        """
        # One latent frame becomes several frames, of which the last is the picture.
        return self.decode_frames(z_bchw)[:, :, -1]

    def decode_frames(self, z_bchw: torch.Tensor) -> torch.Tensor:
        """All frames ``(b, 3, ffactor_temporal, 16h, 16w)`` that ``decode`` chooses from."""
        if z_bchw.dim() != 4 or z_bchw.shape[1] != self.config.latent_channels:
            raise PictureError(
                f"this VAE decodes latents (b, {self.config.latent_channels}, h, w), got {tuple(z_bchw.shape)}: "
                f"the latent comes from another model")
        return _at_least_fp32(self.decoder(z_bchw.to(self.dtype).unsqueeze(2)))

    def scale(self, z: torch.Tensor) -> torch.Tensor:
        """VAE latent -> the scale in which diffusion works."""
        return (z - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def unscale(self, latent: torch.Tensor) -> torch.Tensor:
        """Diffusion latent -> what ``decode`` takes."""
        return latent / self.config.scaling_factor + (self.config.shift_factor or 0.0)


def _at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check(config: VAEConfig) -> None:
    """Refuse sizes that the blocks could only fail on later, without saying which key of config.json is to blame."""
    for key in ("ffactor_spatial", "ffactor_temporal"):
        factor = getattr(config, key)
        if factor < 1 or factor & (factor - 1):
            raise CheckpointError(f"config.json: vae.{key} is {factor}, it must be a power of two")
    if config.ffactor_temporal > config.ffactor_spatial:
        raise CheckpointError(f"config.json: vae.ffactor_temporal {config.ffactor_temporal} is larger than "
                              f"vae.ffactor_spatial {config.ffactor_spatial}")
    if 2 ** (len(config.block_out_channels) - 1) < config.ffactor_spatial:
        raise CheckpointError(f"config.json: {len(config.block_out_channels)} vae.block_out_channels can reduce by "
                              f"{2 ** (len(config.block_out_channels) - 1)}, vae.ffactor_spatial is {config.ffactor_spatial}")
    for width in config.block_out_channels:
        if width % 32:
            raise CheckpointError(f"config.json: vae.block_out_channels has {width}, which 32 norm groups do not divide")
    deepest = config.block_out_channels[-1]
    if deepest % (2 * config.latent_channels):
        raise CheckpointError(f"config.json: vae.latent_channels {config.latent_channels} (twice) does not divide the deepest "
                              f"width {deepest}")
