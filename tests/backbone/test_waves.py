"""Rows as waves through stages: the same bits as row by row through one stage, both stages busy at once, and a clean stop."""

import time

import pytest
import torch
from comfyui_hywu.hywu_core.backbone.mask import attention_mask
from comfyui_hywu.hywu_core.backbone.rope import positions, table
from comfyui_hywu.hywu_core.backbone.stage import Stage

LENGTH = 20


@pytest.fixture
def backbone(tiny_model):
    """The tiny backbone cut into a stage a layer, with waves; as before afterwards."""
    backbone, one = tiny_model.backbone, tiny_model.backbone.stages
    backbone.stages = tuple(Stage([layer], index) for index, layer in enumerate(backbone.model.layers))
    backbone.waves = True
    yield backbone
    backbone.stages, backbone.waves = one, False


@pytest.fixture
def inputs(tiny_model):
    config = tiny_model.config
    rope = table(positions(LENGTH, [((4, 13), (3, 3))]), config.attention_head_dim, config.rope_theta)
    hidden = torch.randn(3, LENGTH, config.hidden_size, generator=torch.Generator().manual_seed(0))
    return hidden, rope, attention_mask(LENGTH, [(4, 13)])


@torch.no_grad()
def test_waves_give_the_bits_of_single_rows_and_fill_the_same_caches(backbone, inputs):
    hidden, rope, mask = inputs
    caches = backbone.new_cache(3, LENGTH)
    seen = []
    found = backbone.run(hidden, rope, mask, caches, on_layer=seen.append)
    backbone.stages = (Stage(backbone.model.layers, 0),)
    for row in range(3):
        alone = backbone.new_cache(1, LENGTH)
        assert torch.equal(found[row : row + 1], backbone.run(hidden[row : row + 1], rope, mask, alone))
        for layer in range(2):
            for ours, theirs in zip(caches[layer].row(row).layer(0), alone[0].layer(layer), strict=True):
                assert torch.equal(ours, theirs)
    assert sorted(seen) == [0, 0, 0, 1, 1, 1]


@torch.no_grad()
def test_two_stages_are_busy_at_once(backbone, inputs, monkeypatch):
    turns, run = [], Stage.run

    def slow(stage, *given):
        begun = time.monotonic()
        out = run(stage, *given)
        time.sleep(0.2)  # as a device that is busy: the thread waits, others go on
        turns.append((stage.first, begun, time.monotonic()))
        return out

    monkeypatch.setattr(Stage, "run", slow)
    backbone.run(*inputs)
    assert [stage for stage, _, _ in sorted(turns, key=lambda turn: turn[1])].count(1) == 3
    first, second = ([(begun, ended) for stage, begun, ended in sorted(turns) if stage == index] for index in (0, 1))
    for row in range(3):
        assert first[row][1] <= second[row][0]  # a row's stages follow each other
        if row:
            assert first[row][0] < second[row - 1][1]  # its first one runs beside the second one of the row before


@torch.no_grad()
@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_cancel_passes_through_and_the_next_run_is_whole(backbone, inputs, after):
    class Cancelled(Exception):
        pass

    calls = []

    def stop(layer):
        calls.append(layer)
        if len(calls) == after:
            raise Cancelled

    with pytest.raises(Cancelled):
        backbone.run(*inputs, on_layer=stop)
    assert len(calls) == after
    whole = backbone.run(*inputs)
    assert torch.equal(whole, backbone.run(*inputs)) and whole.shape == inputs[0].shape


@torch.no_grad()
def test_an_error_inside_a_stage_comes_out(backbone, inputs, monkeypatch):
    def broken(*given):
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(backbone.model.layers[1], "forward", broken)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        backbone.run(*inputs)
