"""Packed checkpoints of others and our own: found, checked before a weight is read, and read into any place.

The files here are written through comfy-kitchen's layouts in the native HunyuanImage-3 pack's form: experts stacked, backbone,
VAE, vision tower and text head in files of their own without an index.
"""

import json
import shutil

import pytest
import torch
from comfyui_hywu.hywu_core.backbone.mask import attention_mask
from comfyui_hywu.hywu_core.backbone.rope import positions, table
from comfyui_hywu.hywu_core.checkpoint import backbone_fingerprint, find_packed, load_weights, open_shards, read_packed, slots
from comfyui_hywu.hywu_core.checkpoint import load as load_file_module
from comfyui_hywu.hywu_core.checkpoint.comfy_quant import read_comfy_quant
from comfyui_hywu.hywu_core.checkpoint.formats import Field, Float8, Int4, Int8
from comfyui_hywu.hywu_core.config import BackboneConfig
from comfyui_hywu.hywu_core.errors import CheckpointError
from comfyui_hywu.hywu_core.handle import build_backbone
from comfyui_hywu.hywu_core.placement.build import Placed, whole
from safetensors.torch import load_file, save_file

DENSE = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.shared_mlp.gate_and_up_proj", "mlp.shared_mlp.down_proj")
E4M3 = torch.float8_e4m3fn


def as_bytes(text: dict) -> torch.Tensor:
    return torch.tensor(list(json.dumps(text).encode()), dtype=torch.uint8)


