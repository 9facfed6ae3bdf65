"""The head is lost: this process lives on, says so at once, and goes on with another cluster."""

import os
import signal
import time

import psutil
import pytest
from comfyui_hywu.hywu_core.cluster.client import client_of
from comfyui_hywu.hywu_core.condition import encode
from comfyui_hywu.hywu_core.errors import ClusterError

from .conftest import serve, stop


def test_a_lost_head_ends_no_client(address, tmp_path, photo):
    process, other = serve(tmp_path / "log", "--stages", "1")
    try:
        client = client_of(other)
        model = client.model()
        assert client.status()["running"] == 0
        for child in psutil.Process(process.pid).children(recursive=True):
            os.kill(child.pid, signal.SIGKILL)
        process.kill()
        process.wait(30)
        for _ in range(3):
            began = time.monotonic()
            with pytest.raises(ClusterError, match="run the request again|no Ray cluster can be used|nothing answers"):
                encode(model, [photo], "make it warmer")
            assert time.monotonic() - began < 60
            time.sleep(2)
        with pytest.raises(ClusterError, match="nothing answers there"):
            client_of(other)
    finally:
        stop(process)
    # A process may use several clusters: the one of the other tests is another.
    there = client_of(address)
    assert there.status()["parts"] and encode(there.model(), [photo], "make it warmer").hidden_SD.isfinite().all()
