"""VAE and vision tower in a process of their own, called as if they were here.

Owns the actor, the two modules that stand for it in a backbone whose towers are elsewhere, and putting them there.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..backbone.model import Backbone
from ..config import VAEConfig
from ..placement.plan import Plan
from ..vision.vae import VAE, Posterior
from .part import Part, load_share
from .wire import Parcel, opened, parcel

CPU = torch.device("cpu")
Call = Callable[..., tuple[torch.Tensor, ...]]  # (method of the actor, tensors ...) -> tensors


class TowerActor(Part):
    """The VAE, the vision tower and its aligner of a backbone folder, where ``plan`` puts them."""

    def __init__(self, name: str, folder: str, plan: Plan, threads: int = 0):
        placed, fingerprint = load_share(folder, plan)
        self._backbone = placed.backbone
        super().__init__(name, fingerprint, threads)

    def vae_encode(self, pixels: Parcel) -> list[Parcel]:
        """Pixels (b, 3, h, w) in -1..1 to mean and log variance (b, c, h/16, w/16)."""
        return self.work(self._vae_encode, pixels)

    def _vae_encode(self, pixels: Parcel) -> list[Parcel]:
        with self._backbone.present("vae") as device:
            posterior = self._backbone.vae.encode(opened(pixels, device))
            return [parcel(posterior.mean), parcel(posterior.logvar)]

    def vae_decode(self, z: Parcel) -> list[Parcel]:
        """A VAE latent (b, c, h, w) to pixels (b, 3, 16h, 16w)."""
        return self.work(self._vae_decode, z)

    def _vae_decode(self, z: Parcel) -> list[Parcel]:
        with self._backbone.present("vae") as device:
            return [parcel(self._backbone.vae.decode(opened(z, device)))]

    def vision(self, patches: Parcel, mask: Parcel, grids: Sequence[tuple[int, int]]) -> list[Parcel]:
        """Patches (b, p, d) to aligned tokens (b, p, D)."""
        return self.work(self._vision, patches, mask, grids)

    def _vision(self, patches: Parcel, mask: Parcel, grids: Sequence[tuple[int, int]]) -> list[Parcel]:
        with self._backbone.present("vision") as device:
            features = self._backbone.vision_model(opened(patches, device), opened(mask, device), list(grids))
            return [parcel(self._backbone.vision_aligner(features))]


@dataclass(frozen=True, eq=False)
class Standing:
    """A backbone as a handle's ``placed``, of which this process has placed nothing or only some."""

    backbone: Backbone


def towers_elsewhere(backbone: Backbone, call: Call) -> None:
    """Let ``call`` stand for the VAE and the vision tower of a backbone."""
    backbone.vae, backbone.vision_model = RemoteVAE(backbone.config.vae, backbone.dtype, call), RemoteVision(call)
    backbone.vision_aligner = nn.Identity()
    backbone.visits |= dict.fromkeys(("vae", "vision"), lambda: nullcontext(CPU))


class RemoteVAE(nn.Module):
    """A VAE without weights; ``call`` reaches the one that has them. Results come back to where the arguments were."""

    scale, unscale = VAE.scale, VAE.unscale

    def __init__(self, config: VAEConfig, dtype: torch.dtype, call: Call):
        super().__init__()
        self.config, self.dtype, self.device, self._call = config, dtype, CPU, call

    def encode(self, pixels_bchw: torch.Tensor) -> Posterior:
        """As ``VAE.encode``."""
        return Posterior(*(part.to(pixels_bchw.device) for part in self._call("vae_encode", pixels_bchw)))

    def decode(self, z_bchw: torch.Tensor) -> torch.Tensor:
        """As ``VAE.decode``."""
        return self._call("vae_decode", z_bchw)[0].to(z_bchw.device)


class RemoteVision(nn.Module):
    """Tower and aligner in one; in the backbone an identity follows."""

    def __init__(self, call: Callable[..., Any]):
        super().__init__()
        self._call = call

    def forward(self, patches_bpd: torch.Tensor, mask_bp: torch.Tensor, grids: Sequence[tuple[int, int]]) -> torch.Tensor:
        return self._call("vision", patches_bpd, mask_bp, [tuple(grid) for grid in grids])[0]
