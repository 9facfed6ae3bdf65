"""The first implementations that benchmarks compare with do the same mathematics as ours, and counters count; toy sizes."""

import pytest
import torch
from comfyui_hywu.benchmarks import generator, step
from comfyui_hywu.hywu_core.backbone.layer import DecoderLayer
from comfyui_hywu.hywu_core.generator import blocks
from comfyui_hywu.hywu_core.training.recipe import GeneratorSizes, Sizes

TOY = Sizes(hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, experts=8, top_k=2, expert_width=16, shared=1)
RATES = step.Rates(peak=1e11, bandwidth=1e10)
CPU = torch.device("cpu")


@pytest.fixture
def backbone(tiny_model):
    return step.random_backbone(step.sized(tiny_model.config, TOY), CPU, torch.float32)


def test_the_loop_gives_what_ours_gives(backbone):
    figures = step.layers(backbone, RATES, prompt=24, side=3, rounds=1)
    assert [name.split(",")[0] for name in figures] == ["prefill", "denoise", "decode"]
    for of in figures.values():
        assert of["relative_difference"] < 1e-5
        ours, plain, loop = (of["arms"][name]["kernels_a_layer"] for name in step.ARMS)
        assert plain < ours < loop
        assert {arm["syncs"] for arm in of["arms"].values()} == {step.NOT_MEASURED}
    assert list(step.table_of_layers(figures))


def test_thinking_against_a_cache_that_is_copied_gives_the_same_scores(backbone):
    of = step.thinking(backbone, RATES, prompt=12, tokens=5, rounds=1)
    assert of["relative_difference"] < 1e-5
    assert all(arm["tokens_a_second"] > 0 for arm in of["arms"].values())


def test_whole_edits_end_in_the_same_latent(tiny_model, tiny_generator, photo):
    before = DecoderLayer.forward
    of = step.whole_edit(tiny_model, tiny_generator, photo, rounds=1)
    assert of["relative_difference"] < 1e-4
    assert set(of["seconds"]["ours"]) == set(of["seconds"]["loop"]) == {"think", "encode", "generate", "sample", "decode"}
    assert of["total_loop_passes_repeated"] > of["total"]["loop"]
    assert DecoderLayer.forward is before


def test_the_floor_counts_what_is_read(backbone):
    expert = 3 * TOY.hidden * TOY.expert_width
    dense = TOY.hidden * (2 * 32 + 2 * 16 + TOY.experts) + expert
    seconds, bound = step.Rates(peak=1e30, bandwidth=1.0).floor(backbone, tokens=1, pairs=0, keys=10)
    assert bound == "bandwidth" and seconds == 4 * TOY.layers * (dense + TOY.top_k * expert + 10 * 2 * 16)
    seconds, bound = step.Rates(peak=1.0, bandwidth=1e30).floor(backbone, tokens=3, pairs=9, keys=10)
    assert bound == "peak" and seconds == TOY.layers * (2 * 3 * (dense + TOY.top_k * expert) + 4 * 9 * 32)


@torch.no_grad()
def test_the_generator_in_slices_takes_a_quarter_of_a_first_implementations_memory(monkeypatch):
    sizes = Sizes(hidden=32, layers=32, heads=4, kv_heads=2, head_dim=8, experts=8, top_k=2, expert_width=24, shared=1)
    model = generator.build(sizes, GeneratorSizes(width=128, head_dim=32, blocks=1, token_dim=32, rank=16), CPU, torch.float32)
    tokens = sizes.layers * model.layout.num_tokens * 16 // 4
    monkeypatch.setattr(blocks, "TOKENS_AT_ONCE", tokens // 8)
    condition = torch.randn(1, 10, 32)
    with generator.LiveBytes() as ours:
        written = model(condition)
    with generator.LiveBytes() as theirs:
        wanted = generator.straightforward(model, condition)
    assert float((written - wanted).abs().max() / wanted.abs().max()) < 1e-5
    assert ours.peak < 0.27 * theirs.peak  # 0.245 at the benchmark's sizes, where the tables of positions weigh less


def test_live_bytes_are_those_of_tensors_alive_at_once():
    weight = torch.ones(1000)
    with generator.LiveBytes() as live:
        first = weight + 1
        second = first.view(10, 100) * 2
        assert live.now == 8000
        del first
        assert live.now == 4000
        second += 1
        assert live.now == 4000
        del second
    assert (live.now, live.peak) == (0, 8000)
