"""One connection of this process to Ray: joining a cluster, or starting one of this machine alone."""

import ray
from ray.exceptions import RayError

from ..errors import ClusterError
from .address import NAMESPACE, Address, refuse_silence

_connected: list[str] = []
_REFUSED = (ConnectionError, RuntimeError, ValueError, OSError, RayError)


def connected(address: Address) -> None:
    """Connect this process, once.

    Raises: ClusterError if nobody answers there, if the versions of Ray or Python differ, or if it is connected elsewhere.
    """
    if ray.is_initialized():
        if _connected and address.ray not in (_connected[0], "auto"):
            raise ClusterError(f"this process is connected to the cluster {_connected[0]} and can use no second one "
                               f"({address.ray}): restart it, or use the same cluster in all graphs")
        return
    refuse_silence(address)
    try:
        ray.init(address=address.ray, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    except _REFUSED as error:
        raise ClusterError(
            f"no Ray cluster can be used at {address.ray} ({type(error).__name__}: {_short(error)}): start one with `hywu "
            f"serve` or `ray start --head`, with the same Python and Ray as here (Ray {ray.__version__}); for one with tokens "
            "set RAY_AUTH_MODE=token and put its token into ~/.ray/auth_token") from None
    _connected[:] = [address.ray]


def start_here(cpus: int) -> Address:
    """A cluster of this machine alone, on loopback, that ends with this process; ``cpus``: as many parts without a GPU can run.

    ``address.on_loopback`` comes before the import of this file. Raises: ClusterError if Ray does not start.
    """
    try:
        ray.init(num_cpus=cpus, include_dashboard=False, _node_ip_address="127.0.0.1", namespace=NAMESPACE, log_to_driver=False,
                 logging_level="ERROR")
    except _REFUSED as error:
        raise ClusterError(f"Ray did not start on this machine ({type(error).__name__}: {_short(error)})") from None
    _connected[:] = [ray.get_runtime_context().gcs_address]
    return Address(_connected[0])


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
