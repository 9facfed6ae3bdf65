"""The real thing on loopback: what comes from a cluster is bit for bit what comes without one, for many users at once."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from comfyui_hywu.hywu_core.cluster.client import Client, client_of
from comfyui_hywu.hywu_core.cluster.writer_actor import shards_of
from comfyui_hywu.hywu_core.condition import encode
from comfyui_hywu.hywu_core.edit import edit
from comfyui_hywu.hywu_core.errors import ClusterError, LoRAError, PromptError, RequestError
from comfyui_hywu.hywu_core.generator.handle import write_lora
from comfyui_hywu.hywu_core.handle import ModelHandle
from comfyui_hywu.hywu_core.lora.algebra import blend
from comfyui_hywu.hywu_core.lora.attach import inject
from comfyui_hywu.hywu_core.lora.files import load_lora, save_lora
from comfyui_hywu.hywu_core.lora.routing import recording
from comfyui_hywu.hywu_core.sampling.denoise import sample
from comfyui_hywu.hywu_core.sampling.taylor import TaylorSettings
from comfyui_hywu.hywu_core.think import think
from PIL import ImageChops

STEPS = 4
EDITS = ("make it warmer", "turn it gray", "invert the colours", "make it darker", "blur it")


@pytest.fixture(scope="module")
def pair(client, local):
    """Handles here and there."""
    return SimpleNamespace(here=local[0], writes_here=local[1], there=client.model(), writes_there=client.generator())


@pytest.fixture(scope="module")
def made(pair, photo):
    """A condition and a LoRA from each."""
    conditions = [encode(model, [photo], EDITS[0], seed=3) for model in (pair.here, pair.there)]
    loras = [write_lora(generator, condition) for generator, condition in
             zip((pair.writes_here, pair.writes_there), conditions, strict=True)]
    return SimpleNamespace(condition_here=conditions[0], condition_there=conditions[1], lora_here=loras[0], lora_there=loras[1])


def released(client: Client) -> bool:
    said = client.status()
    return said["running"] == 0 and said["waiting"] == 0 and not any(said["held"]) and all(
        part.get("open", 0) == 0 for part in said["parts"] if part["state"] == "up")


def until(true, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_whole_edit_is_the_same(pair, photo, client):
    ticks: dict[str, list] = {}
    notes = []
    here = edit(pair.here, pair.writes_here, [photo], "make it look old", steps=STEPS, seed=5)
    client.on_note = notes.append
    there = edit(pair.there, pair.writes_there, [photo], "make it look old", steps=STEPS, seed=5,
                 on_stage=lambda name: lambda *tick: ticks.setdefault(name, []).append(tick))
    assert there.thinking == here.thinking and there.condition.ratio_index == here.condition.ratio_index
    assert torch.equal(there.condition.hidden_SD, here.condition.hidden_SD)
    assert there.lora.digest == here.lora.digest and there.lora.provenance == here.lora.provenance
    assert list(there.lora.tensors) == list(here.lora.tensors)
    assert torch.equal(there.latent_bchw, here.latent_bchw)
    assert ImageChops.difference(there.picture, here.picture).getbbox() is None and there.picture.size == here.picture.size
    assert ticks["sample"][-1][:2] == (STEPS, STEPS) and any(latent is not None for _, _, latent in ticks["sample"])
    assert ticks["think"][-1][0] > 0 and ticks["encode"][-1][0] == ticks["encode"][-1][1]
    assert notes == []
    until(lambda: released(client))


def test_two_pictures_and_another_size(pair, photo):
    other = photo.rotate(90, expand=True)
    results = [edit(model, generator, [photo, other], "put the colours of the second picture on the first", thinking="",
                    steps=2, size="1:2", guidance=1.0, seed=1)
               for model, generator in ((pair.here, pair.writes_here), (pair.there, pair.writes_there))]
    assert torch.equal(results[0].latent_bchw, results[1].latent_bchw)


def test_every_strength_and_several_loras(pair, made, photo, tmp_path):
    other = write_lora(pair.writes_here, encode(pair.here, [photo], EDITS[3], seed=3))
    save_lora(other, tmp_path / "x.safetensors")
    loaded = load_lora(tmp_path / "x.safetensors")
    for strengths in ((1.0,), (0.0,), (-1.5,), (0.7, 0.4)):
        here, there = pair.here, pair.there
        for strength, own, remote in zip(strengths, (made.lora_here, other), (made.lora_there, loaded), strict=False):
            here, there = inject(here, own, strength), inject(there, remote, strength)
        assert torch.equal(sample(here, made.condition_here, steps=STEPS, seed=2),
                           sample(there, made.condition_there, steps=STEPS, seed=2)), strengths
    both = [blend([first, second], [0.5, 0.5]) for first, second in ((made.lora_here, other), (made.lora_there, loaded))]
    assert torch.equal(sample(inject(pair.here, both[0]), made.condition_here, steps=STEPS),
                       sample(inject(pair.there, both[1]), made.condition_there, steps=STEPS))


def test_a_lora_of_the_cluster_can_be_saved(made, tmp_path):
    save_lora(made.lora_there, tmp_path / "there.safetensors")
    assert load_lora(tmp_path / "there.safetensors").digest == made.lora_here.digest


def test_sampling_settings_and_taylor(pair, made):
    for options in ({"steps": 3, "shift": 1.0, "guidance": 1.0}, {"steps": 8, "taylor": TaylorSettings(2)}):
        here, there = sample(pair.here, made.condition_here, **options), sample(pair.there, made.condition_there, **options)
        assert torch.equal(here, there), options


def test_routed_tokens_are_counted(pair, made):
    counted = []
    for model, condition, lora in ((pair.here, made.condition_here, made.lora_here),
                                   (pair.there, made.condition_there, made.lora_there)):
        with recording(model.backbone) as routing:
            sample(inject(model, lora), condition, steps=2)
        counted.append(routing.counts())
    assert torch.equal(*counted) and counted[0].sum() > 0


def test_eight_clients_with_loras_of_their_own(address, pair, photo):
    def edits(model, generator, seed: int) -> list:
        """Five edits as far as their latents: a cluster's VAE is the same for all."""
        done = []
        for instruction in EDITS:
            condition = encode(model, [photo], instruction, seed=seed)
            lora = write_lora(generator, condition)
            done.append((sample(inject(model, lora), condition, steps=STEPS, seed=seed), lora))
        return done

    def user(index: int) -> list:
        client = Client(client_of(address).address)
        return edits(client.model(), client.generator(), index)

    with ThreadPoolExecutor(8) as users:
        results = list(users.map(user, range(8)))
    for index, found in enumerate(results):
        solo = edits(pair.here, pair.writes_here, index)
        for number, ((there, lora_there), (here, lora_here)) in enumerate(zip(found, solo, strict=True)):
            assert torch.equal(there, here), (index, number)
            assert lora_there.digest == lora_here.digest
    until(lambda: released(client_of(address)))


