"""Activations that go from stage to stage by NIXL, from memory to memory: the same numbers, and the same faults as without.

NIXL reads a CPU's memory as it reads a GPU's; what is not tried here is a GPU.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from comfyui_hywu.hywu_core.cluster import direct
from comfyui_hywu.hywu_core.cluster.client import Client, client_of
from comfyui_hywu.hywu_core.condition import encode
from comfyui_hywu.hywu_core.errors import ClusterError
from comfyui_hywu.hywu_core.generator.handle import write_lora
from comfyui_hywu.hywu_core.lora.attach import inject
from comfyui_hywu.hywu_core.sampling.denoise import sample
from comfyui_hywu.hywu_core.think import think

from .conftest import PATIENCE_S, serve, stop
from .test_faults import Killer, part, works_again
from .test_service import released, until

STEPS = 4


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(address, what `hywu serve` has said)."""
    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("nixl") is None:
        pytest.skip("Ray or NIXL is not installed: activations from memory to memory are not tried")
    tried = subprocess.run([sys.executable, "-c", "from nixl._api import nixl_agent; nixl_agent('tried')"], capture_output=True,
                           text=True)
    if tried.returncode:
        pytest.skip(f"NIXL does not work here ({tried.stderr.strip().splitlines()[-1]}): it is not tried")
    log = tmp_path_factory.mktemp("serve") / "log"
    process, found = serve(log, "--stages", "3", "--transport", "nixl", "--patience", str(PATIENCE_S))
    yield found, log.read_text()
    stop(process)


@pytest.fixture(scope="module")
def there(served):
    return client_of(served[0])


@pytest.fixture(scope="module")
def before(there, photo):
    """(condition, LoRA, latent) of a request before anything has died."""
    condition = encode(there.model(), [photo], "make it warmer", seed=3)
    lora = write_lora(there.generator(), condition)
    return condition, lora, sample(inject(there.model(), lora), condition, steps=STEPS, seed=1)


def paint(client, before, **options) -> torch.Tensor:
    return sample(inject(client.model(), before[1]), before[0], **{"steps": STEPS, "seed": 1} | options)


def fetched(client) -> list[int]:
    return [part["fetched"] for part in client.status()["parts"] if part["name"].startswith("stage")]


def test_it_is_said(served):
    assert "activations go from stage to stage directly, by NIXL" in served[1]


def test_the_numbers_are_those_without_a_cluster(there, before, local, photo):
    model, generator = local
    condition = encode(model, [photo], "make it warmer", seed=3)
    lora = write_lora(generator, condition)
    assert torch.equal(before[0].hidden_SD, condition.hidden_SD) and before[1].digest == lora.digest
    assert torch.equal(before[2], sample(inject(model, lora), condition, steps=STEPS, seed=1))
    text = think(there.model(), [photo], "make it warmer", temperature=0.0)
    assert text == think(model, [photo], "make it warmer", temperature=0.0)


def test_two_stages_fetch_what_the_one_before_them_has_made(there, before):
    seen = fetched(there)
    paint(there, before, steps=10)
    first, *others = [now - then for now, then in zip(fetched(there), seen, strict=True)]
    # The first pass is two: what both rows begin with is computed once.
    assert first == 0 and all(10 <= count <= 12 for count in others), others


def test_single_tokens_go_through_the_store(there):
    seen = fetched(there)
    think(there.model(), [], "a red ball on a table", seed=1, max_new_tokens=12, temperature=1.5)
    assert [now - then for now, then in zip(fetched(there), seen, strict=True)] == [0, 1, 1]  # the prompt


def test_a_cancel_frees_at_once(there, before):
    class Cancel(Exception):
        pass

    def tick(done, total, latent):
        if done >= 2:
            raise Cancel

    with pytest.raises(Cancel):
        paint(there, before, steps=400, on_tick=tick)
    until(lambda: released(there))


@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_that_dies_is_named_and_comes_back(served, there, before, stage):
    with pytest.raises(ClusterError, match=rf"stage {stage} \(layers .*process \d+\).*died"):
        paint(there, before, steps=500, on_tick=Killer(there, f"stage {stage}", 3))
    assert torch.equal(works_again(served[0], lambda client: paint(client, before)), before[2])
    assert there.status()["held"] == [0, 0, 0]


def test_a_part_that_hangs_is_started_again(served, there, before):
    began = time.monotonic()
    with pytest.raises(ClusterError, match=r"stage 0 .*has not (answered|given)"):
        paint(there, before, steps=500, on_tick=Killer(there, "stage 0", 3, signal.SIGSTOP))
    assert time.monotonic() - began < PATIENCE_S + 30
    assert torch.equal(works_again(served[0], lambda client: paint(client, before)), before[2])


def test_many_users_at_once(served, there, before):
    """A stage reads for one of them at a time: with several readers Ray loses its connections."""
    def user(seed: int) -> list[torch.Tensor]:
        client = Client(client_of(served[0]).address)
        return [paint(client, before, seed=seed + 10 * turn) for turn in range(3)]

    with ThreadPoolExecutor(8) as users:
        found = list(users.map(user, range(8)))
    for seed in range(0, 8, 3):
        alone = [paint(there, before, seed=seed + 10 * turn) for turn in range(3)]
        assert all(torch.equal(one, other) for one, other in zip(found[seed], alone, strict=True))
    until(lambda: released(there))


def test_nothing_is_remembered_of_what_has_come(there, before):
    paint(there, before, steps=20)
    until(lambda: all(part(there, f"stage {number}")["remembered"] <= 2 for number in range(3)))


def test_what_is_asked_for_and_missing_is_an_error(monkeypatch):
    assert not direct.begin("store")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ClusterError, match="needs a newer Ray"):
        direct.check_ray("nixl")
    direct.check_ray("store")


def test_without_nixl_the_stage_that_lacks_it_is_named(address, tmp_path):
    """A node whose Python has no NIXL, or one that does not work."""
    (tmp_path / "nixl").mkdir()
    (tmp_path / "nixl" / "__init__.py").write_text("raise ImportError('no NIXL today')")
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    log = tmp_path / "log"
    with open(log, "w") as out:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("hywu")), "serve", "--stages", "2", "--transport", "nixl"], stdout=out,
            stderr=subprocess.STDOUT, env=environment | {"PYTHONPATH": str(tmp_path)}, start_new_session=True)
    try:
        assert process.wait(200) == 1
    finally:
        stop(process)
    said = log.read_text()
    assert "stage 0" in said and "NIXL cannot be used here (ImportError: no NIXL today): pip install nixl" in said, said
