"""The fingerprint follows the values and nothing else: not the sharding, not the file names, not the float dtype of storage."""

import errno
import importlib
import json
import os

import pytest
import torch
from comfyui_hywu.hywu_core.checkpoint import backbone_fingerprint, fingerprint, generator_fingerprint, open_shards
from comfyui_hywu.hywu_core.errors import CheckpointError
from safetensors.torch import load_file, save_file

module = importlib.import_module("comfyui_hywu.hywu_core.checkpoint.fingerprint")  # the package's name is the function's


def backbone(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = {"model.ln_f.weight": (8,), "model.layers.0.input_layernorm.weight": (8,),
              "model.layers.0.mlp.gate.wg.weight": (4, 8), "model.layers.0.mlp.experts.0.down_proj.weight": (8, 6),
              "timestep_emb.mlp.0.bias": (8,), "time_embed_2.mlp.0.bias": (8,)}
    # Rounded to bf16 first: these values are the same in every float dtype.
    return {name: torch.randn(shape, generator=random).bfloat16().to(dtype) for name, shape in shapes.items()}


def of(folder) -> str:
    return backbone_fingerprint(open_shards(folder))


def test_it_is_sixteen_hex_digits_and_the_same_for_every_sharding_and_storage_dtype(save_shards):
    tensors, wide = backbone(), backbone(dtype=torch.float32)
    names = list(tensors)
    one = of(save_shards(tensors, name="one"))
    assert len(one) == 16 and int(one, 16) >= 0
    assert of(save_shards({n: tensors[n] for n in names[3:]}, {n: tensors[n] for n in names[:3]}, name="two")) == one
    assert of(save_shards(wide, name="wide")) == one
    assert of(save_shards(tensors | {names[2]: wide[names[2]]}, name="mixed")) == one


@pytest.mark.parametrize("name", ["model.ln_f.weight", "model.layers.0.input_layernorm.weight",
                                  "model.layers.0.mlp.gate.wg.weight", "timestep_emb.mlp.0.bias", "time_embed_2.mlp.0.bias"])
def test_one_changed_value_changes_it(save_shards, name):
    changed = backbone()
    changed[name].view(-1)[3] += 0.5
    assert of(save_shards(backbone(), name="one")) != of(save_shards(changed, name="two"))


def test_the_order_of_values_and_the_shape_count(save_shards):
    flipped, reshaped = backbone(), backbone()
    flipped["model.ln_f.weight"] = flipped["model.ln_f.weight"].flip(0)
    reshaped["model.ln_f.weight"] = reshaped["model.ln_f.weight"].reshape(2, 4)
    found = {of(save_shards(tensors, name=name)) for name, tensors in
             (("one", backbone()), ("two", flipped), ("three", reshaped))}
    assert len(found) == 3


def test_weights_that_get_quantised_and_the_unused_vision_head_do_not_count(save_shards):
    other = backbone() | {"vision_model.head.layernorm.weight": torch.ones(4)}
    other["model.layers.0.mlp.experts.0.down_proj.weight"] = torch.zeros(8, 6)
    assert of(save_shards(other, name="other")) == of(save_shards(backbone(), name="one"))


def test_generator_norms_biases_and_positions(save_shards):
    tensors = {"model.norm_input.weight": torch.ones(4), "model.layer_pos.weight": torch.zeros(2, 3),
               "model.blocks.0.norm1.weight": torch.ones(4), "hidden_in.bias": torch.zeros(4),
               "hidden_in.weight": torch.zeros(4, 4)}
    before = generator_fingerprint(open_shards(save_shards(tensors, name="before")))
    for name in tensors:
        after = {key: value + (key == name) for key, value in tensors.items()}
        same = generator_fingerprint(open_shards(save_shards(after, name=name))) == before
        assert same == (name == "hidden_in.weight"), name


def test_a_folder_of_something_else_is_refused(save_shards):
    with pytest.raises(CheckpointError, match="none of the tensors that identify .*no HunyuanImage-3 backbone"):
        of(save_shards({"unet.conv_in.bias": torch.zeros(2)}))


def test_integers_and_cut_off_files_are_refused(save_shards):
    with pytest.raises(CheckpointError, match="'a' is stored as torch.int8, expected a float dtype"):
        fingerprint(open_shards(save_shards({"a": torch.zeros(2, dtype=torch.int8)}, name="int8")), lambda name: True)
    shards = open_shards(save_shards({"a": torch.zeros(200)}, name="cut"))
    with open(shards.entries["a"].file, "r+b") as handle:
        handle.truncate(100)
    with pytest.raises(CheckpointError, match="cut off: 'a' needs 800 bytes"):
        fingerprint(shards, lambda name: True)


# ---- the file that keeps it


@pytest.fixture
def kept(save_shards, monkeypatch):
    """A folder of two shards whose fingerprint is worth keeping, and the file that keeps it."""
    monkeypatch.setattr(module, "KEPT_FROM_BYTES", 1)
    tensors = backbone()
    names = list(tensors)
    folder = save_shards({n: tensors[n] for n in names[3:]}, {n: tensors[n] for n in names[:3]}, name="kept")
    return folder, folder / module.KEPT


@pytest.fixture
def computed(monkeypatch):
    """How often it was computed and not taken from the file."""
    calls, compute = [], module._computed
    monkeypatch.setattr(module, "_computed", lambda *arguments: calls.append(arguments) or compute(*arguments))
    return calls


def test_it_is_computed_once(kept, computed):
    folder, file = kept
    first = of(folder)
    assert file.is_file() and [of(folder), of(folder)] == [first] * 2 and len(computed) == 1
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("change", ["time", "size", "values"])
def test_a_file_that_has_changed_is_read_again(kept, computed, change):
    folder, file = kept
    first = of(folder)
    shard = sorted(folder.glob("*.safetensors"))[0]
    if change == "time":
        os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    else:
        tensors = load_file(shard)
        name = next(name for name in tensors if "experts" not in name)
        tensors[name] = tensors[name].float() if change == "size" else tensors[name] + 1
        save_file(tensors, shard)
    found = of(folder)
    assert len(computed) == 2 and (found == first) is (change != "values")
    assert of(folder) == found and len(computed) == 2


@pytest.mark.parametrize("content", ["", "[]", '{"fingerprint": 5}', '{"fingerprint": "../../../../etcp"}', "[" * 100_000])
def test_a_damaged_one_does_not_count(kept, computed, content):
    folder, file = kept
    first = of(folder)
    state = json.loads(file.read_text())
    file.write_text(content if "finger" not in content else json.dumps(state | json.loads(content)))
    assert of(folder) == first and len(computed) == 2 and json.loads(file.read_text()) == state


def test_one_of_other_tensors_does_not_count(kept, computed):
    folder, file = kept
    first = of(folder)
    other = fingerprint(open_shards(folder), lambda name: name == "model.ln_f.weight")
    assert other != first and len(computed) == 2 and of(folder) == first


@pytest.mark.parametrize("calls", [("os.replace",), ("builtins.open", "pathlib.Path.unlink")], ids=["forbidden", "read-only"])
def test_a_folder_that_cannot_be_written_does_not_matter(kept, monkeypatch, calls):
    folder, file = kept

    def refused(path, mode="x", *rest, **keywords):
        if mode == "rb":
            return plain(path, mode, *rest, **keywords)
        raise OSError(errno.EROFS, "Read-only file system")

    plain = open
    for call in calls:
        monkeypatch.setattr(call, refused)
    found = of(folder)
    monkeypatch.undo()
    assert len(found) == 16 and not file.exists() and not list(folder.glob(".hywu*"))


def test_what_is_small_is_not_kept(save_shards):
    folder = save_shards(backbone(), name="small")
    of(folder)
    assert not (folder / module.KEPT).exists()
