"""Plans for tests, which no planner would make on a CPU: stages there, layers streamed through a ring as to a GPU."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from comfyui_hywu.hywu_core.config import BackboneConfig
from comfyui_hywu.hywu_core.placement.build import whole
from comfyui_hywu.hywu_core.placement.plan import Plan, StagePlan
from comfyui_hywu.hywu_core.placement.streaming import Streaming


def stage(first: int, layers: int, streamed: Iterable[int] = (), source: str = "ram", ring: int = 2, on_host: bool = False):
    return StagePlan("cpu", first, layers, tuple(streamed), source, ring, experts_on_host=on_host)


def plan(config: BackboneConfig, *stages: StagePlan, form: str = "bf16", **changes) -> Plan:
    """On the CPU in fp32; places as ``whole`` has them but for those in ``changes["places"]``."""
    plain = whole(config, torch.float32, "cpu")
    places = plain.places | changes.pop("places", {})
    return replace(plain, stages=stages or plain.stages, format=form, places=places, **changes)


def even_stages(layers: int, count: int, **streamed) -> list[StagePlan]:
    """So many stages of about one length; with ``source`` and ``ring`` all their layers are streamed."""
    ends = [layers * number // count for number in range(count + 1)]
    return [stage(first, stop - first, range(first, stop) if streamed else (), **streamed)
            for first, stop in zip(ends, ends[1:], strict=False) if stop > first]


def through_the_ring(monkeypatch) -> None:
    """On a CPU a slab in memory is where it computes; from now on all go through the ring, as to a GPU."""
    monkeypatch.setattr(Streaming, "_is_here", lambda self, stored: False)
