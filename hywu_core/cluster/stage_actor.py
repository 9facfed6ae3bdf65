"""A stage of the backbone in a process of its own: the same ``Stage``, with the caches and LoRA shards of many requests.

Owns what belongs to a request here (keys and values, its part of the LoRAs, its count of routed tokens) from ``open`` to
``close``, putting on the right LoRA before a pass, and the order of passes: a single token goes before whole pictures, which
take so much longer that one who thinks would else crawl at the pace of those who paint. Who may be open is the desk's affair.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from ..backbone.cache import KVCache
from ..backbone.layer import MixtureOfExperts
from ..backbone.mask import CanvasSight
from ..errors import ClusterError, LoRAError
from ..handle import InjectedLoRA
from ..lora.attach import hang, take_off
from ..placement.build import ELSEWHERE
from ..placement.plan import Plan
from . import direct
from .direct import Handed
from .part import Part, load_share
from .wire import Parcel, opened, parcel

FEW_TOKENS = 4  # of a thought, which do not wait behind whole pictures: one, and those that it forces


@dataclass(frozen=True, eq=False)
class Shard:
    """A stage's part of a LoRA, on its device: as much of one as ``hang`` asks for."""

    tensors: dict[str, torch.Tensor]
    scale_R: torch.Tensor


@dataclass(eq=False)
class _Request:
    loras: list[InjectedLoRA]
    cache: KVCache
    counts_E: list[torch.Tensor | None] = field(default_factory=list)


def partial_plan(plan: Plan, **held: Any) -> Plan:
    """The plan of a process that holds only some of it; what ``held`` does not name is elsewhere."""
    places = dict.fromkeys(plan.places, ELSEWHERE) | held.pop("places", {})
    return replace(plan, **({"stages": (), "visits": {}, "places": places} | held))


