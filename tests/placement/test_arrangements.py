"""Every arrangement of a model gives the picture of the plain one: stages, waves, rings, formats, from memory and from disk."""

from types import SimpleNamespace

import pytest
import torch
from comfyui_hywu.hywu_core import handle as handle_module
from comfyui_hywu.hywu_core.backbone.mask import attention_mask
from comfyui_hywu.hywu_core.backbone.rope import positions, table
from comfyui_hywu.hywu_core.checkpoint import load as read_module
from comfyui_hywu.hywu_core.checkpoint import open_shards
from comfyui_hywu.hywu_core.checkpoint.convert import convert
from comfyui_hywu.hywu_core.checkpoint.formats import codec
from comfyui_hywu.hywu_core.config import BackboneConfig
from comfyui_hywu.hywu_core.errors import CheckpointError, RequestError
from comfyui_hywu.hywu_core.handle import InjectedLoRA, build_backbone, load_model
from comfyui_hywu.hywu_core.lora.attach import attached
from comfyui_hywu.hywu_core.placement import build as build_module
from comfyui_hywu.hywu_core.placement.build import Placed
from comfyui_hywu.hywu_core.placement.stored import InMemory
from comfyui_hywu.kernels import few_tokens, reference

from ..backbone.recorder import captures  # noqa: F401
from ..lora.test_attach import random_lora
from ..tiny import write_backbone
from .plans import plan, stage, through_the_ring

LAYERS, LENGTH = 5, 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five layers with eight experts, so that one token leaves most of them alone."""
    return write_backbone(tmp_path_factory.mktemp("placed") / "backbone", num_hidden_layers=LAYERS, num_experts=8)


def opened(folder, *stages, **changes) -> Placed:
    config = BackboneConfig.from_folder(folder)
    return Placed(build_backbone(config, torch.float32), open_shards(folder), plan(config, *stages, **changes))


def load(folder, *stages, **changes):
    """The backbone of ``folder`` by a plan of these stages."""
    return placed_by(folder, *stages, **changes).backbone


@torch.no_grad()
def run(backbone, rows=2):
    """The hidden states of a prompt of two rows, and of three tokens that follow one by one."""
    config = backbone.config
    cos, sin = table(positions(LENGTH + 3, [((4, 13), (3, 3))]), config.attention_head_dim, config.rope_theta)
    hidden = torch.randn(rows, LENGTH + 3, config.hidden_size, generator=torch.Generator().manual_seed(0))
    caches = backbone.new_cache(rows, LENGTH)
    parts = [backbone.run(hidden[:, :LENGTH], (cos[:LENGTH], sin[:LENGTH]), attention_mask(LENGTH, [(4, 13)]), caches)]
    for index in range(LENGTH, LENGTH + 3):
        at = slice(index, index + 1)
        parts.append(backbone.run(hidden[:, at], (cos[at], sin[at]), None, caches, torch.tensor([index])))
    return torch.cat(parts, dim=1)


ARRANGEMENTS = {
    "two stages": (stage(0, 2), stage(2, 3)),
    "three stages": (stage(0, 1), stage(1, 2), stage(3, 2)),
    "all in memory, placed for each turn": (stage(0, 5, range(5)),),
    "some in memory, placed for each turn": (stage(0, 5, (1, 3)),),
    "from disk, ring of two": (stage(0, 5, range(5), "disk"),),
    "some from disk, ring of three": (stage(0, 5, (0, 2, 4), "disk", 3),),
    "two stages, streamed": (stage(0, 2, (0, 1)), stage(2, 3, (3,), "disk")),
    "experts of single tokens on the host": (stage(0, 5, range(5), on_host=True),),
}


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_an_arrangement_changes_no_bit(folder, name):
    assert torch.equal(run(load(folder, *ARRANGEMENTS[name])), run(load(folder)))


@pytest.mark.parametrize("inference", [False, True], ids=["plain", "as ComfyUI runs it"])
@pytest.mark.parametrize("ring", [1, 2, 3])
def test_a_ring_between_memory_and_device_changes_no_bit(folder, ring, inference, monkeypatch):
    """ComfyUI runs nodes in inference mode, which is a setting of its thread and not of the ring's."""
    through_the_ring(monkeypatch)
    plain = load(folder)
    expected, under_lora = run(plain), adapted(plain, 16)
    with torch.inference_mode(inference):
        placed = load(folder, stage(0, LAYERS, range(LAYERS), ring=ring))
    with torch.inference_mode(inference), placed.at_work():
        assert torch.equal(run(placed), expected)
    with torch.inference_mode(inference), placed.at_work():
        assert torch.equal(adapted(placed, 16), under_lora)


