"""The layers of a stage whose weights are not there in the form that is computed with: brought there around each layer's turn.

Owns what happens when a layer's turn comes: its slab arrives (``ring.py``) or lies on the device, is unpacked into the stage's
one compute buffer where it is packed, and the layer's modules get their weights and land their LoRA in the room behind them.
For a few tokens only the dense part comes, and the routed experts that the router chose.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from ...kernels import experts as fused
from ...kernels.few_tokens import few_tokens
from ..backbone.adapted import Experts
from ..backbone.layer import DecoderLayer, MixtureOfExperts
from ..backbone.stage import Stage
from ..checkpoint.formats import Float8
from .ring import DENSE, WHOLE, Ring
from .slab import SlabLayout, Views, adapted_modules, unpack, unpack_weight
from .stored import InMemory, Stored


class Streamed:
    """One layer, how it is stored, and whether its stored form lies on the stage's device."""

    def __init__(self, layer: DecoderLayer, stored: Stored, compute: SlabLayout):
        self.layer, self.stored, self.compute = layer, stored, compute
        for _, module in adapted_modules(layer):
            module.leave()

    def few(self, tokens: int) -> bool:
        """Whether so few tokens come, without a LoRA, that most routed experts would come for nothing."""
        moe = self.layer.mlp
        return (isinstance(moe, MixtureOfExperts) and tokens * moe.gate.top_k < len(moe.gate.wg.weight)
                and not moe.experts.attached())


class Streaming:
    """What a stage's ``present`` and ``rest`` are set to.

    layers: those that are absent, by their index in the stage; all others have their weights where they compute. buffers: of
    the ring through which those pass whose slab is not on the device. Ring and compute buffer are made when the first layer
    comes and given back by ``rest``.
    """

    def __init__(self, stage: Stage, layers: dict[int, Streamed], buffers: int, *, experts_on_host: bool = False):
        self._stage, self._layers, self._buffers, self._experts_on_host = stage, layers, buffers, experts_on_host
        self._ringed = {index: streamed.stored for index, streamed in layers.items() if not self._is_here(streamed.stored)}
        self._ring: Ring | None = None
        self._compute: torch.Tensor | None = None

    @property
    def resident(self) -> bool:
        """``Stage.resident``: no layer has to be brought to the device."""
        return not self._ringed

    def rest(self) -> None:
        """``Stage.rest``: no tokens will come for a while, others may have the memory."""
        ring, held = self._ring, self._ring is not None or self._compute is not None
        self._ring = self._compute = None
        if ring is not None:
            ring.close()
        if not held:
            return
        self._stage.graphs.clear()
        if self._stage.device.type == "cuda":
            # Buffers of gigabytes: left in torch's cache, small tensors would split them and the next ring find no room.
            torch.cuda.empty_cache()

    @contextmanager
    def present(self, index: int, tokens: int) -> Iterator[None]:
        """``Stage.present``: around the turn of the stage's layer ``index``, which ``tokens`` tokens will pass."""
        streamed = self._layers.get(index)
        if streamed is None:
            yield
            return
        few = streamed.few(tokens)
        with self._slab(index, streamed.stored, DENSE if few else WHOLE) as slab:
            views = self._computable(streamed, slab, not few)
            modules = [module for path, module in adapted_modules(streamed.layer) if path in views]
            try:
                for path, module in adapted_modules(streamed.layer):
                    if path in views:
                        module.place(views[path])
                    else:
                        module.elsewhere = self._few_experts(path, module, streamed)
                yield
            finally:
                for module in modules:
                    module.leave()
                if few:
                    streamed.layer.mlp.experts.elsewhere = None

    def _is_here(self, stored: Stored) -> bool:
        return isinstance(stored, InMemory) and stored.slab.device == self._stage.device

    def _slab(self, index: int, stored: Stored, part: int) -> AbstractContextManager[torch.Tensor]:
        if self._is_here(stored):
            return nullcontext(stored.slab)
        if self._ring is None:
            sizes = {number: (ringed.layout.dense_nbytes, ringed.layout.nbytes) for number, ringed in self._ringed.items()}
            self._ring = Ring(self._stage.device, self._buffers, sizes,
                              lambda number, buffer: self._ringed[number].fill(buffer))
        return self._ring.arrived(index, part)

    def _computable(self, streamed: Streamed, slab: torch.Tensor, experts: bool) -> Views:
        if not streamed.stored.layout.packed:
            return streamed.compute.views(slab[: streamed.compute.nbytes if experts else streamed.compute.dense_nbytes])
        if self._compute is None:
            packed = [other.compute.nbytes for other in self._layers.values() if other.stored.layout.packed]
            with torch.inference_mode(False):
                self._compute = torch.empty(max(packed), dtype=torch.uint8, device=self._stage.device)
        compute = streamed.compute
        views = compute.views(self._compute[: compute.nbytes if experts else compute.dense_nbytes])
        unpack(streamed.stored.layout, slab, streamed.layer, views, experts)
        return views

    def _few_experts(self, path: str, module: Experts, streamed: Streamed) -> Callable[..., torch.Tensor]:
        stored = streamed.stored
        if self._experts_on_host and isinstance(stored, InMemory) and not stored.layout.packed:
            return lambda *given: _on_host(module, stored.views[path], *given)
        if not self._is_here(stored):
            return lambda *given: _chosen(path, module, streamed, *given)
        return lambda *given: _chosen_here(path, module, streamed, *given)