class StageActor(Part):
    """The layers of a plan's one stage. transport: ``direct.STORE`` or ``NIXL``; fetch_s: longest wait for the stage before."""

    def __init__(self, name: str, folder: str, plan: Plan, threads: int = 0, transport: str = direct.STORE,
                 fetch_s: float = direct.LONGEST_FETCH_S):
        self._placed, fingerprint = load_share(folder, plan)
        self._stage = self._placed.backbone.stages[0]
        layers = range(self._stage.first, self._stage.first + len(self._stage.layers))
        self._modules = [(path, module) for path, module in self._placed.backbone.adapted_modules()
                         if int(path.split(".")[2]) in layers]
        self._routers = [layer.mlp.gate if isinstance(layer.mlp, MixtureOfExperts) else None for layer in self._stage.layers]
        self._experts = self._placed.backbone.config.num_experts
        self._requests: dict[str, _Request] = {}
        self._wearing: _Request | None = None
        self._direct, self._fetch_s, self._fetched = direct.begin(transport), fetch_s, 0
        super().__init__(name, fingerprint, threads)

    def hello(self) -> dict[str, Any]:
        return super().hello() | {"open": len(self._requests), "weights_held": self._placed.nbytes(self._stage.device),
                                  "direct": self._direct, "fetched": self._fetched, "remembered": direct.remembered()}

    def open(self, request: str, rows: int, capacity: int, headers: Sequence[dict[str, Any]], *shards: bytes) -> None:
        """Make room for a request. headers: rank, scale (R numbers) and strength of each LoRA, whose part for this stage is a
        safetensors file in ``shards``.

        Raises: LoRAError for a shard that is not exactly this stage's.
        """
        self.work(self._open, request, rows, capacity, headers, shards, urgent=True)

    def _open(self, request: str, rows: int, capacity: int, headers: Sequence[dict[str, Any]], shards: Sequence[bytes]) -> None:
        loras = [InjectedLoRA(Shard(self._checked(shard, header["rank"]), torch.tensor(header["scale"], dtype=torch.float64)),
                              float(header["strength"])) for header, shard in zip(headers, shards, strict=True)]
        counts_E = [None if router is None else torch.zeros(self._experts, dtype=torch.int64, device=self._stage.device)
                    for router in self._routers]
        self._requests[request] = _Request(loras, self._stage.new_cache(rows, capacity), counts_E)

    def run(self, request: str | None, hidden: Parcel | Handed, aside: dict[str, Any],
            directly: bool = False) -> Parcel | Handed:
        """A pass. request: whose cache and LoRAs, None for one that keeps nothing. aside: what is beside the hidden states,
        see ``remote.aside``. directly: whether the next stage fetches the result from here.

        Raises: ClusterError for a request that is not open here: this process is younger than it; if the stage before has died
            with what it handed out.
        """
        return self.work(self._pass, request, hidden, aside, directly, urgent=hidden[1][1] <= FEW_TOKENS)

    def _pass(self, request: str | None, hidden: Parcel | Handed, aside: dict[str, Any], directly: bool) -> Parcel | Handed:
        found = None if request is None else self._requests.get(request)
        if request is not None and found is None:
            raise ClusterError(f"{self._identity} was started again while the request was under way: run it again")
        self._wear(found)
        device = self._stage.device
        if direct.is_handed(hidden):
            x_BLD = direct.fetch(hidden, self._fetch_s)
            self._fetched += 1
        else:
            x_BLD = opened(hidden, device)
        cos_LQ, sin_LQ = (opened(aside[part], device) for part in ("cos", "sin"))
        mask = None if aside["mask"] is None else opened(aside["mask"], device)
        if aside["keys"] is not None:
            mask = CanvasSight(mask, aside["keys"])
        positions_L = None if aside["positions"] is None else opened(aside["positions"], device)
        cache = None if found is None else found.cache
        if cache is not None:
            cache.reserve(int(aside["length"]))
        x_BLD = self._stage.run(x_BLD, (cos_LQ, sin_LQ), mask, cache, positions_L, lambda layer: None)
        # A few tokens are some kilobytes, which travel with Ray's own messages.
        return direct.hand(x_BLD, str(self._identity)) if directly and x_BLD.shape[1] > FEW_TOKENS else parcel(x_BLD)

    def close(self, request: str) -> Parcel:
        """Give back what the request holds; returns (layers, E) int64, how many tokens went to each expert. Closing what is not
        open does nothing."""
        return self.work(self._close, request, urgent=True)

    def _close(self, request: str) -> Parcel:
        found = self._requests.pop(request, None)
        if found is None:
            return parcel(torch.zeros(len(self._routers), self._experts, dtype=torch.int64))
        if self._wearing is found:
            self._wear(None)
        self._stage.rest()
        nothing = torch.zeros(self._experts, dtype=torch.int64)
        return parcel(torch.stack([nothing if counts_E is None else counts_E.cpu() for counts_E in found.counts_E]))

    def close_all(self) -> None:
        """For a desk that was started again: nobody knows the requests that are open here."""
        for request in list(self._requests):
            self.close(request)

    def _wear(self, request: _Request | None) -> None:
        """Put on the LoRAs and counters of a request; nothing, if it wears them already."""
        if request is self._wearing:
            return
        take_off(self._modules)
        self._wearing = None  # if what follows fails, nobody's are on
        for router in self._routers:
            if router is not None:
                router.counts_E = None
        if request is not None:
            active = [lora for lora in request.loras if lora.strength != 0.0]
            try:
                if active:
                    hang(self._modules, active)
            except BaseException:
                take_off(self._modules)
                raise
            for router, counts_E in zip(self._routers, request.counts_E, strict=True):
                if router is not None:
                    router.counts_E = counts_E
        self._wearing = request

    def _checked(self, shard: bytes, rank: int) -> dict[str, torch.Tensor]:
        try:
            found = safetensors.torch.load(shard)
        except (SafetensorError, TypeError, KeyError) as error:
            raise LoRAError(f"the LoRA's part for {self._identity} cannot be read ({error}): generate it again") from None
        targets = [(f"{path}.{target.name}".rstrip("."), target) for path, module in self._modules
                   for target in module.targets()]
        wanted = {f"{path}.lora_{side}": shape for path, target in targets
                  for side, shape in (("A", target.a_shape(rank)), ("B", target.b_shape(rank)))}
        wrong = [key for key in {**wanted, **found} if key not in found or tuple(found[key].shape) != wanted.get(key)
                 or not found[key].is_floating_point()]
        if wrong:
            raise LoRAError(f"the LoRA's part for {self._identity} does not fit in {len(wrong)} of {len(wanted)} matrices, "
                            f"first {wrong[0]}: it was made for another backbone, generate it again")
        # In the dtype that it is used in: what the desk has counted.
        dtype = self._placed.backbone.dtype
        return {key: tensor.to(self._stage.device, dtype) for key, tensor in found.items()}