def test_a_cancel_frees_at_once(pair, made, client):
    class Cancel(Exception):
        pass

    def at(limit: int):
        def tick(done: int, total: int, latent) -> None:
            if done >= limit:
                raise Cancel
        return tick

    for limit in (0, 2):
        with pytest.raises(Cancel):
            sample(inject(pair.there, made.lora_there), made.condition_there, steps=400, on_tick=at(limit))
        until(lambda: released(client), 5)
    with pytest.raises(Cancel):
        think(pair.there, [], "a red ball on a table", max_new_tokens=2000, on_tick=at(3))
    until(lambda: released(client), 5)


def test_who_waits_sees_his_place(pair, made, client, address):
    stop, notes = threading.Event(), []

    class Cancel(Exception):
        pass

    def tick(done: int, total: int, latent) -> None:
        if stop.is_set():
            raise Cancel

    def occupy(number: int) -> None:
        with pytest.raises(Cancel):
            sample(inject(Client(client.address).model(), made.lora_here), made.condition_here, steps=900, seed=number,
                   on_tick=tick)

    with ThreadPoolExecutor(8) as others:
        futures = [others.submit(occupy, number) for number in range(8)]
        try:
            until(lambda: client.status()["running"] == 8)
            client.on_note = notes.append

            def waiting(done: int, total: int, latent) -> None:
                if notes:
                    raise Cancel

            with pytest.raises(Cancel):
                sample(pair.there, made.condition_there, steps=1, on_tick=waiting)
            assert "place 1 in the queue" in notes[0]
        finally:
            stop.set()
        for future in futures:
            future.result()
    until(lambda: released(client))


def test_a_client_that_has_gone_is_forgotten(pair, made, client, monkeypatch):
    asked = client._asked("submit", request("think", pictures=(), instruction="a red ball", seed=0, mode="think",
                                            max_new_tokens=4000, temperature=1.0, top_k=0, top_p=1.0, system_prompt="None"), [])
    assert "ticket" in asked
    until(lambda: client.status()["requests"])
    until(lambda: not client.status()["requests"] and released(client), 60)


def request(step: str, loras=(), **arguments) -> bytes:
    from comfyui_hywu.hywu_core.cluster.wire import pack

    return pack({"step": step, "user": "test", "arguments": arguments, "loras": list(loras)})


def answered(client: Client, message: bytes, parts=()) -> dict:
    ticket, version = client._asked("submit", message, list(parts))["ticket"], -1
    while True:
        said = client._asked("poll", ticket, version, 1.0)
        version = said["version"]
        if said["answer"] is not None:
            return said["answer"]


def test_errors_are_those_of_the_step(pair, made, photo):
    with pytest.raises(PromptError, match="empty"):
        encode(pair.there, [photo], "  ")
    with pytest.raises(RequestError, match="steps"):
        sample(pair.there, made.condition_there, steps=0)
    with pytest.raises(RequestError, match="seed"):
        think(pair.there, [photo], "warmer", seed=1 << 70)


def made_by_hand(text: str) -> bytes:
    from safetensors.torch import save

    return save({"0": torch.zeros(1)}, metadata={"hywu": text})