def _chosen(
    path: str, module: Experts, streamed: Streamed, x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor,
) -> torch.Tensor:
    """The experts' work with only the chosen ones brought to the device."""
    numbers, place_TK = torch.unique(expert_TK, return_inverse=True)
    numbers = numbers.tolist()
    stored = streamed.stored.experts(path, numbers, x_TD.device)
    return _unpacked(path, module, streamed, stored, x_TD, place_TK, weight_TK)


def _chosen_here(
    path: str, module: Experts, streamed: Streamed, x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor,
) -> torch.Tensor:
    """The experts' work where they lie on the device, packed; which they are is known there alone."""
    views, codecs = streamed.stored.views[path], streamed.stored.layout.codecs
    first, second = "gate_and_up_proj", "down_proj"
    if codecs.get((path, first)) == codecs.get((path, second)) == Float8():
        scales = views[f"{first}.weight_scale"], views[f"{second}.weight_scale"]
        y_TD = few_tokens(x_TD, views[f"{first}.weight"], views[f"{second}.weight"], expert_TK, weight_TK, scales)
        if y_TD is not None:
            return y_TD
    if len(x_TD) > 1:
        return _chosen(path, module, streamed, x_TD, expert_TK, weight_TK)
    # A token's experts are all different, so each gets a place of its own.
    stored = streamed.stored.picked(path, expert_TK[0])
    place_TK = torch.arange(expert_TK.shape[1], device=x_TD.device)[None]
    return _unpacked(path, module, streamed, stored, x_TD, place_TK, weight_TK)


def _unpacked(
    path: str, module: Experts, streamed: Streamed, stored: Mapping[str, torch.Tensor], x_TD: torch.Tensor,
    place_TK: torch.Tensor, weight_TK: torch.Tensor,
) -> torch.Tensor:
    """The work of the experts whose ``stored`` tensors these are; ``place_TK`` says where each choice is among them."""
    weights, count = {}, len(next(iter(stored.values())))
    for name in module.ROOMS:
        weight = getattr(module, name)
        weights[name] = torch.empty((count, *weight.shape[1:]), dtype=weight.dtype, device=x_TD.device)
        unpack_weight(streamed.stored.layout, stored, path, name, weights[name])
    return fused.expert_mlp(x_TD, weights["gate_and_up_proj"], weights["down_proj"], place_TK, weight_TK)


def _on_host(
    module: Experts, views: dict[str, torch.Tensor], x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor,
) -> torch.Tensor:
    """The experts' work where their weights lie: the token travels, not they."""
    inner = module.down_proj.shape[2]
    gate_and_up_EFD, down_EDF = views["gate_and_up_proj"][:, : 2 * inner], views["down_proj"][:, :, :inner]
    y_TD = fused.expert_mlp(x_TD.cpu(), gate_and_up_EFD, down_EDF, expert_TK.cpu(), weight_TK.cpu())
    return y_TD.to(x_TD.device)
