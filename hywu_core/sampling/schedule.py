"""The noise schedule and the Euler step: diffusers' flow-match scheduler with the explicit sigmas of the spec (section 8)."""

import numpy as np
import torch

from ..errors import RequestError

MAX_STEPS = 1000


class Schedule:
    """Sigmas from 1 to 0 and the Euler step between them.

    ``sigmas`` (n+1,) and ``timesteps`` (n,) = 1000 · sigma, fp32. diffusers' own default spacing differs from the model's by
    up to 0.6, so the sigmas are given explicitly.
    """

    def __init__(self, steps: int, shift: float):
        """Raises RequestError for steps outside 1..1000 or a shift that is not positive."""
        if not 1 <= steps <= MAX_STEPS:
            raise RequestError(f"{steps} steps asked for, {1} to {MAX_STEPS} are possible")
        if not 0 < shift < float("inf"):
            raise RequestError(f"shift {shift} asked for, it must be a positive number (the published default is 3)")
        from diffusers import FlowMatchEulerDiscreteScheduler

        self._scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        self._scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1])
        self.sigmas: torch.Tensor = self._scheduler.sigmas
        self.timesteps: torch.Tensor = self._scheduler.timesteps

    def __len__(self) -> int:
        return len(self.timesteps)

    def next_timestep(self, step: int) -> torch.Tensor:
        """The time (), on the 0..1000 scale, that a step leads to; 0 at the last one. What a mean-flow model is told."""
        return self.timesteps[step + 1] if step + 1 < len(self) else torch.zeros(())

    def advance(self, step: int, latent_bchw: torch.Tensor, velocity_bchw: torch.Tensor) -> torch.Tensor:
        """One Euler step in fp32: x + (sigma_next - sigma) · v."""
        return self._scheduler.step(
            velocity_bchw.float(), self.timesteps[step], latent_bchw.float(), return_dict=False)[0]

    def clean(self, step: int, latent_bchw: torch.Tensor, velocity_bchw: torch.Tensor) -> torch.Tensor:
        """The estimate of the clean latent at a step, x - sigma · v: what previews show."""
        return latent_bchw - self.sigmas[step].to(latent_bchw.device) * velocity_bchw
