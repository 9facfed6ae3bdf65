"""Opening checkpoint folders: sound layouts give exact places, every kind of damage gives an error that says what and where."""

import json
import os

import pytest
import torch
from comfyui_hywu.hywu_core.checkpoint import open_shards
from comfyui_hywu.hywu_core.errors import CheckpointError

A = torch.arange(6, dtype=torch.float32).reshape(2, 3)
B = torch.arange(4, dtype=torch.bfloat16)


def entry(start: int, stop: int, shape: list[int] | None = None, dtype: str = "U8") -> dict:
    return {"dtype": dtype, "shape": [stop - start] if shape is None else shape, "data_offsets": [start, stop]}


def stored_bytes(found) -> bytes:
    return found.file.read_bytes()[found.offset:found.offset + found.nbytes]


def test_a_single_file_gives_dtype_shape_and_the_exact_bytes(save_shards):
    shards = open_shards(save_shards({"a": A, "b": B}))
    assert set(shards.entries) == {"a", "b"}
    assert (shards.entries["a"].dtype, shards.entries["a"].shape) == (torch.float32, (2, 3))
    assert (shards.entries["b"].dtype, shards.entries["b"].shape) == (torch.bfloat16, (4,))
    assert stored_bytes(shards.entries["a"]) == A.numpy().tobytes()
    assert stored_bytes(shards.entries["b"]) == B.view(torch.uint8).numpy().tobytes()
    assert shards.nbytes == 24 + 8


def test_shards_are_found_through_their_index(save_shards):
    shards = open_shards(save_shards({"a": A}, {"b": B}))
    assert shards.entries["a"].file.name == "model-00001-of-00002.safetensors"
    assert shards.entries["b"].file.name == "model-00002-of-00002.safetensors"
    assert stored_bytes(shards.entries["b"]) == B.view(torch.uint8).numpy().tobytes()


def test_one_file_of_another_name_is_taken(save_shards):
    folder = save_shards({"a": A})
    (folder / "model.safetensors").rename(folder / "hy-wu.safetensors")
    assert open_shards(folder).entries["a"].file.name == "hy-wu.safetensors"


def test_shards_may_be_links_out_of_the_folder_as_in_the_hub_cache(save_shards):
    folder = save_shards({"a": A}, {"b": B})
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    shard = folder / "model-00001-of-00002.safetensors"
    shard.rename(blobs / "0123abcd")
    os.symlink(blobs / "0123abcd", shard)
    assert stored_bytes(open_shards(folder).entries["a"]) == A.numpy().tobytes()


@pytest.mark.parametrize("prepare, said", [
    (lambda folder: folder.rmdir(), "is not a folder"),
    (lambda folder: None, "holds no weights"),
    (lambda folder: (folder / "model.safetensors").symlink_to(folder / "gone"), "holds no weights"),
    (lambda folder: [(folder / f"model-0000{n}-of-00002.safetensors").write_bytes(b"") for n in (1, 2)],
     "2 \\*.safetensors but no .*download that file"),
    (lambda folder: [(folder / f"{name}.safetensors.index.json").write_text("{}") for name in "ab"], "holds 2 indices"),
    (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "no 'weight_map'"),
    (lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": []}'), "no 'weight_map'"),
    (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), "not valid JSON"),
    (lambda folder: (folder / "model.safetensors.index.json").write_text("[" * 100_000), "not valid JSON"),
    (lambda folder: (folder / "model.safetensors.index.json").write_text("9" * 5000), "not valid JSON"),
])
def test_a_folder_without_usable_weights_is_refused(tmp_path, prepare, said):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    prepare(folder)
    with pytest.raises(CheckpointError, match=said):
        open_shards(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_in_place_of_a_shard_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_shards(tmp_path)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "..", ".", "", "/etc/hostname", "sub/../../x.safetensors",
                                   "..\\outside.safetensors", "C:x.safetensors", "a\0b", 7, None, ["model.safetensors"]])