@torch.no_grad()
@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_of_the_routed_experts_only_the_chosen_ones_travel_for_a_single_token(folder, form, monkeypatch):
    through_the_ring(monkeypatch)
    placed, moved, numbers = load(folder, stage(0, LAYERS, range(LAYERS)), form=form), [], []
    fill, experts = InMemory.fill, InMemory.experts
    monkeypatch.setattr(InMemory, "fill", lambda self, buffer: moved.append((self, len(buffer))) or fill(self, buffer))
    monkeypatch.setattr(
        InMemory, "experts", lambda self, path, chosen, device: numbers.append(chosen) or experts(self, path, chosen, device))
    config = placed.config
    cos, sin = table(positions(1, []), config.attention_head_dim, config.rope_theta)
    placed.run(torch.randn(1, 1, config.hidden_size), (cos, sin), None, placed.new_cache(1, 1))
    assert len(moved) >= LAYERS and all(nbytes == stored.layout.dense_nbytes < stored.layout.nbytes for stored, nbytes in moved)
    assert [len(chosen) for chosen in numbers] == [config.moe_topk[0]] * LAYERS and config.moe_topk[0] < config.num_experts


@torch.no_grad()
@pytest.mark.parametrize("form", ["bf16", "fp8", "int8", "int4"])
def test_single_tokens_of_packed_layers_on_the_device_are_one_graph(folder, form, captures):  # noqa: F811
    plain = load(folder, form=form)
    plain.stages[0].resident = False
    expected, graphs = run(plain, rows=1), load(folder, form=form)
    for _ in range(2):
        torch.testing.assert_close(run(graphs, rows=1), expected, rtol=1e-5, atol=1e-6)
    assert len(captures) == 2  # one a cache
    streamed = load(folder, stage(0, LAYERS, (1,), "disk"))
    run(streamed, rows=1)
    assert len(captures) == 2


@torch.no_grad()
def test_a_graph_is_forgotten_when_the_memory_that_it_uses_is_given_back(folder, captures):  # noqa: F811
    placed, config = load(folder, form="fp8"), BackboneConfig.from_folder(folder)
    rope, caches = table(positions(1, []), config.attention_head_dim, config.rope_theta), placed.new_cache(1, 4)
    token = torch.randn(1, 1, config.hidden_size, generator=torch.Generator().manual_seed(0))
    for count, rests in ((1, False), (1, True), (2, False), (2, False)):
        placed.run(token, rope, None, caches, torch.tensor([0]))
        assert len(captures) == count
        if rests:
            placed.stages[0].rest()


@torch.no_grad()
def test_fp8_experts_of_a_token_are_read_where_they_lie(folder, monkeypatch):
    expected, seen = run(load(folder, form="fp8"), rows=1), []

    def kernel(x_TD, gate_and_up, down, expert_TK, weight_TK, scales):
        seen.append(len(x_TD))
        assert gate_and_up.dtype == down.dtype == torch.float8_e4m3fn
        return reference.expert_mlp(
            x_TD, gate_and_up.float() * scales[0], down.float() * scales[1], expert_TK, weight_TK)

    monkeypatch.setattr(few_tokens, "chosen", lambda device, dtype: kernel)
    monkeypatch.setattr(few_tokens, "reads_fp8", lambda device, dtype: True)
    torch.testing.assert_close(run(load(folder, form="fp8"), rows=1), expected, rtol=1e-4, atol=1e-5)
    assert seen == [1] * 3 * LAYERS


@pytest.mark.parametrize("form", ["fp8", "bf16"])
def test_waves_and_streams_together_in_inference_mode(folder, form, monkeypatch):
    expected = run(load(folder, form=form))
    through_the_ring(monkeypatch)
    with torch.inference_mode():
        placed = load(folder, stage(0, 2, (0, 1)), stage(2, 3, (2, 3, 4)), form=form, waves=True)
        found = run(placed)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def rounded(folder, form):
    """The plain model with every weight that the format packs put through it."""
    backbone = load(folder)
    for _, module in backbone.adapted_modules():
        for name in module.ROOMS:
            weight = getattr(module, name)
            found = codec(form, tuple(weight.shape))
            found.unpack(found.pack(weight.contiguous()), weight)
    return backbone


PACKED = {
    "resident": (stage(0, LAYERS),),
    "two stages": (stage(0, 2), stage(2, 3)),
    "through the ring": (stage(0, LAYERS, range(LAYERS), ring=3),),
    "from disk": (stage(0, LAYERS, (1, 2, 4), "disk"),),
}


