"""The backbone as stages in a row: how the layers are cut changes no bit, and a cache equals a full pass."""

import pytest
import torch
from comfyui_hywu.hywu_core.backbone.mask import attention_mask
from comfyui_hywu.hywu_core.backbone.rope import positions, table
from comfyui_hywu.hywu_core.backbone.stage import Stage

LENGTH = 20


@pytest.fixture
def inputs(tiny_model):
    config = tiny_model.config
    rope = table(positions(LENGTH, [((4, 13), (3, 3))]), config.attention_head_dim, config.rope_theta)
    hidden = torch.randn(2, LENGTH, config.hidden_size, generator=torch.Generator().manual_seed(0))
    return hidden, rope, attention_mask(LENGTH, [(4, 13)])


@torch.no_grad()
def test_two_stages_equal_one_bit_for_bit(tiny_model, inputs):
    backbone = tiny_model.backbone
    whole, seen = backbone.run(*inputs, backbone.new_cache(2, LENGTH)), []
    one = backbone.stages
    backbone.stages = tuple(Stage([layer], index) for index, layer in enumerate(backbone.model.layers))
    try:
        caches = backbone.new_cache(2, LENGTH)
        split = backbone.run(*inputs, caches, on_layer=seen.append)
        assert len(caches) == len(backbone.model.layers) == 2
    finally:
        backbone.stages = one
    assert torch.equal(whole, split)
    assert seen == [0, 1]


@torch.no_grad()
def test_later_rows_against_the_cache_equal_the_full_pass(tiny_model, inputs):
    """Recomputing the last ten tokens with new inputs is what a full pass over the new inputs gives for them."""
    backbone, (hidden, (cos, sin), mask) = tiny_model.backbone, inputs
    caches = backbone.new_cache(2, LENGTH)
    backbone.run(hidden, (cos, sin), mask, caches)
    changed = hidden.clone()
    changed[:, 4:13] = changed[:, 4:13].flip(1) * 1.3
    part = torch.arange(4, 13)
    later = backbone.run(changed[:, part], (cos[part], sin[part]), mask[part], caches, part)
    full = backbone.run(changed, (cos, sin), mask)
    torch.testing.assert_close(later, full[:, part], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_two_rows_share_can_be_computed_once(tiny_model, inputs):
    backbone, (hidden, (cos, sin), mask) = tiny_model.backbone, inputs
    hidden = torch.cat((hidden[:1, :13].expand(2, -1, -1), hidden[:, 13:]), dim=1)
    full = backbone.run(hidden, (cos, sin), mask)
    caches = backbone.new_cache(2, LENGTH)
    first = backbone.run(hidden[:1, :13], (cos[:13], sin[:13]), mask[:13, :13], caches)
    rest = backbone.run(hidden[:, 13:], (cos[13:], sin[13:]), mask[13:], caches, torch.arange(13, LENGTH))
    torch.testing.assert_close(first.expand(2, -1, -1), full[:, :13], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rest, full[:, 13:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_one_token_at_a_time_equals_the_full_pass_and_grows_the_cache(tiny_model):
    backbone, config = tiny_model.backbone, tiny_model.config
    hidden = torch.randn(1, LENGTH, config.hidden_size, generator=torch.Generator().manual_seed(1))
    cos, sin = table(positions(LENGTH, []), config.attention_head_dim, config.rope_theta)
    full = backbone.run(hidden, (cos, sin), attention_mask(LENGTH, []))
    caches = backbone.new_cache(1, 3)
    parts = [backbone.run(hidden[:, :3], (cos[:3], sin[:3]), attention_mask(3, []), caches)]
    for index in range(3, LENGTH):
        at = slice(index, index + 1)
        parts.append(backbone.run(hidden[:, at], (cos[at], sin[at]), None, caches, torch.tensor([index])))
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=1e-5, atol=1e-5)


def test_an_error_in_the_callback_passes_through(tiny_model, inputs):
    class Cancelled(Exception):
        pass

    def stop(layer):
        raise Cancelled

    with pytest.raises(Cancelled), torch.no_grad():
        tiny_model.backbone.run(*inputs, on_layer=stop)
