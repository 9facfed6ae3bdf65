"""A source picture as the backbone sees it: a clean latent and vision tokens, encoded once and used by every stage.

The reference encodes each source three to four times per edit; here the result is a value that travels with the condition.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..config import VAEConfig
from ..seeds import seeded
from ..vision.buckets import Bucket
from ..vision.pictures import SourcePicture
from .model import Backbone


@dataclass(frozen=True, eq=False)
class EncodedPicture:
    """One source picture, encoded.

    latent_chw: the sampled latent on the diffusion scale, fp32. vae_tokens_LD: its tokens at time 0. vit_tokens_LD: the aligned
    vision tokens, padding included. bucket and grid: its sizes in the two token grids. original_hw: pixels before fitting.
    """

    bucket: Bucket
    grid: tuple[int, int]
    latent_chw: torch.Tensor
    vae_tokens_LD: torch.Tensor
    vit_tokens_LD: torch.Tensor
    original_hw: tuple[int, int]
    digest: str


def encode_picture(backbone: Backbone, source: SourcePicture, noise_bchw: torch.Tensor) -> EncodedPicture:
    """Encode one fitted picture; ``noise_bchw`` (1, c, h, w) draws the latent from the VAE's posterior.

    The latent is sampled, not the mode, as the backbone was trained (spec section 9).
    """
    vae, home = backbone.vae, backbone.device
    pixels_bchw = source.pixels_chw.unsqueeze(0)
    with backbone.present("vae") as device:
        latent_bchw = vae.scale(vae.encode(pixels_bchw.to(device, vae.dtype)).sample(noise_bchw)).float()
    latent_bchw = latent_bchw.to(home)
    with backbone.present("small"):
        vae_tokens_BLD = backbone.patch_embed(latent_bchw, backbone.time_embed(torch.zeros(1, device=home)))
    with backbone.present("vision") as device:
        features = backbone.vision_model(
            source.patches.unsqueeze(0).to(device, backbone.dtype), source.patch_mask.unsqueeze(0).to(device), [source.grid])
        vit_tokens_BLD = backbone.vision_aligner(features)
    return EncodedPicture(
        bucket=source.bucket,
        grid=source.grid,
        latent_chw=latent_bchw[0],
        vae_tokens_LD=vae_tokens_BLD[0],
        vit_tokens_LD=vit_tokens_BLD.to(home)[0],
        original_hw=source.original_hw,
        digest=source.digest,
    )


def posterior_noise(config: VAEConfig, sources: Sequence[SourcePicture], seed: int) -> list[torch.Tensor]:
    """The noise (1, c, h, w) of each picture's posterior, drawn on the CPU in picture order from one seed.

    Raises: RequestError for a seed of more than 64 bits.
    """
    generator, cell = seeded(seed), config.ffactor_spatial
    return [
        torch.randn(1, config.latent_channels, source.bucket.height // cell, source.bucket.width // cell, generator=generator)
        for source in sources
    ]
