"""One token through a stage as one CUDA graph: what takes a thousand launches is queued by a single call.

Owns capturing, trying out what was captured, and knowing when it no longer holds. A graph reads and writes fixed addresses, so
what changes from token to token lies in buffers of its own, and it goes when a cache grows or a weight has moved. Thinking runs
without a LoRA; with one, layers run as they always do.
"""

import functools
import logging
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from weakref import WeakKeyDictionary

import torch

from ...kernels import token_attention
from .adapted import Adapted
from .cache import KVCache
from .layer import DecoderLayer, Router
from .mask import UpToSlot

log = logging.getLogger("hywu")
Work = Callable[[], torch.Tensor]
Present = Callable[[int, int], AbstractContextManager]
# What a replay may differ from the same step without a graph, as a part of its norm: libraries may choose other kernels.
TOLERANCE = 0.02


class TokenGraphs:
    """The graphs of one stage's layers, one a cache. ``broken``: capturing failed here once and is not tried again."""

    def __init__(self, layers: Iterable[DecoderLayer]):
        self._layers = list(layers)
        self._modules = [module for layer in self._layers for module in layer.modules() if module._parameters]
        self._routers = [module for layer in self._layers for module in layer.modules() if isinstance(module, Router)]
        self._graphs: WeakKeyDictionary[KVCache, _Graph] = WeakKeyDictionary()
        self.broken = False

    def run(
        self, hidden_BLD: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], cache: KVCache, positions_L: torch.Tensor,
        present: Present,
    ) -> torch.Tensor | None:
        """One token (1, 1, D) through all layers, its keys and values written to the cache; None if no graph can do that.

        present: entered around each layer, as in ``Stage``; what it does on the device becomes a part of the graph.
        """
        if self.broken or not possible(hidden_BLD.device, hidden_BLD.dtype) or torch.is_grad_enabled():
            return None
        addresses = self._addresses()
        if addresses is None:
            return None
        graph = self._graphs.get(cache)
        if graph is None or not graph.holds(cache, addresses):
            self._graphs.pop(cache, None)
            graph = _Graph(self._layers, present, cache, addresses, hidden_BLD, rope, positions_L)
            first_BLD, why = graph.capture([router.counts_E for router in self._routers if router.counts_E is not None])
            if why is None:
                self._graphs[cache] = graph
            else:
                self.broken = True
                log.warning("HY-WU: no CUDA graph of a token on %s (%s): thinking is slower", hidden_BLD.device, why)
            return first_BLD
        return graph.replayed(hidden_BLD, rope, positions_L)

    def clear(self) -> None:
        """Forget all graphs: memory that they use is given back."""
        self._graphs.clear()

    def _addresses(self) -> list[int] | None:
        """Where everything lies that a graph would read or count in; None while a LoRA is attached."""
        found = []
        for module in self._modules:
            if isinstance(module, Adapted) and module.attached():
                return None
            found += [parameter.data_ptr() for parameter in module._parameters.values() if parameter is not None]
        return found + [0 if router.counts_E is None else router.counts_E.data_ptr() for router in self._routers]


class _Graph:
    """The buffers of one graph, and the graph."""

    def __init__(self, layers, present, cache, addresses, hidden_BLD, rope, positions_L):
        self._layers, self._present, self._cache, self._addresses = layers, present, cache.whole(), addresses
        with torch.inference_mode(False):  # or they could not be filled outside of it
            self._given = [torch.empty_like(each) for each in (hidden_BLD, *rope, positions_L)]
        self._fill(hidden_BLD, rope, positions_L)
        self._result_BLD: torch.Tensor | None = None
        self._replay: Callable[[], None] | None = None

    def holds(self, cache: KVCache, addresses: list[int]) -> bool:
        return cache.shares(self._cache) and addresses == self._addresses

    def capture(self, counts: list[torch.Tensor]) -> tuple[torch.Tensor, str | None]:
        """The first token's hidden states, made without a graph, and why there is no graph, if there is none.

        The graph is tried out on the same token, which ``counts`` shall not count again; the cache gets the same values again.
        """
        first_BLD = self._work()
        before = [counts_E.clone() for counts_E in counts]
        try:
            self._result_BLD, self._replay = recorded(self._work, first_BLD.device)
            self._replay()
            apart = float((self._result_BLD - first_BLD).float().norm() / first_BLD.float().norm().clamp_min(1e-12))
        except RuntimeError as error:  # a graph that does not fit into memory among them
            return first_BLD, str(error).partition("\n")[0]
        finally:
            for counts_E, once_E in zip(counts, before, strict=True):
                counts_E.copy_(once_E)
        return first_BLD, None if apart <= TOLERANCE else f"its result is {apart:.1%} off"

    def replayed(self, hidden_BLD, rope, positions_L) -> torch.Tensor:
        self._fill(hidden_BLD, rope, positions_L)
        self._replay()
        return self._result_BLD.clone()

    def _fill(self, hidden_BLD, rope, positions_L) -> None:
        for place, value in zip(self._given, (hidden_BLD, *rope, positions_L), strict=True):
            place.copy_(value)

    def _work(self) -> torch.Tensor:
        hidden_BLD, cos_LQ, sin_LQ, positions_L = self._given
        for index, layer in enumerate(self._layers):
            with self._present(index, 1):
                hidden_BLD = layer(hidden_BLD, (cos_LQ, sin_LQ), UpToSlot(positions_L), self._cache, index, positions_L)
        return hidden_BLD


def possible(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether graphs exist here, and a kernel whose number of keys is not a part of the graph."""
    return (device.type == "cuda" and not torch.is_autocast_enabled("cuda")
            and token_attention.chosen(device, dtype) is not token_attention.composed)


def recorded(work: Work, device: torch.device) -> tuple[torch.Tensor, Callable[[], None]]:
    """The tensor that ``work`` returns, and what does the work again into that same tensor.

    Raises RuntimeError where something in it waits for the device: before a capture begins, since one that fails leaves torch's
    allocator in a state that others would suffer from.
    """
    pool, stream = _lane(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        _refuse_to_wait(work, device, stream)
        torch.cuda.synchronize(device)
        # Not torch.cuda.graph: when a capture fails it leaves its stream the current one.
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # other threads may go on meanwhile
            try:
                result = work()
            finally:
                graph.capture_end()
    return result, graph.replay


def _refuse_to_wait(work: Work, device: torch.device, stream: "torch.cuda.Stream") -> None:
    """Do the work on ``stream`` and raise RuntimeError if it waits for the device anywhere. What libraries keep for a stream is
    made here and not in a graph's memory."""
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        if waits(work):
            raise RuntimeError("a step of it waits for the GPU")


def waits(work: Callable[[], object]) -> int:
    """How often ``work``, which is done, waits for the current GPU."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")  # "error" would be one in other threads, too
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("called a synchronizing CUDA operation" in str(each.message) for each in caught)


@functools.cache
def _lane(device: torch.device) -> tuple[tuple[int, int], "torch.cuda.Stream"]:
    """The memory and the stream of all captures of a device: graphs are replayed one after the other, and what they leave is
    copied at once, so they can share them."""
    return torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
