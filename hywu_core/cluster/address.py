"""The addresses of clusters that people write, and what Ray has to be told before it is imported.

Ray reads its environment once, while it is imported. A cluster on loopback needs settings there: that nothing listens anywhere
else, and that the token is shown that Ray makes for every cluster it starts. Everything else is the user's to set.
"""

import importlib.util
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from ..errors import ClusterError

NAMESPACE = "hywu"
DEFAULT_SERVICE = "hywu"
KNOCK_S = 5.0
LOCAL = "local"  # what stands for no cluster
_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # its name is history: "0" keeps Ray on 127.0.0.1 on every system
             "RAY_AUTH_MODE": "token",
             "RAY_worker_niceness": "0"}  # Ray's 15 lets every other program on the machine go first


@dataclass(frozen=True)
class Address:
    """``HOST:PORT`` of a cluster that this machine is a node of, ``ray://HOST:PORT`` for one that it is not, ``auto`` for the
    one that runs here; with ``#NAME`` for another service than "hywu"."""

    ray: str
    service: str = DEFAULT_SERVICE

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Raises ClusterError for a line that is none, or without Ray."""
        where, mark, service = text.strip().partition("#")
        host, colon, port = where.removeprefix("ray://").rpartition(":")
        if where != "auto" and not (colon and host and port.isdigit() and 0 < int(port) < 65536):
            raise ClusterError(f"the cluster address {text[:80]!r} is none: write HOST:PORT, ray://HOST:PORT or auto, with "
                               f"#NAME behind it for a service of another name; {LOCAL!r} means this machine without a cluster")
        if mark and (not service or not service.replace("-", "").replace("_", "").isalnum()):
            raise ClusterError(f"the service name {service[:40]!r} may have letters, digits, - and _ only")
        require_ray()
        return cls(where, service or DEFAULT_SERVICE)

    def actor(self, kind: str, number: int = 0) -> str:
        """The name of a part's actor in Ray's namespace."""
        return f"hywu/{self.service}/{kind}" + (f"/{number}" if kind == "stage" else "")


def require_ray() -> None:
    """Raises ClusterError if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ClusterError("a cluster needs Ray, which is not installed: pip install 'ray[client]>=2.50' psutil into the "
                           "Python that runs this (the same version on all machines)")


def on_loopback() -> None:
    """Set what Ray needs for a cluster of this machine alone, where the user has set nothing else. Before Ray is imported."""
    for name, value in _LOOPBACK.items():
        os.environ.setdefault(name, value)


def environment(address: Address) -> dict[str, str]:
    """What a process needs that is to join the cluster there and nothing else."""
    host = address.ray.removeprefix("ray://").rpartition(":")[0]
    if host != "localhost" and not host.startswith("127."):
        return {}
    token = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ or (Path.home() / ".ray/auth_token").is_file()
    return {name: value for name, value in _LOOPBACK.items()
            if name not in os.environ and (token or name != "RAY_AUTH_MODE")}


def refuse_silence(address: Address) -> None:
    """Raises ClusterError if nothing listens there: Ray would look for it for a minute and a half."""
    host, _, port = address.ray.removeprefix("ray://").rpartition(":")
    if not host:
        return  # "auto": Ray knows where, or that there is none
    try:
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_S).close()
    except OSError as error:
        raise ClusterError(f"no Ray cluster can be used at {address.ray}: nothing answers there ({error}); start one with "
                           "`hywu serve` or `ray start --head`, or ask whoever runs it for the address") from None
