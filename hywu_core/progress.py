"""Progress and cancel as one callback, handed down through every long stage.

The callback is called after each unit of work (a shard, a token, a layer, a block, a denoise step). It may raise: the exception
travels up unchanged, each stage undoes what it attached on the way, and that is how a cancel works.
"""

from collections.abc import Callable

import torch

# on_tick(done, total, latent): units finished, units in all, and while sampling the current estimate of the clean latent
# (1, c, h, w), else None.
Tick = Callable[[int, int, torch.Tensor | None], None]


def silent(done: int, total: int, latent: torch.Tensor | None = None) -> None:
    """A tick that shows nothing and never cancels."""
