"""A linear with its LoRA in the padding: the A side is computed by the product with the weight.

Same signature and mathematics as ``reference.adapted_linear``; meant for inference, gradients go through the reference.
"""

import torch

from . import reference
from .padding import beside
from .reference import Adapter


def adapted_linear(x_TI: torch.Tensor, weight_OI: torch.Tensor, adapter: Adapter | None = None) -> torch.Tensor:
    """``x Wᵀ + (s · x Aᵀ) Bᵀ``: (T, I), (O, I) to (T, O), a view of wider rows where the A side lies behind W."""
    wide_GI = None if adapter is None else beside(weight_OI, adapter.a, dim=0)
    if wide_GI is None:
        return reference.adapted_linear(x_TI, weight_OI, adapter)
    y_TO, u_TR = (x_TI @ wide_GI.mT).split((len(weight_OI), len(adapter.a)), dim=1)
    return y_TO.addmm_(u_TR, adapter.folded().b.mT)
