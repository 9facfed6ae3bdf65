"""Bringing a service up on a Ray cluster, and taking it down: placement group, one actor a part, the desk last.

Owns the names of actors and how they are started again. What goes where is ``layout.py``'s.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from ..errors import ClusterError
from ..placement.devices import Device, available_memory, find_devices
from . import direct, layout
from .address import NAMESPACE, Address
from .connection import connected
from .desk import Desk
from .layout import Layout, PartPlan
from .remote import Actor
from .stage_actor import StageActor
from .tower_actor import TowerActor
from .writer_actor import WriterActor

GROUP_S = 60.0  # for a placement group to be granted
# Threads of a CPU's parallel loops sleep when they wait: a part's would else spin on cores that other parts need.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}
# Of each kind of part. A client that waits holds one of the desk's; the others work on one and answer meanwhile.
CALLS_AT_ONCE = {"stage": 64, "tower": 8, "writer": 64, "desk": 300}


@dataclass(frozen=True)
class Wanted:
    """What to serve and how. stages: for nodes without a GPU; at_once: requests on the stages at a time. patience_s: for one
    pass, with those of others before it. threads: of each part on a CPU, 0 for as many as torch takes here: fewer
    give other last digits than a model without a cluster. transport: ``direct.STORE`` or ``NIXL``."""

    model: Path
    generator: Path | None
    format: str = "auto"
    size: str = "1:1"
    stages: int = 1
    dtype: torch.dtype | None = None
    at_once: int = 16
    patience_s: float = 300.0
    loading_s: float = 1800.0
    threads: int = 0
    transport: str = direct.STORE


def wanted(options: argparse.Namespace) -> Wanted:
    """Of the arguments of ``hywu serve``."""
    dtype = getattr(torch, options.dtype) if options.dtype else None
    generator = None if options.no_generator else options.generator
    return Wanted(options.model, generator, options.format, options.size, options.stages, dtype, options.at_once,
                  options.patience, threads=options.threads, transport=options.transport)


def start(address: Address, wanted: Wanted, say: Callable[[str], None] = lambda text: None) -> None:
    """Start a service that outlives this process; returns once every part is up and agrees with the others.

    Raises: ClusterError if it is there already, if a part does not come up, or if parts are of different code or weights;
        PlacementError if the cluster's devices do not hold it. What was started is taken down again then.
    """
    connected(address)
    if find(address, "desk") is not None:
        raise ClusterError(f"the service {address.service!r} is up on this cluster: use it, take it down first with `hywu "
                           "serve --stop`, or give this one a name (ADDRESS#NAME)")
    stop(address)  # what a service that broke off left
    found = _layout(wanted)
    say(layout.describe(found))
    try:
        _start_parts(found, wanted, address, _grant(found, address), say)
    except BaseException:
        stop(address)
        raise


def stop(address: Address) -> bool:
    """Take the service down and give its devices back; whether there was one."""
    connected(address)
    parts = [actor for kind, number in _there(address) if (actor := find(address, kind, number)) is not None]
    for actor in parts:
        ray.kill(actor)
    try:
        remove_placement_group(ray.util.get_placement_group(address.actor("group")))
    except ValueError:
        pass  # there is none of that name
    return bool(parts)


def find(address: Address, kind: str, number: int = 0) -> Any | None:
    """A part's actor."""
    try:
        return ray.get_actor(address.actor(kind, number), namespace=NAMESPACE)
    except ValueError:
        return None


def _there(address: Address) -> list[tuple[str, int]]:
    """Kind and number of every part of the service."""
    prefix = address.actor("")
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if actor["namespace"] == NAMESPACE]
    kinds = [name.removeprefix(prefix).split("/") for name in names if name.startswith(prefix)]
    return [(kind, int(number[0]) if number else 0) for kind, *number in kinds]


def _layout(wanted: Wanted) -> Layout:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    gpus = [(node["NodeManagerAddress"], device) for node in nodes if (count := int(node["Resources"].get("GPU", 0)))
            for device in _devices_of(node["NodeID"], count)]
    if gpus:
        return layout.on_gpus(wanted.model, wanted.generator, gpus, format=wanted.format, size=wanted.size, dtype=wanted.dtype)
    workers = [node for node in nodes if node["Resources"].get("CPU", 0) >= 1]
    if not workers:
        raise ClusterError(f"none of the cluster's {len(nodes)} nodes has a GPU or a CPU to give: start nodes with `ray start`")
    return layout.on_cpus(wanted.model, wanted.generator, len(workers), wanted.stages, available_memory()[1], wanted.dtype)


