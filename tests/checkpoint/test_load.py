"""Loading: the right values land in the right places in every layout; every mismatch or damage is an error that names it.

The checkpoint here is a miniature of the published one: a router that stays fp32, experts that the module stacks, two shards.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from comfyui_hywu.hywu_core.checkpoint import UNUSED_VISION_HEAD, load_weights, open_shards
from comfyui_hywu.hywu_core.checkpoint import load as load_file
from comfyui_hywu.hywu_core.errors import CheckpointError
from torch import nn

REAL_KEYS = Path(__file__).parent.parent / "data" / "real-config" / "real_keys.json"


class Experts(nn.Module):
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.up_EFD = nn.Parameter(torch.empty(3, 5, 4, dtype=dtype))

    def checkpoint_slots(self):
        return {f"{expert}.up.weight": self.up_EFD[expert] for expert in range(3)}


class Layer(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.gate = nn.Linear(4, 3, bias=False, dtype=torch.float32)
        self.experts = Experts(dtype)
        self.norm = nn.Parameter(torch.empty(4, dtype=dtype))
        self.register_buffer("count", torch.empty((), dtype=torch.int64))


def build(dtype: torch.dtype = torch.bfloat16) -> Layer:
    with torch.device("meta"):
        return Layer(dtype)


def tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    shapes = {"gate.weight": (3, 4), "norm": (4,)} | {f"experts.{expert}.up.weight": (5, 4) for expert in range(3)}
    found = {name: torch.randn(shape, generator=random).bfloat16().to(dtype) for name, shape in shapes.items()}
    return found | {"count": torch.tensor(41)}


def assert_loaded(layer: Layer, stored: dict[str, torch.Tensor]) -> None:
    assert torch.equal(layer.gate.weight, stored["gate.weight"].to(layer.gate.weight.dtype))
    assert torch.equal(layer.norm, stored["norm"].to(layer.norm.dtype))
    for expert in range(3):
        assert torch.equal(layer.experts.up_EFD[expert], stored[f"experts.{expert}.up.weight"].to(layer.norm.dtype))
    assert layer.count == stored["count"]


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float32])
def test_values_arrive_in_every_pair_of_dtypes(save_shards, stored, kept):
    layer = build(kept)
    load_weights(layer, open_shards(save_shards(tensors(stored))))
    assert_loaded(layer, tensors(stored))
    assert layer.norm.dtype == kept and layer.gate.weight.dtype == torch.float32
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in layer.parameters())


def test_the_experts_of_one_layer_may_lie_in_two_shards(save_shards):
    whole = tensors()
    first = {name: whole[name] for name in ("experts.2.up.weight", "gate.weight", "experts.0.up.weight")}
    second = {name: value for name, value in whole.items() if name not in first}
    layer = build()
    load_weights(layer, open_shards(save_shards(first, second)))
    assert_loaded(layer, whole)


def test_tensors_longer_than_a_chunk_and_ticks(save_shards, monkeypatch):
    monkeypatch.setattr(load_file, "CHUNK_BYTES", 16)  # two fp64 values a read
    monkeypatch.setattr(load_file, "TICK_BYTES", 64)
    monkeypatch.setattr(load_file, "MB", 1)
    ticks = []
    layer, stored = build(), tensors(torch.float64)
    load_weights(layer, open_shards(save_shards(stored)), on_tick=lambda *tick: ticks.append(tick))
    assert_loaded(layer, stored)
    total = sum(tensor.nbytes for tensor in stored.values())
    assert ticks[0] == (0, total, None) and ticks[-1] == (total, total, None)
    done = [tick[0] for tick in ticks]
    assert done == sorted(done) and len(done) > 5 and max(b - a for a, b in zip(done, done[1:], strict=False)) <= 80


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_places_with_strides_are_filled_in_the_published_order(save_shards, monkeypatch, stored):
    monkeypatch.setattr(load_file, "CHUNK_BYTES", 8)

    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w_DF = nn.Parameter(torch.empty(4, 2, 5, dtype=torch.bfloat16))

        def checkpoint_slots(self):
            return {"w": self.w_DF.permute(2, 1, 0)}

    value = torch.arange(40).reshape(5, 2, 4).to(stored)
    with torch.device("meta"):
        module = Transposed()
    load_weights(module, open_shards(save_shards({"w": value})))
    assert torch.equal(module.w_DF, value.permute(2, 1, 0).bfloat16())


def test_shared_parameters_stay_shared_and_computed_buffers_stay(save_shards):
    with torch.device("meta"):
        module = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    module["b"].weight = module["a"].weight
    module.register_buffer("table", torch.arange(3.0), persistent=False)
    value = torch.rand(2, 2)
    load_weights(module, open_shards(save_shards({"a.weight": value, "b.weight": value.clone()})))
    assert module["a"].weight is module["b"].weight and torch.equal(module["a"].weight, value)
    assert module.table.tolist() == [0.0, 1.0, 2.0]


def test_a_buffer_that_nobody_fills_is_a_programmer_error(save_shards):
    module = build()
    module.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(RuntimeError, match="'table' of the model .Layer. is on meta and in no checkpoint"):
        load_weights(module, open_shards(save_shards(tensors())))


def test_everything_wrong_is_in_one_error_with_both_sides_and_nothing_is_read(save_shards):
    stored = tensors()
    stored["gate.weight"] = stored["gate.weight"].t().contiguous()  # swapped
    stored["experts.1.up.weight"] = torch.zeros(5, 4, dtype=torch.int32)
    stored["count"] = torch.tensor(1.0)
    stored["surplus.weight"] = torch.zeros(7, 2)
    del stored["norm"]
    layer = build()
    with pytest.raises(CheckpointError) as caught:
        load_weights(layer, open_shards(save_shards(stored)))
    said = str(caught.value)
    assert "which has 6 tensors, the files 6" in said
    assert "1 missing in the files: norm [4]" in said
    assert "1 surplus in the files: surplus.weight [7, 2]" in said
    assert "1 of another shape: gate.weight expected [3, 4], found [4, 3]" in said
    assert "2 of another dtype: count expected int64, found float32; experts.1.up.weight expected bfloat16, found int32" in said
    assert all(parameter.is_meta for parameter in layer.parameters())


def test_only_the_first_ten_are_listed(save_shards):
    with pytest.raises(CheckpointError) as caught:
        load_weights(build(), open_shards(save_shards(tensors() | {f"extra.{n:02}": torch.zeros(1) for n in range(12)})))
    assert "12 surplus in the files (first 10 of 12): extra.00 [1]" in str(caught.value)
    assert "extra.09" in str(caught.value) and "extra.10" not in str(caught.value)


def test_swapped_shapes_of_equal_size_are_seen(save_shards):
    stored = tensors()
    stored["experts.0.up.weight"] = stored["experts.0.up.weight"].reshape(4, 5)
    with pytest.raises(CheckpointError, match=r"experts.0.up.weight expected \[5, 4\], found \[4, 5\]"):
        load_weights(build(), open_shards(save_shards(stored)))


def test_exactly_the_eleven_tensors_of_the_unused_vision_head_are_skipped(save_shards):
    assert UNUSED_VISION_HEAD == set(json.loads(REAL_KEYS.read_text())["present_but_unused"])
    stored = tensors() | {name: torch.full((2,), torch.nan) for name in UNUSED_VISION_HEAD}
    layer = build()
    load_weights(layer, open_shards(save_shards(stored, name="with_head")), skip=UNUSED_VISION_HEAD)
    assert_loaded(layer, stored)
    with pytest.raises(CheckpointError, match="1 surplus in the files: vision_model.head.bias"):
        load_weights(build(), open_shards(save_shards(stored | {"vision_model.head.bias": torch.zeros(2)}, name="one_more")),
                     skip=UNUSED_VISION_HEAD)


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("place", [0, 9, 19])
def test_nan_and_inf_are_found_wherever_they_are(save_shards, monkeypatch, bad, dtype, place):
    monkeypatch.setattr(load_file, "CHUNK_BYTES", 64)
    stored = tensors(dtype)
    stored["experts.1.up.weight"].view(-1)[place] = bad
    with pytest.raises(CheckpointError, match="'experts.1.up.weight', stored as .*NaN or Inf in 1 of"):
        load_weights(build(dtype), open_shards(save_shards(stored)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_largest_finite_values_are_sound(save_shards, dtype):
    stored, limits = tensors(dtype), torch.finfo(dtype)
    stored["norm"] = torch.tensor([limits.max, limits.min, limits.smallest_normal, -0.0], dtype=dtype)
    layer = build(dtype)
    load_weights(layer, open_shards(save_shards(stored)))
    assert torch.equal(layer.norm, stored["norm"])


def test_a_value_that_a_narrower_dtype_cannot_hold_is_an_error_not_an_inf(save_shards):
    stored = tensors(torch.float32)
    stored["norm"][2] = 70000.0
    with pytest.raises(CheckpointError, match="'norm', stored as float32, has NaN or Inf in 1 of 4 values as float16"):
        load_weights(build(torch.float16), open_shards(save_shards(stored)))


def test_a_shard_that_is_replaced_after_it_was_opened(save_shards):
    shards = open_shards(save_shards(tensors()))
    last = max(shards.entries.values(), key=lambda entry: entry.offset)
    os.utime(last.file, ns=(0, last.time_ns + 1))
    with pytest.raises(CheckpointError, match=f"{last.file.name} was changed after its header had been read"):
        load_weights(build(), shards)


def test_a_shard_that_is_cut_after_it_was_opened(save_shards):
    shards = open_shards(save_shards(tensors()))
    last = max(shards.entries.values(), key=lambda entry: entry.offset)
    with open(last.file, "r+b") as handle:
        handle.truncate(last.offset + last.nbytes - 2)
    os.utime(last.file, ns=(0, last.time_ns))  # as if it happened while it is read
    with pytest.raises(CheckpointError, match="ends 2 bytes before the end"):
        load_weights(build(), shards)


@pytest.mark.parametrize("name, dtype, said", [
    ("experts.comfy_quant", torch.uint8, "quantised for ComfyUI .*published bf16 folder"),
    ("gate.weight.absmax", torch.float32, "quantised by bitsandbytes .*published bf16 folder"),
    ("gate.weight.quant_state.bitsandbytes__nf4", torch.uint8, "quantised by bitsandbytes .*published bf16 folder"),
    ("gate.SCB", torch.float32, "quantised by bitsandbytes .*published bf16 folder"),
    ("norm", torch.int8, "'norm' is stored as int8, expected one of bfloat16.*quantised weights are not supported"),
    ("norm", torch.uint8, "'norm' is stored as uint8"),
    ("norm", torch.float8_e4m3fn, "'norm' is stored as float8_e4m3fn"),
])
def test_quantised_files_are_refused_with_what_to_use_instead(save_shards, name, dtype, said):
    stored = tensors() | {name: torch.zeros(4).to(dtype)}
    with pytest.raises(CheckpointError, match=said):
        load_weights(build(), open_shards(save_shards(stored)))


class Cancelled(Exception):
    pass


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_cancel_inside_a_tick_passes_through_at_once(save_shards, monkeypatch, at):
    monkeypatch.setattr(load_file, "TICK_BYTES", 1)
    calls = []

    def cancel(*tick):
        calls.append(tick)
        if len(calls) == at:
            raise Cancelled

    shards = open_shards(save_shards(tensors()))
    with pytest.raises(Cancelled):
        load_weights(build(), shards, on_tick=cancel)
    assert len(calls) == at
    layer = build()
    load_weights(layer, shards)  # the files are as they were
    assert_loaded(layer, tensors())


def test_where_memory_cannot_be_asked_for_in_advance_the_result_is_the_same(save_shards, monkeypatch):
    monkeypatch.setattr(load_file, "_LIBC", None)  # Windows, macOS
    value = torch.arange(20_000, dtype=torch.float32)
    with torch.device("meta"):
        module = nn.Linear(20_000, 1, bias=False)
    load_weights(module, open_shards(save_shards({"weight": value[None]})))
    assert torch.equal(module.weight[0], value)


def test_memory_is_asked_for_only_inside_the_tensor(monkeypatch):
    asked = []

    class Libc:
        def madvise(self, start, length, advice):
            asked.append((start.value, length.value))
            return -1

    monkeypatch.setattr(load_file, "_LIBC", Libc())
    whole = torch.empty(1 << 20, dtype=torch.uint8)
    page = load_file.mmap.PAGESIZE
    target = whole[100:100 + 3 * page]
    load_file._prefault(target)
    load_file._prefault(whole[:page // 2])  # less than a page: nothing to ask for
    load_file._prefault(whole.view(-1, 2)[:, 0])  # strided: its neighbours are not ours
    (start, length), = asked
    assert start % page == 0 and length % page == 0 and length >= 2 * page
    assert target.data_ptr() <= start and start + length <= target.data_ptr() + target.nbytes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_values_arrive_on_a_gpu(save_shards, stored):
    layer = build()
    load_weights(layer, open_shards(save_shards(tensors(stored))), device="cuda")
    assert layer.norm.device.type == "cuda"
    assert_loaded(layer.cpu(), tensors(stored))