def test_an_index_cannot_name_files_elsewhere(save_shards, shard):
    folder = save_shards({"a": A}, {"b": B})
    (folder.parent / "outside.safetensors").write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    index = {"weight_map": {"a": shard, "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="'a' is said to lie in .*expected the name of a file in the same folder"):
        open_shards(folder)


def test_missing_shards_are_named(save_shards):
    folder = save_shards({"a": A}, {"b": B}, {"c": A})
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lists 3 shards, 1 of them are missing: model-00002-of-00003.safetensors"):
        open_shards(folder)


def test_index_and_shards_must_agree(save_shards):
    folder = save_shards({"a": A, "extra": B}, {"b": B})
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors",
                  "ghost": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError) as caught:
        open_shards(folder)
    assert "ghost (index says model-00002-of-00002.safetensors)" in str(caught.value)
    assert "extra (in model-00001-of-00002.safetensors, index says nothing)" in str(caught.value)


def test_a_tensor_in_another_shard_than_the_index_says(save_shards):
    folder = save_shards({"a": A}, {"b": B})
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": names[1], "b": names[0]}}))
    with pytest.raises(CheckpointError, match="a \\(in model-00001-of-00002.safetensors, index says model-00002"):
        open_shards(folder)


def test_a_tensor_in_two_shards_is_refused(save_shards):
    folder = save_shards({"a": A, "b": B}, {"b": B, "c": A})
    with pytest.raises(CheckpointError, match="'b' is in two shards, model-00001-of-00002.safetensors and model-00002"):
        open_shards(folder)


@pytest.mark.parametrize("keep, said", [(0, "has 0 bytes"), (5, "has 5 bytes"), (8, "has 8 bytes but announces a header"),
                                        (60, "has 60 bytes but announces a header"), (-1, "is cut off")])
def test_a_cut_off_file_is_refused_with_both_sizes(save_shards, keep, said):
    folder = save_shards({"a": A, "b": B})
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:keep])
    with pytest.raises(CheckpointError, match=said):
        open_shards(folder)


def test_bytes_behind_the_last_tensor_are_refused(save_shards):
    folder = save_shards({"a": A})
    with open(folder / "model.safetensors", "ab") as handle:
        handle.write(b"x")
    with pytest.raises(CheckpointError, match="too long"):
        open_shards(folder)


@pytest.mark.parametrize("header, data, length, said", [
    ({}, b"", 2**63, "announces a header of 9223372036854775808 bytes"),
    ({}, b"", 1 << 40, "announces a header"),
    ({}, b"", 3, "announces a header of 3 bytes"),
    (b"[]", b"", None, "is a list, expected an object"),
    (b"nonsense", b"", None, "not valid JSON"),
    (b"\xff\xfe{}", b"", None, "not valid JSON"),
    (b'{"a":' * 100_000, b"", None, "not valid JSON"),
    (b'{"a": ' + b"9" * 5000 + b"}", b"", None, "not valid JSON"),
    (b'{"a": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}, "a": {}}', b"x", None, "names 'a' twice"),
    ({"a": 7}, b"", None, "has shape None"),
    ({"a": {}}, b"", None, "has shape None"),
    ({"a": entry(0, 4, dtype="Q3")}, b"abcd", None, "stored as 'Q3', known are F64"),
    ({"a": entry(0, 4) | {"dtype": ["F32"]}}, b"abcd", None, "stored as \\['F32'\\]"),
    ({"a": entry(0, 4, [-4])}, b"abcd", None, "expected natural numbers"),
    ({"a": entry(0, 4, [-2, -2])}, b"abcd", None, "expected natural numbers"),
    ({"a": entry(0, 4, [4.0])}, b"abcd", None, "expected natural numbers"),
    ({"a": entry(0, 1, [True])}, b"a", None, "expected natural numbers"),
    ({"a": entry(0, 4, [2**62, 2**62])}, b"abcd", None, "needs 2126.*bytes, its data_offsets \\[0, 4\\] hold 4"),
    ({"a": entry(-4, 0, [4])}, b"abcd", None, "expected natural numbers"),
    ({"a": entry(4, 0, [4])}, b"abcd", None, "two offsets in order"),
    ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 2, 4]}}, b"abcd", None, "two offsets"),
    ({"a": entry(0, 4, [3])}, b"abcd", None, "needs 3 bytes"),
    ({"a": entry(0, 400)}, b"abcd", None, "cut off"),
    ({"a": entry(1000, 1004)}, b"abcd", None, "leaves a gap"),
    ({"a": entry(0, 4), "b": entry(2, 6)}, b"abcdef", None, "'b' starts at byte .* overlaps"),
    ({"a": entry(0, 4), "b": entry(0, 4)}, b"abcd", None, "overlaps"),
    ({"a": entry(0, 2), "b": entry(4, 6)}, b"abcdef", None, "'b' starts at byte .* leaves a gap"),
    ({"a\x1b[2J": entry(0, 1)}, b"a", None, "printable"),
    ({"a" * 100_000: entry(0, 1)}, b"a", None, "at most 256"),
])
def test_hostile_headers_are_refused(save_raw, header, data, length, said):
    with pytest.raises(CheckpointError, match=said) as caught:
        open_shards(save_raw(header, data, length))
    assert len(str(caught.value)) < 2000


def test_order_in_the_header_and_empty_tensors_do_not_matter(save_raw):
    shards = open_shards(save_raw({"z": entry(2, 4), "none": entry(2, 2, [0, 5]), "a": entry(0, 2), "__metadata__": {"x": "y"}},
                                  b"abcd"))
    assert list(shards.entries) == ["a", "none", "z"]
    assert stored_bytes(shards.entries["z"]) == b"cd"
