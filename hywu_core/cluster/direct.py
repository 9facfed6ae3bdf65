"""Activations from stage to stage without the object store: the receiver reads the sender's memory, on GPUs card to card.

Owns whether a process can do that (by NIXL, which Ray calls a one-sided transport), handing a tensor out and fetching one.
Transports in which both ends take part, NCCL and GLOO, are not used: when a transfer fails Ray ends both actors for good.
"""

import importlib.util
from typing import Any

import torch

from ..errors import ClusterError

AUTO, NIXL, STORE = "auto", "nixl", "store"
TRANSPORTS = (AUTO, NIXL, STORE)
LONGEST_FETCH_S = 60.0
# Who has it, its shape, and its reference; in a list, because Ray would fetch what is an argument by itself, without a limit.
Handed = tuple[str, tuple[int, ...], list[Any]]


def possible(wanted: str, device: str) -> bool:
    """Whether stages on that kind of device are to send directly. Raises ClusterError if that is asked for and cannot be."""
    if wanted == STORE or (wanted == AUTO and device != "cuda"):
        return False
    missing = [name for name, module in (("nixl", "nixl"), ("a Ray that knows it (2.60)", "ray.experimental.rdt"))
               if importlib.util.find_spec(module) is None]
    if missing and wanted == NIXL:
        raise ClusterError(f"--transport nixl needs {' and '.join(missing)} on every node: pip install nixl "
                           "'ray[client]>=2.60' there, or leave --transport away")
    return not missing


def begin(wanted: str, device: torch.device) -> bool:
    """As ``possible``, for this process, which is ready for it then. Raises ClusterError if NIXL is there and does not work."""
    if not possible(wanted, device.type):
        return False
    from ray.experimental.rdt.util import get_tensor_transport_manager

    try:
        get_tensor_transport_manager("NIXL").get_nixl_agent()
    except Exception as error:  # NIXL's have no common base; nobody can cancel an actor that starts
        raise ClusterError(f"NIXL is installed and does not work here ({type(error).__name__}: {str(error)[:200]}): mend it, "
                           "or take `hywu serve --transport store`") from error
    return True


def hand(tensor: torch.Tensor, sender: str) -> Handed:
    """A tensor as what a method returns; its memory stays until nobody refers to what was returned."""
    import ray

    return sender, tuple(tensor.shape), [ray.put(tensor.contiguous(), _tensor_transport="nixl")]


def is_handed(what: Any) -> bool:
    return isinstance(what[2], list)


def fetch(handed: Handed, seconds: float) -> torch.Tensor:
    """The tensor, in memory of its own on this process's device. Raises ClusterError, which names who had it."""
    import ray

    sender, _, (reference,) = handed
    try:
        return ray.get(reference, timeout=seconds)
    except ray.exceptions.GetTimeoutError:
        raise ClusterError(f"{sender} has not given its activations away for {seconds:.0f} s: run the request again; if it "
                           "keeps happening, `hywu serve --transport store`") from None
    except ray.exceptions.RayError as error:
        raise ClusterError(f"{sender} died or cannot be reached while the request was under way ({type(error).__name__}); it "
                           "is started again and loads its weights, run the request again") from None
    finally:
        # Ray 2.60 keeps what it knows of a reference that came from elsewhere for ever (its issue 57962).
        manager = getattr(ray._private.worker.global_worker, "rdt_manager", None)
        getattr(manager, "_managed_rdt_metadata", {}).pop(reference.hex(), None)
