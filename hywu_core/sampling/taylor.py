"""TaylorCache: predicting the last layer's hidden states of a step from earlier steps (spec section 12).

Off by default: it trades exactness for time. Owns which steps are full and the prediction; the denoise loop asks it.
"""

import math
from dataclasses import dataclass

import torch

LOW_FREQUENCY_SHARE = 0.1


@dataclass(frozen=True)
class TaylorSettings:
    """When to compute fully, and how far the expansion goes for the slow and the fast changing part of the hidden states."""

    interval: int = 5
    low_order: int = 2
    high_order: int = 2
    first_steps: int = 3  # the first steps are always full
    last_steps: int = 1  # and so are the last ones


class TaylorPredictor:
    """Finite differences of hidden states (B, L, D), kept apart for low and high frequencies along the token axis."""

    def __init__(self, low_order: int, high_order: int):
        self._orders = (low_order, high_order)
        self._differences: list[list[torch.Tensor]] = [[], []]
        self._step: int | None = None

    def store(self, step: int, hidden_BLD: torch.Tensor) -> None:
        """Take the hidden states of a full step; differences are divided by the gap since the last one."""
        gap = 1 if self._step is None else step - self._step
        for band, part in enumerate(split_frequencies(hidden_BLD)):
            fresh = [part]
            for order in range(min(self._orders[band], len(self._differences[band]))):
                fresh.append((fresh[order] - self._differences[band][order]) / gap)
            self._differences[band] = fresh
        self._step = step

    def predict(self, step: int) -> torch.Tensor:
        """The hidden states expected at ``step``, from the last full step before it."""
        distance = step - self._step
        return sum(
            difference * (distance**order / math.factorial(order))
            for band in self._differences
            for order, difference in enumerate(band)
        )


class TaylorPlan:
    """Which steps are full, decided as the loop goes."""

    def __init__(self, settings: TaylorSettings, steps: int):
        self._settings, self._steps = settings, steps
        self._since_full = 0
        self.predictor = TaylorPredictor(settings.low_order, settings.high_order)

    def is_full(self, step: int) -> bool:
        settings = self._settings
        full = (
            step == 0 or self._since_full == settings.interval - 1
            or step < settings.first_steps or step >= self._steps - settings.last_steps)
        self._since_full = 0 if full else self._since_full + 1
        return full

    def stores(self, step: int) -> bool:
        """The enhanced first steps but the last of them leave nothing behind: they change too fast to extrapolate from."""
        return step >= self._settings.first_steps - 1


def split_frequencies(hidden_BLD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states as the sum of their low and high frequencies along the token axis, each (B, L, D)."""
    spectrum = torch.fft.fft(hidden_BLD.float(), dim=1)
    frequency_L = torch.fft.fftfreq(hidden_BLD.shape[1], device=hidden_BLD.device).abs()
    is_low_L = frequency_L <= LOW_FREQUENCY_SHARE * frequency_L.max()
    low = torch.fft.ifft(spectrum * is_low_L[None, :, None], dim=1).real.to(hidden_BLD.dtype)
    return low, hidden_BLD - low
