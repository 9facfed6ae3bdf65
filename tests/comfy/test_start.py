"""The server's process ends with its launcher, and ends cleanly when it is told to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = "import signal, start; start.end_with_parent(); print(1, flush=True); {}"


@pytest.fixture
def process():
    """Starts a Python that waits for its launcher as the server does, then runs a line."""
    started = []

    def begin(line: str) -> subprocess.Popen:
        child = subprocess.Popen(
            [sys.executable, "-c", CODE.format(line)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)})
        started.append(child)
        assert child.stdout.readline() == b"1\n"
        return child

    yield begin
    for child in started:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout, child.stderr):
            pipe.close()


def test_the_server_ends_when_its_launcher_is_gone(process):
    child = process("signal.pause()")
    child.stdin.close()
    assert child.wait(20) == 1


def test_an_ordinary_end_is_clean(process):
    """A thread waiting in Python's own stdin made the interpreter abort here."""
    child = process("import time; time.sleep(0.3)")
    assert child.wait(20) == 0
    assert child.stderr.read() == b""
