"""One service for all tests of this folder: `hywu serve` as users start it, on loopback, hywu-mini in three stages."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "models" / "hywu-mini"
PATIENCE_S = 20.0
START_S = 300.0


def serve(log: Path, *options: str) -> tuple[subprocess.Popen, str]:
    """`hywu serve` and the address that it prints."""
    with open(log, "w") as out:
        process = subprocess.Popen([str(Path(sys.executable).with_name("hywu")), "serve", *options], stdout=out,
                                   stderr=subprocess.STDOUT, cwd=log.parent, start_new_session=True)
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        found = re.search(r"^serving .* at (\S+)$", log.read_text(), re.MULTILINE)
        if found:
            return process, found[1]
        if process.poll() is not None:
            break
        time.sleep(0.2)
    stop(process)
    raise AssertionError(f"hywu serve did not come up: {log.read_text()}")


def stop(process: subprocess.Popen) -> None:
    """End it as Ctrl-C does; what is left of its session after that is killed."""
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def address(tmp_path_factory) -> str:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: nothing about clusters can be tested")
    process, found = serve(tmp_path_factory.mktemp("serve") / "log", "--stages", "3", "--at-once", "8", "--patience",
                           str(PATIENCE_S))
    yield found
    stop(process)


@pytest.fixture(scope="session")
def client(address: str):
    from comfyui_hywu.hywu_core.cluster.client import client_of

    return client_of(address)


@pytest.fixture(scope="session")
def local():
    """The same checkpoint in this process: (model, generator)."""
    import torch
    from comfyui_hywu.hywu_core.generator.handle import load_generator
    from comfyui_hywu.hywu_core.handle import load_model

    return (load_model(MINI / "backbone", dtype=torch.float32), load_generator(MINI / "generator", dtype=torch.float32))


@pytest.fixture(scope="session")
def photo():
    from PIL import Image

    return Image.open(ROOT / "tests" / "data" / "photo.jpg")
