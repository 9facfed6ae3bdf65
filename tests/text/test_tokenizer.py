"""The tokenizer: special ids by string, sections without additions, and refusing a tokenizer of another backbone."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import tokenizers
from comfyui_hywu.hywu_core.errors import CheckpointError
from comfyui_hywu.hywu_core.text.tokenizer import Tokenizer

FIRST_SPECIAL = 258  # 256 bytes and two merges come before


def rewrite(folder, change):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_special_tokens_are_single_ids_and_text_survives_the_round_trip(tokenizer):
    text = "<think>a red coat, 图一\n\n</think>"
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.id("<think>") and ids[-1] == tokenizer.id("</think>")
    assert all(number < FIRST_SPECIAL for number in ids[1:-1])
    assert tokenizer.decode(ids) == text


def test_ratio_ids_are_in_bucket_order_across_the_gap(tokenizer):
    first = tokenizer.id("<img_ratio_0>")
    assert tokenizer.ratio_ids == (*range(first, first + 33), *range(first + 35, first + 39))


def test_structure_names_what_text_must_not_hold(tokenizer):
    names = set(tokenizer.structure.values())
    assert {"<img>", "<boi>", "<img_size_64>", "<img_ratio_36>", "<|endoftext|>", "<think>"} <= names
    assert "<pos_0>" not in names
    assert all(tokenizer.id(name) == number for number, name in tokenizer.structure.items())


def test_settings_of_the_file_that_would_change_lengths_are_switched_off(folder, config):
    def change(content):
        content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        content["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                              "pad_type_id": 0, "pad_token": "!"}
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|startoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<|startoftext|>": {"id": "<|startoftext|>", "ids": [259], "tokens": ["<|startoftext|>"]}}}

    rewrite(folder, change)
    assert len(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode("abcdefgh").ids) == 64  # they would apply
    assert len(Tokenizer.from_folder(folder, config).encode("abcdefgh")) == 8


def test_another_backbones_tokenizer_is_refused_with_both_ids(folder, config):
    other = replace(config, special_ids={**config.special_ids, "<img>": 128006})
    with pytest.raises(CheckpointError, match=r"id 262 for <img>.*128006"):
        Tokenizer.from_folder(folder, other)


def test_ids_beyond_the_embedding_are_refused_with_both_numbers(folder, config):
    highest = max(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab().values())
    Tokenizer.from_folder(folder, replace(config, vocab_size=highest + 1))
    with pytest.raises(CheckpointError, match=f"up to {highest}.*vocab_size of {highest}"):
        Tokenizer.from_folder(folder, replace(config, vocab_size=highest))


def test_a_missing_structure_token_is_named(folder, config):
    def change(content):
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<joint_img_sep>"]

    rewrite(folder, change)
    with pytest.raises(CheckpointError, match="lacks 1 of the .*<joint_img_sep>"):
        Tokenizer.from_folder(folder, config)


def test_the_base_size_needs_its_token(folder, config):
    with pytest.raises(CheckpointError, match="<img_size_1024>"):
        Tokenizer.from_folder(folder, replace(config, image_base_size=1024))


@pytest.mark.parametrize(("token", "flag"), [("<guidance>", "cfg_distilled"), ("<timestep_r>", "use_meanflow")])
def test_embedded_tokens_are_needed_only_where_they_are_used(folder, config, token, flag):
    def change(content):
        content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] != token]

    rewrite(folder, change)
    Tokenizer.from_folder(folder, config)
    with pytest.raises(CheckpointError, match=token):
        Tokenizer.from_folder(folder, replace(config, **{flag: True}))


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[1]", b'{"model": 1}', b"\xff\xfe"])
def test_a_damaged_file_is_refused_by_name(folder, config, content):
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="tokenizer.json.*download it again"):
        Tokenizer.from_folder(folder, config)


def test_a_missing_file_is_named_with_its_path(tmp_path, config):
    with pytest.raises(CheckpointError, match="tokenizer.json is missing"):
        Tokenizer.from_folder(tmp_path, config)


def test_the_text_part_imports_without_transformers():
    """transformers costs seconds at the start of ComfyUI; the tokenizer must not bring it in."""
    code = (
        "import sys; from comfyui_hywu.hywu_core.text import reasoning, system_prompt, template, tokenizer; import tokenizers; "
        "print([name for name in ('transformers', 'diffusers') if name in sys.modules])")
    root = next(path for path in sys.modules["comfyui_hywu"].__path__)
    loader = f"import sys; sys.path.insert(0, {root + '/tests'!r}); import conftest; "
    done = subprocess.run([sys.executable, "-c", loader + code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