@pytest.mark.parametrize("form", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("name", PACKED)
def test_packed_weights_compute_what_their_unpacked_values_compute(folder, tmp_path, form, name, monkeypatch):
    source = folder
    if name == "from disk":
        source = tmp_path / "converted"
        convert(folder, source, form)
    with monkeypatch.context() as patch:
        if name == "through the ring":
            through_the_ring(patch)
        found = run(load(source, *PACKED[name], form=form))
    assert torch.equal(found, run(rounded(folder, form)))
    assert not torch.equal(found, run(load(folder)))


def test_layers_that_stay_on_disk_are_not_packed_on_every_visit(folder):
    with pytest.raises(RequestError, match="hywu convert"):
        load(folder, stage(0, LAYERS, (1,), "disk"), form="fp8")


def test_layers_need_not_be_of_one_size(tmp_path, monkeypatch):
    """The first two have dense MLPs, the others experts; the ring's buffers hold either."""
    folder = write_backbone(tmp_path / "backbone", num_hidden_layers=LAYERS, moe_layer_num_skipped=2)
    plain = run(load(folder))
    assert torch.equal(run(load(folder, *ARRANGEMENTS["from disk, ring of two"])), plain)
    through_the_ring(monkeypatch)
    assert torch.equal(run(load(folder, stage(0, LAYERS, range(LAYERS)))), plain)


# ---- with a LoRA


def model(backbone):
    """Enough of a handle to attach a LoRA to."""
    return SimpleNamespace(backbone=backbone, fingerprint="f", loras=())


def adapted(backbone, *ranks):
    """The hidden states of a prompt and of later tokens under LoRAs of these ranks."""
    handle = model(backbone)
    handle.loras = tuple(InjectedLoRA(random_lora(handle, seed, rank=rank), 0.7) for seed, rank in enumerate(ranks))
    with attached(handle):
        found = run(backbone)
    assert not any(module.attached() for _, module in backbone.adapted_modules())
    return found


@pytest.mark.parametrize("ranks", [(3,), (16,), (16, 16)], ids=str)
@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_a_lora_lands_wherever_the_layers_are(folder, name, ranks):
    plain, placed = load(folder), load(folder, *ARRANGEMENTS[name])
    expected, without = adapted(plain, *ranks), run(placed)
    assert torch.equal(adapted(placed, *ranks), expected)
    assert not torch.equal(expected, without)
    assert torch.equal(run(placed), without)  # nothing of it stays behind


@pytest.mark.parametrize("form", ["fp8", "int8", "int4"])
def test_a_lora_acts_unmerged_beside_packed_weights(folder, form):
    placed = load(folder, stage(0, 2), stage(2, 3, (3, 4)), form=form)
    assert torch.equal(adapted(placed, 16), adapted(rounded(folder, form), 16))


def test_a_cancel_between_layers_leaves_everything_usable(folder):
    class Cancelled(Exception):
        pass

    def stop(layer):
        if layer == 2:
            raise Cancelled

    placed = load(folder, *ARRANGEMENTS["some from disk, ring of three"])
    before = run(placed)
    handle = model(placed)
    handle.loras = (InjectedLoRA(random_lora(handle, 0), 1.0),)
    config = placed.config
    rope = table(positions(8, []), config.attention_head_dim, config.rope_theta)
    with pytest.raises(Cancelled), attached(handle), torch.no_grad(), placed.at_work():
        placed.run(torch.randn(1, 8, config.hidden_size), rope, attention_mask(8, []), on_layer=stop)
    assert not any(module.attached() for _, module in placed.adapted_modules())
    assert torch.equal(run(placed), before)


# ---- released and loaded again


def placed_by(folder, *stages, **changes):
    placed = opened(folder, *stages, **changes)
    placed.load()
    return placed


SPREAD = (stage(0, 2, (1,)), stage(2, 3, (3,), "disk"))


@pytest.mark.parametrize("stages", [(stage(0, LAYERS),), SPREAD], ids=["whole", "spread"])
@pytest.mark.parametrize("form", ["bf16", "fp8"])
def test_a_released_model_refuses_to_run_and_comes_back_the_same(folder, tmp_path, stages, form):
    if form != "bf16":
        convert(folder, tmp_path / "converted", form)
        folder = tmp_path / "converted"
    placed = placed_by(folder, *stages, form=form)
    before, held = run(placed.backbone), placed.nbytes(torch.device("cpu"))
    placed.release()
    assert not placed.loaded and placed.nbytes(torch.device("cpu")) < held
    assert all(getattr(module, name).is_meta for _, module in placed.backbone.adapted_modules() for name in module.ROOMS)
    with pytest.raises(RequestError, match="unloaded"):
        run(placed.backbone)
    placed.load()
    assert placed.nbytes(torch.device("cpu")) == held
    assert torch.equal(run(placed.backbone), before)
    handle = model(placed.backbone)
    handle.loras = (InjectedLoRA(random_lora(handle, 0, rank=16), 0.7),)
    with attached(handle):
        assert not torch.equal(run(placed.backbone), before)


def test_it_may_come_back_by_another_plan(folder):
    placed = placed_by(folder)
    before = run(placed.backbone)
    placed.release()
    placed.plan = plan(placed.backbone.config, stage(0, 2), stage(2, 3, (2, 3), "disk"))
    placed.load()
    assert torch.equal(run(placed.backbone), before)


class Cancelled(Exception):
    pass


def cancel_at(tick: int):
    ticks = iter(range(tick, -1, -1))

    def stop(done, total, latent):
        if next(ticks) == 0:
            raise Cancelled

    return stop


@pytest.mark.parametrize("stages", [(stage(0, LAYERS),), SPREAD], ids=["whole", "spread"])
@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_a_cancelled_load_goes_on_however_often_it_is_cancelled(folder, tmp_path, stages, form, monkeypatch):
    for module in (read_module, build_module):
        monkeypatch.setattr(module, "TICK_BYTES", 1 << 18)
    monkeypatch.setattr(read_module, "CHUNK_BYTES", 1 << 14)
    monkeypatch.setattr(read_module, "PARALLEL_BYTES", 1)  # a converted folder has several files
    monkeypatch.setattr(read_module.os, "cpu_count", lambda: 4)
    if form != "bf16" and stages is SPREAD:  # what stays on disk must be packed there
        convert(folder, tmp_path / "converted", form)
        folder = tmp_path / "converted"
    read, into = [], read_module._read_into
    monkeypatch.setattr(read_module, "_read_into", lambda handle, chunk, *names: read.append(chunk.nbytes) or into(
        handle, chunk, *names))
    opened(folder, *stages, form=form).load()
    at_once = sum(read)
    read.clear()
    placed, starts, totals = opened(folder, *stages, form=form), [], set()
    while not placed.loaded:
        ticks, stop = [], cancel_at(2 + len(starts))
        try:
            placed.load(lambda *tick, stop=stop, ticks=ticks: ticks.append(tick) or stop(*tick))
        except Cancelled:
            assert placed.begun and not placed.loaded
        starts.append(ticks[0][0])
        totals |= {total for _, total, _ in ticks}
    assert not placed.begun and len(starts) > 3 and starts == sorted(starts)
    assert {ticks[-1][0]} == totals and starts[-1] > ticks[-1][0] / 2
    # Of a tensor that was cut off, the begin is read again: of one a file.
    entries = open_shards(folder).entries.values()
    largest, files = max(entry.nbytes for entry in entries), len({entry.file for entry in entries})
    assert at_once <= sum(read) <= at_once + len(starts) * files * largest
    assert torch.equal(run(placed.backbone), run(load(folder, *stages, form=form)))


@pytest.mark.parametrize("when", ["released", "by another plan"])
def test_a_load_that_was_begun_can_be_given_up(folder, when):
    placed = opened(folder)
    with pytest.raises(Cancelled):
        placed.load(cancel_at(1))
    assert placed.begun and placed.nbytes(torch.device("cpu")) > 0
    if when == "released":
        placed.release()
        assert not placed.begun and placed.nbytes(torch.device("cpu")) == 0
        assert all(parameter.is_meta for parameter in placed.backbone.parameters())
    else:
        placed.plan = plan(placed.backbone.config, *SPREAD)
    placed.load()
    assert torch.equal(run(placed.backbone), run(load(folder)))


def test_a_loaded_one_that_is_loaded_again_is_not_used_half(folder):
    placed = placed_by(folder)
    before = run(placed.backbone)
    with pytest.raises(Cancelled):
        placed.load(cancel_at(1))
    assert not placed.loaded and placed.begun
    with pytest.raises(RequestError, match="unloaded"):
        run(placed.backbone)
    placed.load()
    assert torch.equal(run(placed.backbone), before)


def test_an_error_in_a_load_gives_everything_back(folder, monkeypatch):
    def fails(*_):
        raise CheckpointError("cut off")

    placed = opened(folder)
    with monkeypatch.context() as patch, pytest.raises(CheckpointError):
        patch.setattr(read_module, "_check_finite", fails)
        placed.load()
    assert not placed.begun and not placed.loaded and placed.nbytes(torch.device("cpu")) == 0
    placed.load()
    assert torch.equal(run(placed.backbone), run(load(folder)))


def test_a_load_that_nobody_can_go_on_with_keeps_nothing(folder, monkeypatch):
    """Stages and what streams into them refer to each other: dropped alone they would wait for the garbage collector."""
    made = []
    monkeypatch.setattr(handle_module, "Placed", lambda *arguments: made.append(Placed(*arguments)) or made[0])
    with pytest.raises(Cancelled):
        load_model(folder, on_tick=cancel_at(1))
    assert not made[0].begun and made[0].nbytes(torch.device("cpu")) == 0
