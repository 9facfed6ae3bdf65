"""Counts the bytes of all tensors that are alive while code runs on ``meta``, as a GPU's allocator would hold them.

Owns the counting, and what stands in on ``meta`` for the fused kernels of a GPU: attention without its matrix, SwiGLU in place.
Knows nothing of plans and nothing of ``hywu_core/placement``: it is the second opinion on them.
"""

import weakref
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from comfyui_hywu.kernels import swiglu_lora
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """While active, ``now`` is what tensors made inside hold and ``peak`` the most they held at once (bytes)."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._held: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        result = function(*arguments, **keywords)
        known = {leaf.untyped_storage()._cdata for leaf in tree_iter((arguments, keywords)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_iter(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in known:
                self._hold(leaf.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._held:
            self.now += size
            self._held[key] = weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.now -= size
        del self._held[key]


class FusedAttention(TorchFunctionMode):
    """Attention as the fused kernels do it: the result, laid out as the queries come, and a bool mask as numbers."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            return _attention(*arguments, **(keywords or {}))
        return function(*arguments, **(keywords or {}))


def _attention(q_BHLQ, k_BHSQ, v_BHSQ, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    numbers = attn_mask.to(q_BHLQ.dtype) if attn_mask is not None and attn_mask.dtype == torch.bool else attn_mask
    rows, heads, length, _ = q_BHLQ.shape
    out_BHLQ = q_BHLQ.new_empty(rows, length, heads, v_BHSQ.shape[-1]).transpose(1, 2)
    del numbers
    return out_BHLQ


@contextmanager
def counted(fused: bool = True):
    """A ``LiveBytes`` under which the kernels of a GPU (``fused``) or of a CPU are stood in for; no gradients."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if fused:
            stack.enter_context(mock.patch.object(swiglu_lora, "chosen", lambda device, dtype: lambda *given: given[-1]))
        # Asked for the device's autocast, which ``meta`` has none of.
        stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", lambda *device: False))
        stack.enter_context(FusedAttention())
        yield stack.enter_context(LiveBytes())
