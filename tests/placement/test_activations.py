"""Each formula of ``activations.py`` against the real module's forward pass on meta, alone: no weight hides an error."""

from dataclasses import replace

import pytest
import torch
from comfyui_hywu.hywu_core.backbone.cache import KVCache
from comfyui_hywu.hywu_core.backbone.mask import CanvasSight
from comfyui_hywu.hywu_core.backbone.stage import Stage
from comfyui_hywu.hywu_core.generator.model import ParameterGenerator
from comfyui_hywu.hywu_core.handle import build_backbone
from comfyui_hywu.hywu_core.placement import activations
from comfyui_hywu.hywu_core.placement.request import Request, lengths
from comfyui_hywu.hywu_core.placement.slab import adapted_modules, compute_layout
from comfyui_hywu.kernels.reference import Adapter

from .live import counted

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def backbone(real_config):
    return build_backbone(
        replace(real_config, num_hidden_layers=1, moe_topk=(8,), moe_intermediate_size=(3072,), num_shared_expert=(1,)), BF16)


@pytest.fixture(params=(False, True), ids=("plain", "with a LoRA"))
def lora(request, backbone):
    layer = backbone.model.layers[0]
    slab = compute_layout(layer, BF16, 16)
    views = slab.views(torch.empty(slab.nbytes, dtype=torch.uint8, device="meta"))
    for path, module in adapted_modules(layer):
        module.place(views[path])
        for target in module.targets() if request.param else ():
            a, b = (torch.empty(shape, dtype=BF16, device="meta") for shape in (target.a_shape(16), target.b_shape(16)))
            module.attach(target.name, Adapter(a, b, None))
    yield request.param
    for _, module in adapted_modules(layer):
        for name in module.attached():
            module.attach(name, None)


@pytest.mark.parametrize("pieces", (16_384, 2_048))
@pytest.mark.parametrize("fused", (True, False), ids=("fused", "composed"))
@pytest.mark.parametrize(("rows", "length", "keys", "masked"), (
    (2, 4097, 11_509, False),  # a denoise step
    (2, 5183, 11_509, True),  # what differs in the first pass
    (1, 7406, 7406, True),  # a prompt
    (1, 40_000, 40_000, False)))  # more than two full pieces and a rest
def test_a_layer(sizes, backbone, lora, rows, length, keys, masked, fused, pieces):
    layer = backbone.model.layers[0]
    layer.mlp.experts.tokens_at_once = pieces
    hidden = torch.empty(rows, length, sizes.config.hidden_size, dtype=BF16, device="meta")
    rope = (torch.empty(length, sizes.config.attention_head_dim, device="meta"),) * 2
    if masked:
        mask = torch.empty(length, keys, dtype=torch.bool, device="meta")
    else:
        mask = CanvasSight(torch.empty(1, keys - length, dtype=torch.bool, device="meta"), keys)
    cache = KVCache(1, rows, sizes.config.num_key_value_heads, keys, sizes.config.attention_head_dim, device="meta", dtype=BF16)
    cache.reserve(keys)
    with counted(fused) as live:
        Stage([layer], 0).run(hidden, rope, mask, cache, torch.empty(length, dtype=torch.int64, device="meta"), lambda _: None)
    said = activations.layer(sizes, rows, length, keys, pieces, lora=lora, masked=masked, composed=not fused)
    assert said == pytest.approx(live.peak, rel=0.01)


@pytest.mark.parametrize("size", ("1024x1024", "1024x768", "16:9"))
def test_vae_embedder_final_layer_and_tower(sizes, backbone, real_config, size):
    length = lengths(real_config, Request(size=size))
    grid = (length.height // 16, length.width // 16)
    latent = torch.empty(1, 32, *grid, dtype=BF16, device="meta")
    at = torch.empty(2, 4096, dtype=BF16, device="meta")
    pixels = torch.empty(1, 3, length.height, length.width, dtype=BF16, device="meta")
    patches = torch.empty(1, 1024, 768, dtype=BF16, device="meta")
    seen = torch.empty(1, 1024, dtype=torch.int32, device="meta")
    for said, step in (
            (activations.vae(sizes, length), lambda: backbone.vae.encode(pixels)),
            (activations.vae(sizes, length), lambda: backbone.vae.decode(latent)),
            (activations.embedding(sizes, length), lambda: backbone.patch_embed(latent, at[:1])),
            (activations.velocity(sizes, 2, length), lambda: backbone.final_layer(
                torch.empty(2, length.cells, 4096, dtype=BF16, device="meta"), at, grid))):
        with counted() as live:
            step()
        assert said == pytest.approx(live.peak, rel=0.01)
    with counted() as live:
        backbone.vision_aligner(backbone.vision_model(patches, seen, [(32, 32)]))
    assert live.peak <= activations.vision(sizes) <= 1.5 * live.peak  # 35 MB of at least 12 GB


@pytest.mark.parametrize("length", (2280, 7406, 17_658))
def test_the_generator(generator, real_generator_config, length):
    with torch.device("meta"):
        model = ParameterGenerator(replace(real_generator_config, num_pg_layers=1)).to(BF16)
    with counted() as live:
        model(torch.empty(1, length, 4096, dtype=BF16, device="meta"))
    assert activations.writing(generator, length) == pytest.approx(live.peak, rel=0.01)


@pytest.mark.parametrize("thinking", (0, 200, 1000, 9000))
def test_keys_and_values(sizes, real_config, thinking):
    length = lengths(real_config, Request(thinking=thinking))
    first, grown = activations.thinking_kv(sizes, length)
    with counted() as live:
        cache = KVCache(1, 1, 8, length.prompt + 256, 128, device="meta", dtype=BF16)
        assert first == live.now
        for slots in range(length.prompt, length.prompt + thinking + 1):
            cache.reserve(slots)
        assert grown == live.peak
        del cache
    with counted() as live:
        cache = KVCache(1, 2, 8, length.whole, 128, device="meta", dtype=BF16)
        assert activations.kv_layer(sizes, 2, length.whole) == live.now > 0
        del cache
