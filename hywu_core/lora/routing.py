"""How many tokens were routed to each expert while a ``with`` block ran.

``recording`` is the single place that gives routers their counters, on entry, and takes them away, on exit, error and cancel.
Counting adds to a tensor where the router is: nothing waits for a device until the numbers are asked for.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..backbone.layer import MixtureOfExperts, Router
from ..backbone.model import Backbone
from ..errors import RequestError


class Routing:
    """Counters of a backbone's routers, one tensor a layer where its router is; layers without experts have none."""

    def __init__(self, routers: list[Router | None], experts: int):
        # Outside of inference mode, or a stage's thread that is not in it could not add to them.
        with torch.inference_mode(False):
            self._counts_E = [None if router is None else torch.zeros(experts, dtype=torch.int64, device=_where(router))
                              for router in routers]
        self._experts = experts

    def of(self, layer: int) -> torch.Tensor | None:
        """(E,) int64 where the layer's router is; None for a layer without routed experts."""
        return self._counts_E[layer]

    def counts(self) -> torch.Tensor:
        """(N, E) int64 on the CPU: how often each expert was chosen so far; zeros for layers without routed experts."""
        nothing = torch.zeros(self._experts, dtype=torch.int64)
        return torch.stack([nothing if counts_E is None else counts_E.cpu() for counts_E in self._counts_E])


def _where(router: Router) -> torch.device:
    """Of a model that is elsewhere nothing is here but the counts."""
    return torch.device("cpu") if router.wg.weight.is_meta else router.wg.weight.device


@contextmanager
def recording(backbone: Backbone) -> Iterator[Routing]:
    """While the block runs, every choice of an expert is counted: of all rows and steps, each K times a token and layer.

    What is not computed is not counted: tokens whose keys and values are cached, steps that TaylorCache skips. The counts can
    be read after the block, too.

    Raises:
        RequestError: the backbone is being recorded already.
    """
    routers = [layer.mlp.gate if isinstance(layer.mlp, MixtureOfExperts) else None for layer in backbone.model.layers]
    if any(router is not None and router.counts_E is not None for router in routers):
        raise RequestError("the backbone's routing is being recorded already: let that run finish first")
    routing = Routing(routers, backbone.config.num_experts)
    try:
        for layer, router in enumerate(routers):
            if router is not None:
                router.counts_E = routing.of(layer)
        yield routing
    finally:
        for router in routers:
            if router is not None:
                router.counts_E = None
