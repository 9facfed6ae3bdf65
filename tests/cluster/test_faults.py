"""What dies, hangs or differs: the requests under way there fail with an error that names it, and the next one works."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from comfyui_hywu.hywu_core.cluster.client import client_of
from comfyui_hywu.hywu_core.condition import encode
from comfyui_hywu.hywu_core.errors import CheckpointError, ClusterError
from comfyui_hywu.hywu_core.generator.handle import write_lora
from comfyui_hywu.hywu_core.lora.attach import inject
from comfyui_hywu.hywu_core.sampling.denoise import sample
from comfyui_hywu.hywu_core.think import think

from .conftest import MINI, PATIENCE_S

RECOVERY_S = 120.0


class Killer:
    """A tick that sends a signal to a part, once, when so much is done."""

    def __init__(self, client, name: str, after: int, number: int = signal.SIGKILL):
        self.pid, self.after, self.number, self.sent = pid_of(client, name), after, number, False

    def __call__(self, done: int, total: int, latent) -> None:
        if not self.sent and done >= self.after:
            self.sent = True
            os.kill(self.pid, self.number)


def part(client, name: str) -> dict:
    return next(part for part in client.status()["parts"] if part["name"].startswith(name))


def pid_of(client, name: str) -> int:
    return part(client, name)["pid"]


def works_again(address: str, call) -> object:
    """The first result of ``call(client)`` that is no error of the cluster; the desk itself may be away for a while."""
    deadline = time.monotonic() + RECOVERY_S
    while True:
        try:
            return call(client_of(address))
        except ClusterError:
            assert time.monotonic() < deadline
            time.sleep(1)


@pytest.fixture(scope="module")
def before(client, photo):
    """What a request gives before anything has died."""
    model = client.model()
    condition = encode(model, [photo], "make it warmer", seed=3)
    lora = write_lora(client.generator(), condition)
    painted = sample(inject(model, lora), condition, steps=4, seed=1)
    return SimpleNamespace(condition=condition, lora=lora, painted=painted, digest=lora.digest)


def paint(client, before, tick=lambda *_: None, steps: int = 4) -> torch.Tensor:
    return sample(inject(client.model(), before.lora), before.condition, steps=steps, seed=1, on_tick=tick)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_stage_that_dies_while_it_paints(address, client, before, stage):
    with pytest.raises(ClusterError, match=rf"stage {stage} \(layers .*process \d+\).*died"):
        paint(client, before, Killer(client, f"stage {stage}", 3), steps=500)
    assert torch.equal(works_again(address, lambda client: paint(client, before)), before.painted)
    assert client.status()["held"] == [0, 0, 0]


def test_a_stage_that_dies_while_it_thinks(address, client):
    def thinking(client, tick=lambda *_: None, tokens: int = 12) -> str:
        return think(client.model(), [], "a red ball on a table", seed=1, max_new_tokens=tokens, temperature=1.5, on_tick=tick)

    text = thinking(client)
    with pytest.raises(ClusterError, match="stage 1"):
        for _ in range(20):  # a short thought may end before the signal comes
            thinking(client, Killer(client, "stage 1", 2), 2000)
    assert works_again(address, thinking) == text


def test_the_tower_dies(address, client, before, photo):
    os.kill(pid_of(client, "the VAE"), signal.SIGKILL)
    found = works_again(address, lambda client: encode(client.model(), [photo], "make it warmer", seed=3))
    assert torch.equal(found.hidden_SD, before.condition.hidden_SD)


def test_the_generator_dies_and_what_it_wrote_lives_on(address, client, before):
    os.kill(pid_of(client, "the weight generator"), signal.SIGKILL)
    assert torch.equal(works_again(address, lambda client: paint(client, before)), before.painted)
    lora = works_again(address, lambda client: write_lora(client.generator(), before.condition))
    assert lora.digest == before.digest


def test_the_desk_dies_and_loras_that_it_kept_are_written_again(address, client, before):
    lora = write_lora(client.generator(), before.condition)  # nobody has looked at it: it lies on the cluster only
    with pytest.raises(ClusterError, match="the desk of the cluster"):
        paint(client, before, Killer(client, "the desk", 3), steps=500)
    # A new request waits for it.
    again = sample(inject(client.model(), lora), before.condition, steps=4, seed=1)
    assert torch.equal(again, before.painted)
    assert client_of(address).status()["held"] == [0, 0, 0]
    # Nobody has closed what the old desk had open; the new one did.
    deadline = time.monotonic() + 30
    while any(part.get("open") for part in client_of(address).status()["parts"]):
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_a_part_that_hangs_is_started_again(address, client, before):
    killer = Killer(client, "stage 1", 3, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(ClusterError, match=r"stage 1 .*has not answered for 20 s.*started again"):
        paint(client, before, killer, steps=500)
    assert time.monotonic() - began < PATIENCE_S + 30
    assert torch.equal(works_again(address, lambda client: paint(client, before)), before.painted)


def test_only_requests_there_fail(address, client, before):
    """One paints while the generator dies: nothing happens to it."""
    painted = paint(client, before, Killer(client, "the weight generator", 2))
    assert torch.equal(painted, before.painted)
    works_again(address, lambda client: write_lora(client.generator(), before.condition))


class Said:
    """An actor that says what it is told to."""

    def __init__(self, name: str, code: str, weights: str):
        self.name, self.said = name, {"code": code, "weights": weights, "node": "10.0.0.7", "pid": 7}

    def __str__(self) -> str:
        return f"{self.name} (node 10.0.0.7, process 7)"


def test_other_code_or_weights_are_named_with_their_node():
    from comfyui_hywu.hywu_core.cluster.desk import Desk
    from comfyui_hywu.hywu_core.cluster.part import Identity, code_digest

    desk = object.__new__(Desk)
    desk._identity, desk._writer = Identity("the desk", "10.0.0.1", 1, code_digest(), "aaaa"), Said("writer", "", "")
    desk._known = {}
    right = Said("stage 1", code_digest(), "aaaa")
    desk._agree(right, right.said)
    others = ((Said("stage 1", "0" * 12, "aaaa"), "runs other code"), (Said("stage 1", code_digest(), "bbbb"), "bbbb"))
    for other, text in others:
        with pytest.raises(ClusterError, match=rf"stage 1 \(node 10\.0\.0\.7.*{text}.*10\.0\.0\.1.*"):
            desk._agree(other, other.said)


def test_a_checkpoint_that_is_damaged_is_said_at_the_start(address, tmp_path):
    """Through Ray, as text; the parts that had come up are taken down again."""
    import subprocess
    import sys
    from pathlib import Path

    broken = tmp_path / "backbone"
    broken.mkdir()
    for file in (MINI / "backbone").iterdir():
        data = file.read_bytes()
        (broken / file.name).write_bytes(data[:-100] if file.suffix == ".safetensors" else data)
    done = subprocess.run([str(Path(sys.executable).with_name("hywu")), "serve", "--address", f"{address}#broken", "--model",
                           str(broken), "--detach"], capture_output=True, text=True, timeout=200,
                          env=os.environ | {"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"})
    assert done.returncode == 1 and CheckpointError.__name__ in done.stderr and "cut off" in done.stderr, done.stderr
    with pytest.raises(ClusterError, match="no service 'broken'"):
        client_of(f"{address}#broken")