def test_an_opening_that_fails_or_is_cancelled_leaves_nothing(client, made):
    """Parts of which one is garbage: the other stages had opened, or were about to."""
    good = [client._call("put", part, timeout_s=30) for part in shards_of(made.lora_here, client.layers)]
    garbage = client._call("put", b"garbage", timeout_s=30)
    sampling = {"steps": 1, "guidance": 1.0, "shift": None, "seed": 0, "size": "auto", "taylor": None}
    header = {"rank": made.lora_here.rank, "alpha": 1.0, "rank_weights": [1.0] * made.lora_here.rank, "strength": 1.0}
    message = request("sample", loras=[header], condition=made.condition_there, **sampling)
    for number in range(6):
        assert "cannot be read" in answered(client, message, [[garbage, *good[1:]]])["error"][1]
        ticket = client._asked("submit", message, [good])["ticket"]
        time.sleep(0.02 * number)
        client._give_up(ticket)
    until(lambda: released(client))


def test_a_lora_of_another_rank_than_it_says_is_refused(client, made):
    header = {"rank": 1, "alpha": 1.0, "rank_weights": [1.0], "strength": 1.0}
    parts = [[client._call("put", part, timeout_s=30) for part in shards_of(made.lora_here, client.layers)]]
    sampling = {"steps": 1, "guidance": 1.0, "shift": None, "seed": 0, "size": "auto", "taylor": None}
    message = request("sample", loras=[header], condition=made.condition_there, **sampling)
    assert "does not fit" in answered(client, message, parts)["error"][1]


def test_hostile_requests_are_refused(client, made):
    with pytest.raises(ClusterError, match="none of ours"):
        client._asked("submit", b"\x80\x04nothing", [])
    deep = made_by_hand('{"a": ' + "[" * 5000 + "]" * 5000 + "}")
    for method, arguments, text in (("submit", (deep, []), "cannot be read"), ("submit", (made_by_hand("5"), []), "mapping"),
                                    ("submit", (None, []), "not understood"), ("poll", ([1], 0, 0.1), "not understood")):
        with pytest.raises(ClusterError, match=text):
            client._asked(method, *arguments)
    sampling = {"steps": 1, "guidance": 1.0, "shift": None, "seed": 0, "size": "auto", "taylor": None}
    good = made.condition_there
    from dataclasses import replace

    wide = replace(good, hidden_SD=torch.zeros(3, 7))
    long = replace(good, thinking=17)
    picture = replace(good, pictures=(replace(good.pictures[0], vae_tokens_LD=torch.zeros(1, 4)),))
    for message, parts, text in (
            (request("__init__"), (), "none of them"),
            (request("sample"), (), "takes condition"),
            (request("sample", condition=good, **sampling | {"steps": "9"}), (), "cannot be"),
            (request("sample", condition=good, **sampling | {"size": ["x"]}), (), "cannot be"),
            (request("sample", condition=wide, **sampling), (), "do not fit"),
            (request("sample", condition=long, **sampling), (), "do not fit"),
            (request("sample", condition=picture, **sampling), (), "do not fit"),
            (request("vae_decode", tensor=torch.zeros(1, 3)), (), "cannot be"),
            (request("vae_decode", tensor=torch.zeros(1, 3, 4, 4)), (), "latents"),
            (request("vae_decode", tensor=torch.zeros(1, 3, 4000, 4000)), (), "million"),
            (request("sample", loras=[{"rank": 10**9}], condition=good, **sampling), [[b"", b"", b""]], "make sense"),
            (request("sample", loras=[{"rank": 1}], condition=good, **sampling), [[b""]], "parts")):
        answer = answered(client, message, parts)
        assert "error" in answer and text in answer["error"][1], (answer, text)
    assert released(client)


def test_a_lora_of_another_shape_is_refused(client, made):
    from safetensors.torch import save

    header = {"rank": 1, "alpha": 1.0, "rank_weights": [1.0], "strength": 1.0}
    parts = [[client._call("put", save({"model.layers.0.x.lora_A": torch.zeros(1, 2)}), timeout_s=30) for _ in range(3)]]
    sampling = {"steps": 1, "guidance": 1.0, "shift": None, "seed": 0, "size": "auto", "taylor": None}
    message = request("sample", loras=[header], condition=made.condition_there, **sampling)
    kind, text = answered(client, message, parts)["error"]
    assert kind == LoRAError.__name__ and "does not fit" in text
    garbage = [[client._call("put", b"no safetensors at all", timeout_s=30) for _ in range(3)]]
    kind, text = answered(client, message, garbage)["error"]
    assert kind == LoRAError.__name__ and "cannot be read" in text
    until(lambda: released(client))


def test_a_handle_of_a_cluster_holds_no_weights(pair):
    assert isinstance(pair.there, ModelHandle)
    assert all(parameter.is_meta for parameter in pair.there.backbone.parameters())


def test_addresses_where_nobody_is(address):
    with pytest.raises(ClusterError, match="no service 'other'"):
        client_of(f"{address}#other").status()
    began = time.monotonic()
    with pytest.raises(ClusterError, match="no Ray cluster can be used"):
        client_of("127.0.0.1:9")
    assert time.monotonic() - began < 100