def quantised(weight: torch.Tensor, form: str) -> tuple[dict[str, torch.Tensor], dict, torch.Tensor]:
    """One matrix through comfy-kitchen: the tensors it saves, its JSON, and what it dequantises them to."""
    layouts = pytest.importorskip("comfy_kitchen.tensor")
    rotation = next(size for size in (256, 64, 16) if weight.shape[1] % size == 0)
    if form == "int8":
        layout, options = layouts.TensorWiseINT8Layout, {"per_channel": True, "convrot": True}
        said = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": rotation}
    else:
        layout, options = layouts.AsymW4A8Int8Layout, {}
        said = {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": rotation}
    data, params = layout.quantize(weight, convrot_groupsize=rotation, **options)
    saved = {"weight" + suffix: tensor for suffix, tensor in layout.state_dict_tensors(data, params).items()}
    if "weight_s_rel" in saved:
        saved["weight_s_rel"] = saved["weight_s_rel"].view(torch.uint8)
    return saved, said, layout.dequantize(data, params)


def write_pack(folder, source, form: str) -> dict[tuple[str, str], torch.Tensor]:
    """The pack's files for the backbone folder ``source``; returns what each packed weight stands for."""
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    stored = load_file(source / "model.safetensors")
    parts = {"vae_fp16": {}, "siglip2_so400m_naflex": {}, "cot_head": {}, f"hunyuan_image_3_instruct_{form}": {}}
    vae, vision, head, backbone = parts.values()
    expected = {}
    for name, tensor in stored.items():
        if name.startswith("vae."):
            vae[name.removeprefix("vae.")] = tensor
        elif name.startswith("vision_model."):
            vision[name.removeprefix("vision_model.")] = tensor
        elif name.startswith(("lm_head.", "model.ln_f.")):
            head[name] = tensor
        elif ".mlp.experts." not in name and name.split(".", 3)[-1].removesuffix(".weight") not in DENSE:
            backbone[name] = tensor
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        for dense in DENSE:
            weight = stored[f"{prefix}.{dense}.weight"]
            if form == "bf16":
                backbone[f"{prefix}.{dense}.weight"] = weight
                continue
            saved, said, expected[f"{prefix}.{dense}", "weight"] = quantised(weight, form)
            saved["comfy_quant"] = as_bytes(said)
            backbone |= {f"{prefix}.{dense}.{last}": tensor for last, tensor in saved.items()}
        for own, parameter in (("gate_up_proj", "gate_and_up_proj"), ("down_proj", "down_proj")):
            experts = [name for name in stored if name.startswith(f"{prefix}.mlp.experts.") and f".{parameter}." in name]
            each = [stored[f"{prefix}.mlp.experts.{number}.{parameter}.weight"] for number in range(len(experts))]
            if form == "bf16":
                backbone[f"{prefix}.mlp.experts_{own}.weight"] = torch.stack(each)
                continue
            packed = [quantised(weight, form) for weight in each]
            for last in packed[0][0]:
                tensors = [saved[last] for saved, _, _ in packed]
                backbone[f"{prefix}.mlp.experts_{own}.{last}"] = torch.stack(tensors)
            backbone[f"{prefix}.mlp.experts_{own}.comfy_quant"] = as_bytes(packed[0][1] | {"num_experts": len(each)})
            expected[f"{prefix}.mlp.experts", parameter] = torch.stack([value for _, _, value in packed])
    for name, tensors in parts.items():
        save_file(tensors, folder / f"{name}.safetensors")
    return expected


def unpacked(weight) -> torch.Tensor:
    into = {name: torch.empty(entry.nbytes, dtype=torch.uint8) for name, entry in weight.entries.items()}
    read_packed(weight, into)
    fields = {name: into[name].view(dtype).view(shape) for name, (dtype, shape) in weight.codec.fields(weight.shape).items()}
    return weight.codec.unpack(fields, torch.empty(weight.shape))


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_the_native_packs_files_are_found_and_unpack_to_comfy_kitchens_numbers(tmp_path, tiny_folders, form):
    expected = write_pack(tmp_path / "pack", tiny_folders[0], form)
    published, shards = open_shards(tiny_folders[0]), open_shards(tmp_path / "pack")
    packed = find_packed(shards)
    assert packed.weights.keys() == expected.keys()
    for (module, parameter), weight in packed.weights.items():
        assert (weight.module, weight.parameter, weight.codec.format) == (module, parameter, form)
        assert weight.shape == tuple(expected[module, parameter].shape)
        torch.testing.assert_close(unpacked(weight), expected[module, parameter], rtol=0, atol=1e-6)
    plain = {name for name in published.entries if ".mlp.experts." not in name and not any(f".{own}." in name for own in DENSE)}
    assert packed.plain.entries.keys() == plain  # VAE and vision tower under their published names, too
    assert backbone_fingerprint(shards) == backbone_fingerprint(packed.plain) == backbone_fingerprint(published)


@torch.no_grad()
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_the_native_packs_files_are_the_backbone(tmp_path, tiny_folders, form):
    """Loaded as they are, they compute what the published backbone computes with comfy-kitchen's numbers in it."""
    expected = write_pack(tmp_path / "pack", tiny_folders[0], form)
    config, found = BackboneConfig.from_folder(tiny_folders[0]), []
    hidden = torch.randn(2, 9, config.hidden_size, generator=torch.Generator().manual_seed(0))
    for folder, values in ((tiny_folders[0], expected), (tmp_path / "pack", {}), (tiny_folders[0], {})):
        placed = Placed(build_backbone(config, torch.float32), open_shards(folder), whole(config, torch.float32, "cpu"))
        placed.load()
        for (module, parameter), value in values.items():
            getattr(placed.backbone.get_submodule(module), parameter).copy_(value)
        with placed.backbone.at_work():
            rope = table(positions(9, []), config.attention_head_dim, config.rope_theta)
            found.append(placed.backbone.run(hidden, rope, attention_mask(9, [])))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[2], found[0], rtol=1e-3, atol=1e-4)


def test_stacked_bf16_experts_load_like_the_published_folder(tmp_path, tiny_folders):
    write_pack(tmp_path / "pack", tiny_folders[0], "bf16")
    config = BackboneConfig.from_folder(tiny_folders[0])
    both = []
    for folder in (tiny_folders[0], tmp_path / "pack"):
        backbone = build_backbone(config, torch.float32)
        shards = open_shards(folder)
        assert not find_packed(shards).weights
        load_weights(backbone, shards)
        both.append(slots(backbone))
    assert both[0].keys() == both[1].keys()
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])


