"""Classifier-free guidance between the conditional and the unconditional row (spec section 8)."""

import torch


def guide(velocity_bchw: torch.Tensor, guidance: float) -> torch.Tensor:
    """Rows [cond, uncond] (2, c, h, w) -> (1, c, h, w), ``v_u + g (v_c - v_u)`` in fp32. One row passes unchanged."""
    if velocity_bchw.shape[0] == 1:
        return velocity_bchw.float()
    cond, uncond = velocity_bchw.float().chunk(2)
    return uncond + guidance * (cond - uncond)
