"""Bytes of parts, lengths and times of the published checkpoint against figures that are known from elsewhere."""

from dataclasses import replace

import pytest
import torch
from comfyui_hywu.hywu_core.config import BackboneConfig
from comfyui_hywu.hywu_core.errors import PlacementError
from comfyui_hywu.hywu_core.handle import build_backbone
from comfyui_hywu.hywu_core.placement import activations, seconds
from comfyui_hywu.hywu_core.placement.devices import parse_devices
from comfyui_hywu.hywu_core.placement.memory import Choice, Places, Task
from comfyui_hywu.hywu_core.placement.request import Request, lengths
from comfyui_hywu.hywu_core.placement.sizes import FORMATS, model_sizes
from comfyui_hywu.hywu_core.placement.slab import compute_layout, stored_layout

from ..tiny import write_backbone


def test_the_published_sizes(sizes, generator):
    values = 2_495_610_880  # spec section 1: qkv, o, shared MLP and 64 experts of a layer
    assert sum(weight.values for weight in sizes.weights) == values
    bare = sizes.layers * (2 * values + sizes.rest) + sizes.parts()
    # 82.99e9 parameters; the router is held in fp32.
    assert bare == pytest.approx(2 * 82.99e9, rel=1e-3)
    assert generator.total == pytest.approx(2 * 8.0966e9, rel=1e-4)
    assert generator.written == sizes.layers * sizes.lora == 2 * 722_993_152
    assert sizes.chosen_values() == pytest.approx(381.9e6, rel=1e-3)


def test_slabs_are_as_large_as_the_ones_that_are_made(sizes, real_config):
    """Against ``slab.py``, which lays the real tensors out."""
    config = replace(real_config, num_hidden_layers=1, moe_topk=(8,), moe_intermediate_size=(3072,), num_shared_expert=(1,))
    layer = build_backbone(config, torch.bfloat16).model.layers[0]
    assert sizes.computed_layer() == compute_layout(layer, torch.bfloat16, 16).nbytes
    for form in FORMATS:
        assert sizes.stored_layer(form) == stored_layout(layer, torch.bfloat16, 16, form).nbytes


def test_odd_sizes_and_dense_layers_are_counted_as_they_are_made(tmp_path):
    folder = write_backbone(tmp_path / "backbone", num_hidden_layers=3, moe_layer_num_skipped=1, num_experts=8)
    config = BackboneConfig.from_folder(folder)
    layers = build_backbone(config, torch.float32).model.layers
    small = model_sizes(config, torch.float32)
    for form in FORMATS:
        assert small.stored_layer(form) == max(stored_layout(layer, torch.float32, 16, form).nbytes for layer in layers)


def test_lengths(real_config):
    one = lengths(real_config, Request())
    # About 7.4 k and 12.6 k tokens of condition with one and two pictures, 4,097 of canvas.
    assert one.condition == pytest.approx(7400, abs=100) and one.canvas == 4097
    assert lengths(real_config, Request(pictures=2)).condition == pytest.approx(12_600, abs=150)
    assert one.whole - one.shared < 5300 and lengths(real_config, Request(rows=1)).shared == 0
    with pytest.raises(PlacementError, match="positions"):
        lengths(real_config, Request(pictures=3, thinking=5000))


@pytest.mark.parametrize("changes", ({"pictures": 4}, {"rows": 3}, {"steps": 0}, {"thinking": -1}))
def test_a_request_out_of_range_is_refused(changes):
    with pytest.raises(PlacementError, match="can be planned"):
        Request(**changes)


def test_seconds_are_those_of_the_roofline(sizes, generator, real_config):
    """By hand, at the peak rates of an H200: 0.323 s a step, 4.39 s for the generator, 6.2 ms a token."""
    request = Request()
    task = Task(sizes, generator, request, lengths(real_config, request), parse_devices("h200"))
    choice = Choice("bf16", Places(), generator="resident", writer=0)
    stage = seconds.stage_seconds(task, choice, 0, 32, 32)
    assert stage.step * seconds.ARITHMETIC == pytest.approx(0.323, rel=0.05)
    assert seconds.write_seconds(task, choice) * seconds.ARITHMETIC == pytest.approx(4.39, rel=0.05)
    token = seconds.token_seconds(task, choice, 0, 32, 32) + seconds.head_seconds(task, choice)
    assert token * seconds.BANDWIDTH == pytest.approx(6.2e-3, rel=0.05)
    # 58.9 and 81.9 TFLOP for 1024 x 1024.
    assert sizes.encoder_flops * 1024**2 == pytest.approx(58.9e12, rel=0.05)
    assert sizes.decoder_flops * 1024**2 == pytest.approx(104.6e12, rel=0.05)


def test_kv_is_what_performance_says(sizes, real_config):
    whole = lengths(real_config, Request()).whole
    assert sizes.layers * activations.kv_layer(sizes, 2, whole) == pytest.approx(3.0e9, rel=0.02)
