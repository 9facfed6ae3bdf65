"""Activations from stage to stage without the object store: the receiver reads the sender's memory, on GPUs card to card.

Owns whether a process can do that (by NIXL, which Ray calls a one-sided transport), handing a tensor out and fetching one.
Transports in which both ends take part, NCCL and GLOO, are not used: when a transfer fails Ray ends both actors for good.
"""

import importlib.util
from typing import Any

import torch

from ..errors import ClusterError

STORE, NIXL = "store", "nixl"  # what a service is told
LONGEST_FETCH_S = 45.0  # less than Ray's own limit of 60, which would say that the sender is dead
# Who has it, its shape, and its reference; in a list, because Ray would fetch what is an argument by itself, without a limit.
Handed = tuple[str, tuple[int, ...], list[Any]]


def check_ray(transport: str) -> None:
    """Raises ClusterError if this Ray is too old for the transport."""
    if transport == NIXL and importlib.util.find_spec("ray.experimental.rdt") is None:
        raise ClusterError("--transport nixl needs a newer Ray: pip install 'ray[client]>=2.60' on every node and desk, or "
                           "leave it away")


def begin(transport: str) -> bool:
    """Whether this process sends and reads directly; it is ready for that then. Raises ClusterError if it should and cannot."""
    if transport != NIXL:
        return False
    check_ray(transport)
    from ray.experimental.rdt.util import get_tensor_transport_manager

    try:
        get_tensor_transport_manager("NIXL").get_nixl_agent()
    except Exception as error:  # NIXL's have no common base; nobody can cancel an actor that starts
        raise ClusterError(f"NIXL cannot be used here ({type(error).__name__}: {str(error)[:200]}): pip install nixl on every "
                           "node, or serve without --transport nixl") from error
    return True


def hand(tensor: torch.Tensor, sender: str) -> Handed:
    """A tensor as what a method returns; its memory stays until nobody refers to what was returned."""
    import ray

    return sender, tuple(tensor.shape), [ray.put(tensor.contiguous(), _tensor_transport="nixl")]


def is_handed(what: Any) -> bool:
    return isinstance(what[2], list)


def fetch(handed: Handed, seconds: float) -> torch.Tensor:
    """The tensor, in memory of its own on this process's device. For one thread of a process only: Ray drops a sender's
    connection while others read by it.

    Raises ClusterError, which names who had it.
    """
    import ray

    sender, _, (reference,) = handed
    if torch.cuda.is_available():
        # It is written past the stream, into memory that queued kernels may still be using.
        torch.cuda.current_stream().synchronize()
    try:
        return ray.get(reference, timeout=seconds)
    except ray.exceptions.GetTimeoutError:
        raise ClusterError(f"{sender} has not given its activations away for {seconds:.0f} s: run the request again; if it "
                           "keeps happening, serve without --transport nixl") from None
    except ray.exceptions.RayError as error:
        raise ClusterError(f"{sender} died or cannot be reached while the request was under way ({type(error).__name__}); it "
                           "is started again and loads its weights, run the request again") from None
    finally:
        # Ray 2.60 keeps what it knows of a reference that came from elsewhere for ever (its issue 57962).
        _remembered().pop(reference.hex(), None)


def remembered() -> int:
    """Of how many tensors Ray keeps something in this process."""
    return len(_remembered())


def _remembered() -> dict:
    import ray

    manager = getattr(ray._private.worker.global_worker, "rdt_manager", None)
    return getattr(manager, "_managed_rdt_metadata", {})