def test_the_index_of_a_published_folder_without_its_shards_is_in_nobodys_way(tmp_path, tiny_folders):
    expected = write_pack(tmp_path / "pack", tiny_folders[0], "int8")
    index = {"weight_map": {"model.wte.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "pack" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert find_packed(open_shards(tmp_path / "pack")).weights.keys() == expected.keys()


def test_two_files_with_the_same_tensor_are_named(tmp_path, tiny_folders):
    write_pack(tmp_path / "pack", tiny_folders[0], "int8")
    save_file({"vae.decoder.conv_in.bias": torch.zeros(2)}, tmp_path / "pack" / "z.safetensors")
    with pytest.raises(CheckpointError, match="'vae.decoder.conv_in.bias' is in two files, .*vae_fp16.safetensors and .*z.saf"):
        open_shards(tmp_path / "pack")


def test_tensors_are_read_through_the_common_reader_as_well(tmp_path, tiny_folders):
    write_pack(tmp_path / "pack", tiny_folders[0], "int4")
    packed = find_packed(open_shards(tmp_path / "pack"))
    weight = packed.weights["model.layers.1.mlp.experts", "down_proj"]
    places = {weight.names[field]: torch.empty(shape, dtype=dtype)
              for field, (dtype, shape) in weight.codec.fields(weight.shape).items()}
    load_file_module.read_tensors(places, packed.shards)
    fields = {field: places[name] for field, name in weight.names.items()}
    assert torch.equal(weight.codec.unpack(fields, torch.empty(weight.shape)), unpacked(weight))


MODULE = "model.layers.3.mlp.experts_down_proj"
INT8 = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16, "num_experts": 2}
INT4 = {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 16, "num_experts": 2}


def int8_fields() -> dict[str, torch.Tensor]:
    return {"weight": torch.ones(2, 4, 32, dtype=torch.int8), "weight_scale": torch.ones(2, 4, 1)}


def int4_fields() -> dict[str, torch.Tensor]:
    return {"weight": torch.ones(2, 4, 16, dtype=torch.int8), "weight_s_rel": torch.full((2, 4, 2), 56, dtype=torch.uint8),
            "weight_s_channel": torch.ones(2, 4), "weight_codebook": torch.linspace(-1, 1, 16).repeat(2, 1)}


def fp8_fields() -> dict[str, torch.Tensor]:
    return {"weight": torch.ones(4, 32).to(E4M3), "weight_scale": torch.tensor(0.5)}


def saved(save_shards, fields: dict, said, module: str = MODULE):
    text = said if isinstance(said, torch.Tensor) else as_bytes(said)
    return open_shards(save_shards({f"{module}.{last}": tensor for last, tensor in fields.items()} |
                                   {f"{module}.comfy_quant": text, "model.ln_f.weight": torch.ones(2)}))


def test_forms_that_differ_in_harmless_ways_are_read(save_shards):
    fields = int8_fields() | {"weight_scale": torch.ones(2, 4)}
    found = find_packed(saved(save_shards, fields, INT8 | {"note": "x"})).weights["model.layers.3.mlp.experts", "down_proj"]
    assert found.codec == Int8(16) and found.entries["weight_scale"].shape == (2, 4, 1)
    assert found.nbytes == 2 * 4 * 32 + 2 * 4 * 4
    expected = {
        "one scale": (int8_fields() | {"weight_scale": torch.ones(2)}, {"format": "int8_tensorwise"}, Int8(0, per_row=False)),
        "uniform": ({k: v for k, v in int4_fields().items() if k != "weight_codebook"}, INT4, Int4(16, levels=False)),
        "fp8 scales": (int4_fields() | {"weight_s_rel": torch.ones(2, 4, 2).to(E4M3)}, INT4, Int4(16)),
        "corrected": (int4_fields() | {"weight_correction": torch.ones(2, 2, 4).bfloat16()}, INT4,
                      Int4(16, correction=torch.bfloat16)),
    }
    for fields, said, wanted in expected.values():
        stored = {name: Field(tensor.dtype, tuple(tensor.shape)) for name, tensor in fields.items()}
        assert read_comfy_quant(json.dumps(said).encode(), stored, "here") == (wanted, (2, 4, 32))


def test_comfyuis_fp8_with_one_scale_is_read(save_shards):
    module = "model.layers.0.self_attn.o_proj"
    fields = fp8_fields() | {"input_scale": torch.tensor(1.0)}
    packed = find_packed(saved(save_shards, fields, {"format": "float8_e4m3fn"}, module))
    weight = packed.weights[module, "weight"]
    assert weight.codec == Float8(per_row=False) and torch.equal(unpacked(weight), torch.full((4, 32), 0.5))
    assert packed.plain.entries.keys() == {"model.ln_f.weight"}


@pytest.mark.parametrize("said, match", [
    ({"format": "nvfp4"}, "format 'nvfp4', known are hywu_float8_e4m3fn_rowwise, .*hywu convert"),
    ({}, "format 'None'"),
    (INT8 | {"num_experts": 64}, r"num_experts 64, but its weight \[2, 4, 32\] has 2 experts"),
    (INT8 | {"num_experts": "2"}, "num_experts 2, but"),
    (INT8 | {"convrot_groupsize": 1 << 60}, "convrot_groupsize 1152921504606846976, expected a whole number from 1 to"),
    (INT8 | {"convrot_groupsize": 0}, "convrot_groupsize 0"),
    (INT8 | {"convrot_groupsize": 64}, "convrot_groupsize 64 for rows of 32 values"),
    (INT8 | {"convrot_groupsize": 32}, "convrot_groupsize 32 for rows of 32 values"),
    (INT8 | {"convrot": 1}, "convrot 1, expected true or false"),
    ({"format": "asym_w4a8_int8"}, "rows of 32 bytes and 0 scales"),
    ({"format": "hywu_float8_e4m3fn_rowwise"}, "wants 'weight' as float8_e4m3fn, found int8"),
    (torch.tensor(list(b"[1]"), dtype=torch.uint8), "holds a list, expected an object"),
    (torch.tensor(list(b"{"), dtype=torch.uint8), "not valid JSON"),
    (torch.tensor(list(b"[" * 4000), dtype=torch.uint8), "not valid JSON"),
    (torch.tensor(list(b'{"a": ' + b"9" * 4000), dtype=torch.uint8), "not valid JSON"),
    (torch.full((5000,), 32, dtype=torch.uint8), "has 5000 bytes as torch.uint8, expected 1 to 4096"),
    (torch.ones(3), "has 12 bytes as torch.float32"),
])
def test_hostile_json_is_refused(save_shards, said, match):
    with pytest.raises(CheckpointError, match=match) as caught:
        find_packed(saved(save_shards, int8_fields(), said))
    assert MODULE in str(caught.value) and "take the native" in str(caught.value)


@pytest.mark.parametrize("fields, said, match", [
    (int8_fields() | {"weight": None}, INT8, "weight of shape None"),
    (int8_fields() | {"weight": torch.ones(64, dtype=torch.int8)}, INT8, r"weight of shape \[64\], expected 2 axes"),
    (int8_fields() | {"weight": torch.ones(2, 0, 32, dtype=torch.int8)}, INT8, r"weight of shape \[2, 0, 32\]"),
    (int8_fields() | {"weight_scale": None}, INT8, "stands for the tensors weight, weight_scale, found weight:"),
    (int8_fields() | {"weight_zero": torch.ones(2)}, INT8, "found weight, weight_scale, weight_zero"),
    (int8_fields() | {"weight_scale": torch.ones(2, 5, 1)}, INT8, r"'weight_scale' of shape \[2, 4, 1\], found \[2, 5, 1\]"),
    (int8_fields() | {"weight_scale": torch.ones(2, 4, 1).half()}, INT8, "'weight_scale' as float32, found float16"),
    (int8_fields() | {"weight": torch.ones(4, 32, dtype=torch.int8)}, INT8, "num_experts 2, but .* has no experts"),
    (int4_fields() | {"weight_s_rel": torch.ones(2, 4, 4, dtype=torch.uint8)}, INT4, "expected 32 bytes: only 4 bits"),
    (int4_fields() | {"weight": torch.ones(2, 4, 24, dtype=torch.int8)}, INT4, "only 4 bits a value are supported"),
    (int4_fields(), INT4 | {"group_size": 1 << 40}, "group_size 1099511627776, expected a whole number"),
    (int4_fields() | {"weight_s_rel": torch.ones(2, 4, 16, dtype=torch.uint8)}, INT4 | {"group_size": 2}, "group_size 2 for"),
    (int4_fields() | {"weight_codebook": torch.ones(16)}, INT4, r"'weight_codebook' of shape \[2, 16\], found \[16\]"),
    (int4_fields() | {"weight_codebook": torch.ones(2, 17)}, INT4, "'weight_codebook' of shape"),
])
def test_tensors_that_are_not_what_the_json_says_are_refused(save_shards, fields, said, match):
    with pytest.raises(CheckpointError, match=match):
        find_packed(saved(save_shards, {name: tensor for name, tensor in fields.items() if tensor is not None}, said))


@pytest.mark.parametrize("module, match", [
    ("lm_head", "no projection of a decoder layer"), ("vision_model.encoder.layers.0.mlp.fc1", "no projection"),
    ("model.layers.0.mlp.experts.7.down_proj", "no projection"),
    ("model.layers.0.self_attn.qkv_proj", "has 3 axes, expected 2"),
])
def test_only_projections_of_decoder_layers_may_be_packed(save_shards, module, match):
    with pytest.raises(CheckpointError, match=match):
        find_packed(saved(save_shards, int8_fields(), INT8, module))


def test_scales_without_a_description_and_experts_that_are_there_twice_are_refused(save_shards):
    plain = {f"{MODULE}.weight_scale": torch.ones(2, 4, 1), f"{MODULE}.weight": torch.ones(2, 4, 32, dtype=torch.int8)}
    with pytest.raises(CheckpointError, match=f"'{MODULE}.weight_scale' belongs to a packed weight, but there is no"):
        find_packed(open_shards(save_shards(plain, name="undescribed")))
    fields = {f"{MODULE}.{last}": tensor for last, tensor in int8_fields().items()} | {f"{MODULE}.comfy_quant": as_bytes(INT8)}
    one = {"model.layers.3.mlp.experts.1.down_proj.weight": torch.ones(4, 32)}
    with pytest.raises(CheckpointError, match="experts.1.down_proj.weight' is there once more inside a packed stack"):
        find_packed(open_shards(save_shards(fields | one, name="packed")))
    stack = {f"{MODULE}.weight": torch.ones(2, 4, 32)}
    with pytest.raises(CheckpointError, match="holds 'model.layers.3.mlp.experts.1.down_proj.weight', which is there by"):
        open_shards(save_shards(stack | one, name="plain"))
    with pytest.raises(CheckpointError, match="stacks 5000 experts, expected 1 to 4096"):
        open_shards(save_shards({f"{MODULE}.weight": torch.ones(5000, 1, 1)}, name="many"))


def test_bitsandbytes_is_refused_with_what_to_use_instead(save_shards):
    with pytest.raises(CheckpointError, match="bitsandbytes .*published bf16 folder.*hywu convert.*W4A8 or int8 file"):
        find_packed(open_shards(save_shards({"model.layers.0.self_attn.o_proj.weight.absmax": torch.ones(4)})))


@pytest.mark.parametrize("field, bad", [("weight_s_rel", 0x7F), ("weight_s_rel", 0xFF), ("weight_s_channel", torch.nan),
                                        ("weight_codebook", torch.inf)])
def test_nan_and_inf_are_found_while_reading(save_shards, monkeypatch, field, bad):
    monkeypatch.setattr(load_file_module, "CHUNK_BYTES", 8)
    fields = int4_fields()
    fields[field].view(-1)[5] = bad
    weight, = find_packed(saved(save_shards, fields, INT4)).weights.values()
    with pytest.raises(CheckpointError, match=f"'{MODULE}.{field}'.* has NaN or Inf in 1 of"):
        unpacked(weight)


def test_nan_in_fp8_weights_and_files_that_were_cut_are_found(save_shards):
    module = "model.layers.0.self_attn.o_proj"
    fields = fp8_fields()
    fields["weight"].view(torch.uint8)[1, 2] = 0xFF
    shards = saved(save_shards, fields, {"format": "float8_e4m3fn"}, module)
    weight, = find_packed(shards).weights.values()
    with pytest.raises(CheckpointError, match="NaN or Inf in 1 of 128 values as float8_e4m3fn"):
        unpacked(weight)
    last = max(weight.entries.values(), key=lambda entry: entry.offset)
    with open(last.file, "r+b") as handle:
        handle.truncate(last.offset + last.nbytes - 1)
    with pytest.raises(CheckpointError, match=f"{last.file.name} was changed after its header had been read"):
        unpacked(weight)


def test_packed_tensors_fill_a_slab(save_shards, monkeypatch):
    monkeypatch.setattr(load_file_module, "CHUNK_BYTES", 16)
    weight, = find_packed(saved(save_shards, int8_fields(), INT8)).weights.values()
    slab, places, ticks = torch.full((2048,), 9, dtype=torch.uint8), {}, []
    for number, (name, entry) in enumerate(weight.entries.items()):
        places[name] = slab[512 * number:512 * number + entry.nbytes]
    read_packed(weight, places, lambda *tick: ticks.append(tick))
    assert torch.equal(slab[:256].view(torch.int8).view(2, 4, 32), int8_fields()["weight"])
    assert torch.equal(slab[512:544].view(torch.float32), torch.ones(8)) and (slab[544:] == 9).all() and ticks
    with pytest.raises(ValueError, match="places .* for the packed tensors"):
        read_packed(weight, places | {"weight": slab[:7]})
