"""CUDA graphs without a GPU: the operators of a step, recorded with the very tensors that they got, are replayed into the very
tensors that they made, which is what a graph does. Whatever Python decides by a token's number would be seen.
"""

import pytest
import torch
from comfyui_hywu.hywu_core.backbone import token_graph
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """Every operator of a block, to be run again on the same memory."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        keywords = keywords or {}
        made = function(*arguments, **keywords)
        self.steps.append((function, arguments, keywords, made))
        return made

    @torch.inference_mode()  # a graph writes to memory, whatever mode it was made in
    def replay(self):
        for function, arguments, keywords, made in self.steps:
            given = {each.untyped_storage().data_ptr() for each in tree_leaves((arguments, keywords))
                     if isinstance(each, torch.Tensor)}
            for place, value in zip(tree_leaves(made), tree_leaves(function(*arguments, **keywords)), strict=True):
                # Views and what is done in place are there already.
                if isinstance(place, torch.Tensor) and place.untyped_storage().data_ptr() not in given:
                    place.copy_(value)


@pytest.fixture
def captures(monkeypatch):
    """Graphs on a CPU; the list gets an entry a capture."""
    made = []

    def recorded(work, device):
        made.append(device)
        with Recorder() as recorder:
            result = work()
        return result, recorder.replay

    monkeypatch.setattr(token_graph, "possible", lambda device, dtype: True)
    monkeypatch.setattr(token_graph, "recorded", recorded)
    return made
