"""The layer's benchmark runs, and what it counts stays below what was reached once: launches are no matter of speed here."""

import sys

import pytest
import torch
from comfyui_hywu.benchmarks import layer_ops
from comfyui_hywu.hywu_core.backbone.cache import KVCache
from comfyui_hywu.hywu_core.backbone.mask import CanvasSight, attention_mask
from comfyui_hywu.hywu_core.backbone.rope import positions, table
from comfyui_hywu.hywu_core.backbone.stage import Stage

LAYERS, MOST_KERNELS = 4, 60  # of a layer with a LoRA, cache and mask


@torch.no_grad()
@pytest.mark.parametrize("kind", ["prompt", "canvas", "token"])
def test_a_layer_with_a_lora_is_few_kernels(kind):
    config = layer_ops.layer_config(64, 64)
    rows, new, length = {"prompt": (1, 40, 40), "canvas": (2, 17, 40), "token": (1, 1, 40)}[kind]
    stage = Stage([layer_ops.build(config, rank=16)] * LAYERS, 0)
    mask = {"prompt": attention_mask(40, [(10, 26)]), "canvas": CanvasSight.of(23, (24, 40)), "token": None}[kind]
    at, hidden = torch.arange(length - new, length), torch.randn(rows, new, config.hidden_size)
    rope = tuple(part[at] for part in table(positions(length, []), config.attention_head_dim, config.rope_theta))
    cache = KVCache(LAYERS, rows, config.num_key_value_heads, length, config.attention_head_dim, device="cpu",
                    dtype=torch.float32)
    cache.reserve(length)

    def run():
        return stage.run(hidden, rope, mask, cache, at, lambda layer: None)

    run()  # the first time the kernels are tried out
    with layer_ops.CountOps() as count:
        run()
    assert 40 < count.kernels.total() / LAYERS < MOST_KERNELS, count.kernels
    assert count.syncs == 0


def test_the_benchmark_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["layer_ops", "--tokens", "8", "--width", "16", "--experts", "8", "--rounds", "1"])
    layer_ops.main()
    said = capsys.readouterr().out
    assert "the loop takes" in said and all(arm in said for arm in ("ours", "without LoRA", "reference", "loop"))
