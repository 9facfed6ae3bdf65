"""Two nodes in network namespaces of their own, as two machines would be: parts on both, and one of them going away.

Needs root and iproute2; elsewhere it is said that nothing of this was tried.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from .conftest import ROOT

BIN = Path(sys.executable).parent
PHOTO = ROOT / "tests" / "data" / "photo.jpg"
ENVIRONMENT = os.environ | {"RAY_AUTH_MODE": "token", "RAY_worker_niceness": "0"}


class Nodes:
    """Namespaces a and b, with addresses that they reach each other at."""

    def __init__(self):
        mark = f"{os.getpid() % 10_000}"
        self.names = {name: f"hywu{mark}{name}" for name in "ab"}
        self.at = {"a": "10.77.0.1", "b": "10.77.0.2"}
        self.bridge, self.mark = f"hywu{mark}", mark

    def make(self) -> None:
        self._ip(f"link add {self.bridge} type bridge")
        self._ip(f"link set {self.bridge} up")
        for name, space in self.names.items():
            inner, outer = f"v{self.mark}{name}", f"p{self.mark}{name}"
            self._ip(f"netns add {space}")
            self._ip(f"link add {inner} type veth peer name {outer}")
            self._ip(f"link set {inner} netns {space}")
            self._ip(f"link set {outer} master {self.bridge}")
            self._ip(f"link set {outer} up")
            self._ip(f"-n {space} addr add {self.at[name]}/24 dev {inner}")
            self._ip(f"-n {space} link set {inner} up")
            self._ip(f"-n {space} link set lo up")

    def run(self, name: str, *command: str, seconds: float = 240) -> subprocess.CompletedProcess:
        return subprocess.run(["ip", "netns", "exec", self.names[name], str(BIN / command[0]), *command[1:]],
                              capture_output=True, text=True, timeout=seconds, env=ENVIRONMENT)

    def kill(self, name: str) -> None:
        pids = subprocess.run(["ip", "netns", "pids", self.names[name]], capture_output=True, text=True).stdout.split()
        subprocess.run(["kill", "-9", *pids], capture_output=True) if pids else None

    def end(self) -> None:
        for name, space in self.names.items():
            self.kill(name)
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True)

    def _ip(self, line: str) -> None:
        subprocess.run(["ip", *line.split()], check=True, capture_output=True)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2: two nodes are not tried")
    found = Nodes()
    try:
        try:
            found.make()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here ({error.stderr.decode().strip()}): two nodes are not tried")
        temp = tmp_path_factory.mktemp("r")
        head = found.run("a", "ray", "start", "--head", "--node-ip-address=10.77.0.1", "--port=6399", "--num-cpus=2",
                         "--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={temp}")
        assert head.returncode == 0, head.stdout + head.stderr
        join(found)
        yield found
    finally:
        found.end()


def join(nodes: Nodes) -> None:
    joined = nodes.run("b", "ray", "start", "--address=10.77.0.1:6399", "--node-ip-address=10.77.0.2", "--num-cpus=2",
                       "--disable-usage-stats")
    assert joined.returncode == 0, joined.stdout + joined.stderr


def edited(nodes: Nodes, out: Path, *options: str) -> subprocess.CompletedProcess:
    return nodes.run("a", "hywu", "edit", "--cluster", "10.77.0.1:6399", str(PHOTO), "make it warmer", "-o", str(out), *options)


def test_parts_on_two_nodes_and_one_node_gone(nodes, tmp_path):
    started = nodes.run("a", "hywu", "serve", "--address", "10.77.0.1:6399", "--stages", "2", "--detach")
    assert started.returncode == 0, started.stderr
    where = re.findall(r"(stage \d|desk|generator|tower).*on node (\S+),", started.stderr)
    assert {node for name, node in where if name.startswith("stage")} == {"10.77.0.1", "10.77.0.2"}, started.stderr
    done = edited(nodes, tmp_path / "cluster.png")
    assert done.returncode == 0, done.stderr
    local = subprocess.run([str(BIN / "hywu"), "edit", str(PHOTO), "make it warmer", "-o", str(tmp_path / "local.png")],
                           capture_output=True, text=True)
    assert local.returncode == 0, local.stderr
    here, there = (Image.open(tmp_path / f"{name}.png").convert("RGB") for name in ("local", "cluster"))
    assert ImageChops.difference(here, there).getbbox() is None

    nodes.kill("b")
    failed = edited(nodes, tmp_path / "none.png")
    if failed.returncode:  # or Ray had moved its parts already
        assert "10.77.0.2" in failed.stderr or "stage 1" in failed.stderr, failed.stderr
        assert "Traceback" not in failed.stderr
    join(nodes)
    deadline = time.monotonic() + 240
    while (again := edited(nodes, tmp_path / "again.png")).returncode:
        assert "Traceback" not in again.stderr and time.monotonic() < deadline, again.stderr
    assert ImageChops.difference(here, Image.open(tmp_path / "again.png").convert("RGB")).getbbox() is None

    status = nodes.run("a", "hywu", "status", "--address", "10.77.0.1:6399")
    assert status.stdout.count(" up ") == 5 and "0 at work, 0 waiting" in status.stdout
    second = nodes.run("a", "hywu", "serve", "--address", "10.77.0.1:6399", "--detach")
    assert second.returncode == 1 and "is up on this cluster" in second.stderr
    assert "taken down" in nodes.run("a", "hywu", "serve", "--address", "10.77.0.1:6399", "--stop").stdout
    gone = nodes.run("a", "hywu", "status", "--address", "10.77.0.1:6399")
    assert gone.returncode == 1 and "has no service 'hywu'" in gone.stderr
