"""A stage: a contiguous run of layers with its part of the cache and of the LoRA, on one device.

The backbone is stages in a row, so placement over devices changes which stages there are and no model code. A stage only
refers to its layers; the parameters are registered once, in the model.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from .cache import KVCache
from .layer import DecoderLayer
from .mask import CanvasSight, as_numbers
from .token_graph import TokenGraphs

Rope = tuple[torch.Tensor, torch.Tensor]


class Stage:
    """Layers ``first`` .. ``first + len(layers)`` of the backbone.

    ``present`` is entered around each layer, with its index in the stage and how many tokens it will run on: whoever placed the
    weights elsewhere brings them there (``placement/streaming.py``). ``rest`` gives back what that takes until the next layer.
    ``resident``: nothing has to be brought to the device, so that a single token may be one CUDA graph.
    """

    def __init__(self, layers: Sequence[DecoderLayer], first: int):
        self.layers = list(layers)
        self.first = first
        self.present: Callable[[int, int], AbstractContextManager] = lambda index, tokens: nullcontext()
        self.rest: Callable[[], None] = lambda: None
        self.resident = True
        self.graphs = TokenGraphs(self.layers)

    @property
    def device(self) -> torch.device:
        return self.layers[0].input_layernorm.weight.device

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """An empty cache for this stage's layers, on its device."""
        attention = self.layers[0].self_attn
        weight = attention.query_layernorm.weight
        return KVCache(len(self.layers), rows, attention.kv_heads, capacity, attention.head_dim,
                       device=weight.device, dtype=weight.dtype)

    def run(
        self,
        hidden_BLD: torch.Tensor,
        rope: Rope,
        mask: torch.Tensor | CanvasSight | None,
        cache: KVCache | None,
        positions_L: torch.Tensor | None,
        on_layer: Callable[[int], None],
    ) -> torch.Tensor:
        """Hidden states through this stage's layers; inputs are brought to its device once.

        on_layer is called with the layer's index in the backbone after each layer, and may raise to cancel.
        """
        device = self.device
        hidden_BLD = hidden_BLD.to(device)
        rope = (rope[0].to(device), rope[1].to(device))
        mask = None if mask is None else as_numbers(mask.to(device), hidden_BLD.dtype)
        positions_L = None if positions_L is None else positions_L.to(device)
        tokens, queued = hidden_BLD.shape[0] * hidden_BLD.shape[1], deque()
        if tokens == 1 and self.resident and mask is None and cache is not None:
            after_BLD = self.graphs.run(hidden_BLD, rope, cache, positions_L, self.present)
            if after_BLD is not None:
                for index in range(len(self.layers)):
                    on_layer(self.first + index)
                return after_BLD
        for index, layer in enumerate(self.layers):
            with self.present(index, tokens):
                hidden_BLD = layer(hidden_BLD, rope, mask, cache, index, positions_L)
            if device.type == "cuda" and tokens > 1:
                # A GPU only queues: two layers ahead are enough to keep it busy, more would make a cancel wait for them.
                queued.append(torch.cuda.current_stream(device).record_event())
                if len(queued) > 2:
                    queued.popleft().synchronize()
            on_layer(self.first + index)
        return hidden_BLD
