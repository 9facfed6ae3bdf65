"""Activations that go from stage to stage by NIXL, from memory to memory: the same numbers, and the same faults as without.

NIXL reads a CPU's memory as it reads a GPU's; what is not tried here is a GPU.
"""

import importlib.util
import signal
import time

import pytest
import torch
from comfyui_hywu.hywu_core.cluster import direct
from comfyui_hywu.hywu_core.cluster.client import client_of
from comfyui_hywu.hywu_core.condition import encode
from comfyui_hywu.hywu_core.errors import ClusterError
from comfyui_hywu.hywu_core.generator.handle import write_lora
from comfyui_hywu.hywu_core.lora.attach import inject
from comfyui_hywu.hywu_core.sampling.denoise import sample
from comfyui_hywu.hywu_core.think import think

from .conftest import serve, stop
from .test_faults import Killer, part, works_again
from .test_service import released, until

STEPS, PATIENCE_S = 4, 10.0


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(address, what `hywu serve` has said)."""
    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("nixl") is None:
        pytest.skip("Ray or NIXL is not installed: activations from memory to memory are not tried")
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
    until(lambda: released(there), 5)


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


def test_what_was_handed_out_is_given_back(there, before):
    """Each pass leaves half a megabyte at a stage if nobody lets go of it."""
    paint(there, before, steps=50)
    held = part(there, "stage 0")["memory"]["ram"]
    paint(there, before, steps=150)
    grown = part(there, "stage 0")["memory"]["ram"] - held
    print(f"150 more steps: {grown / 1e6:.1f} MB more")
    assert grown < 25e6


def test_what_is_asked_for_and_missing_is_an_error(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "nixl" else find(name))
    with pytest.raises(ClusterError, match="pip install nixl"):
        direct.possible("nixl", "cpu")
    assert not direct.possible("auto", "cuda") and not direct.possible("store", "cuda")


def test_auto_is_for_gpus(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    assert direct.possible("auto", "cuda") and not direct.possible("auto", "cpu") and direct.possible("nixl", "cpu")