def _devices_of(node: str, count: int) -> list[Device]:
    look = ray.remote(lambda: [device for device in find_devices() if device.kind == "cuda"])
    affinity = NodeAffinitySchedulingStrategy(node, soft=False)
    try:
        return ray.get(look.options(num_gpus=count, num_cpus=0, scheduling_strategy=affinity).remote(), timeout=GROUP_S)
    except ray.exceptions.GetTimeoutError:
        raise ClusterError(f"the {count} GPUs of the node {node[:8]} are taken by others: free them, or start Ray on that node "
                           "with fewer --num-gpus") from None


def _grant(found: Layout, address: Address) -> PlacementGroup:
    """A bundle a device, so that the parts that share one get the same one."""
    bundles = [({"GPU": 1.0, "CPU": 0.01} if found.gpu else {"CPU": 1.0}) | ({} if node is None else {f"node:{node}": 0.001})
               for node in found.bundles]
    group = placement_group(bundles, strategy="PACK" if found.gpu else "SPREAD", name=address.actor("group"),
                            lifetime="detached")
    if not group.wait(GROUP_S):
        raise ClusterError(f"the cluster did not grant {len(bundles)} {'GPUs' if found.gpu else 'CPUs'} within {GROUP_S:.0f} s "
                           f"(there are {ray.cluster_resources()}, free {ray.available_resources()}): end what else runs "
                           "there, or ask for fewer --stages")
    return group


def _start_parts(found: Layout, wanted: Wanted, address: Address, group: PlacementGroup, say: Callable[[str], None]) -> None:
    folder, threads = str(wanted.model.resolve()), wanted.threads or torch.get_num_threads()
    stages, (tower,), (desk,), writers = found.of("stage"), found.of("tower"), found.of("desk"), found.of("writer")

    transport = wanted.transport if len(stages) > 1 else direct.STORE
    direct.check_ray(transport)
    fetch_s = min(direct.LONGEST_FETCH_S, wanted.patience_s / 2)

    def actor(kind: type, part: PartPlan, number: int = 0) -> tuple[Any, str]:
        name = address.actor(part.kind, number)
        return _actor(kind, part, name, group, found.gpu, transport == direct.NIXL), name

    started: list[tuple[PartPlan, Any]] = []
    names: list[str] = []
    for number, part in enumerate(stages):
        make, name = actor(StageActor, part, number)
        names.append(name)
        started.append((part, make.remote(part.name, folder, part.plan, threads, transport, fetch_s)))
    make, tower_name = actor(TowerActor, tower)
    started.append((tower, make.remote(tower.name, folder, tower.plan, threads)))
    written_by, generator = None, ""
    for part in writers:
        generator = str(wanted.generator.resolve())
        dtype = None if found.gpu else found.plan.dtype  # its own where the hardware has it
        make, name = actor(WriterActor, part)
        started.append((part, make.remote(part.name, generator, **layout.mode_of(found), dtype=dtype, threads=threads)))
        written_by = (name, part.name)
    for part, handle in started:
        _up(handle, part, wanted.loading_s, say)
    if len(stages) > 1:
        way = "directly, by NIXL" if transport == direct.NIXL else "through Ray's object store"
        say(f"activations go from stage to stage {way}")
    make, _ = actor(Desk, desk)
    handle = make.remote(
        desk.name, folder, desk.plan,
        [(name, part.name, part.layers.start, len(part.layers)) for name, part in zip(names, stages, strict=True)],
        (tower_name, tower.name), written_by, generator, found.capacity, wanted.at_once, wanted.patience_s, wanted.loading_s,
        threads)
    _up(handle, desk, wanted.loading_s, say)
    answer = ray.get(handle.introduce.remote())
    if "error" in answer:
        raise ClusterError(answer["error"][1])


def _actor(kind: type, part: PartPlan, name: str, group: PlacementGroup, gpu: bool, directly: bool) -> Any:
    resources = {"num_gpus": part.share, "num_cpus": 0} if gpu else {"num_cpus": part.share}
    strategy = PlacementGroupSchedulingStrategy(group, part.bundle)
    # Restarted for ever: a node may go and come back. No call is repeated: what was under way there is lost. Without task
    # events, a history of every pass that the head would keep.
    # Who hands tensors out needs threads that Ray gives them back in; it takes this of the class, not of its options.
    hands_out = directly and part.kind == "stage"
    remote = ray.remote(enable_tensor_transport=True)(kind) if hands_out else ray.remote(kind)
    return remote.options(
        name=name, namespace=NAMESPACE, lifetime="detached", max_restarts=-1, max_task_retries=0,
        max_concurrency=CALLS_AT_ONCE[part.kind], scheduling_strategy=strategy,
        runtime_env={"env_vars": ENVIRONMENT}, enable_task_events=False, **resources)


def _up(handle: Any, part: PartPlan, loading_s: float, say: Callable[[str], None]) -> None:
    actor, began = Actor(handle, part.name, loading_s), time.monotonic()
    said = actor.ready(loading_s, lambda: None)
    say(f"{part.name} is up on node {said['node']}, process {said['pid']}, after {time.monotonic() - began:.1f} s")
