"""From numbers and latents to tokens and back: timestep embedders, patch embedder and final layer (spec section 7).

Parameter names are the published ones (``mlp.0``, ``model.1.in_layers.2``, ...). All of it is un-adapted: no LoRA reaches here.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

SINUSOID_WIDTH = 256


def sinusoid(t_B: torch.Tensor) -> torch.Tensor:
    """(B,) on the 0..1000 scale -> (B, 256) fp32: cosines, then sines, of 128 frequencies from 1 down to 1/10000."""
    half = SINUSOID_WIDTH // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t_B.device) / half)
    angle = t_B.float().unsqueeze(1) * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


class NumberEmbedder(nn.Module):
    """A scalar as one token: sinusoid, linear, exact GELU, linear."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(SINUSOID_WIDTH, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, t_B: torch.Tensor) -> torch.Tensor:
        """(B,) -> (B, D)."""
        return self.mlp(sinusoid(t_B).to(self.mlp[0].weight.dtype))


class ResBlock(nn.Module):
    """3x3 convolutions with a timestep that scales and shifts between them; GroupNorm(32)."""

    def __init__(self, channels: int, embedding: int, out_channels: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * out_channels))
        # Index 2 is a dropout in the published layout; an Identity keeps the convolution at index 3.
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out_channels), nn.SiLU(), nn.Identity(), nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip_connection = (
            nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1))

    def forward(self, x_bchw: torch.Tensor, embedding_BD: torch.Tensor) -> torch.Tensor:
        hidden = self.in_layers(x_bchw)
        scale, shift = self.emb_layers(embedding_BD)[:, :, None, None].chunk(2, dim=1)
        hidden = self.out_layers[0](hidden) * (1 + scale) + shift
        return self.skip_connection(x_bchw) + self.out_layers[3](F.silu(hidden))


class PatchEmbed(nn.Module):
    """A latent (b, c, h, w) at a timestep embedding (b, D) -> tokens (b, h·w, D), row by row."""

    def __init__(self, latent_channels: int, inner: int, width: int):
        super().__init__()
        self.model = nn.ModuleList([nn.Conv2d(latent_channels, inner, 3, padding=1), ResBlock(inner, width, width)])

    def forward(self, latent_bchw: torch.Tensor, embedding_BD: torch.Tensor) -> torch.Tensor:
        hidden = self.model[0](latent_bchw.to(self.model[0].weight.dtype))
        return self.model[1](hidden, embedding_BD).flatten(2).transpose(1, 2)


class FinalLayer(nn.Module):
    """Tokens (b, h·w, D) at a timestep embedding (b, D) -> velocity (b, c, h, w)."""

    def __init__(self, width: int, inner: int, latent_channels: int):
        super().__init__()
        self.model = nn.ModuleList([
            ResBlock(width, width, inner),
            nn.Sequential(nn.GroupNorm(32, inner), nn.SiLU(), nn.Conv2d(inner, latent_channels, 3, padding=1)),
        ])

    def forward(self, tokens_BLD: torch.Tensor, embedding_BD: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        x_bchw = tokens_BLD.transpose(1, 2).unflatten(2, grid)
        return self.model[1](self.model[0](x_bchw, embedding_BD))
