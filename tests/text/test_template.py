"""Sequences: token by token, the places of pictures in them, the unconditional row, and what is refused."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from comfyui_hywu.hywu_core.errors import PromptError
from comfyui_hywu.hywu_core.text.template import ImageSpan, image_sequence, text_sequence
from comfyui_hywu.hywu_core.vision.buckets import Bucket, Buckets

# Vision tokens: 2 x 3 real ones of max_num_patches = 9.
PICTURE = SimpleNamespace(bucket=Bucket(4, 32, 48), grid=(2, 3))
BUCKET = Bucket(7, 16, 64)


def parts(tokenizer, sequence, row=0):
    """The row as text, with runs of <img> and <cfg> written as <img>*n."""
    text = tokenizer.decode(sequence.ids_BL[row].tolist())
    for token in ("<img>", "<cfg>"):
        for count in range(40, 1, -1):
            text = text.replace(token * count, f"{token}*{count}")
    return text


def test_a_text_sequence_token_by_token(tokenizer, config, generation):
    sequence = text_sequence(tokenizer, config, generation, "red", [PICTURE], bot_task="think", system_prompt="Hi")
    assert parts(tokenizer, sequence) == (
        "<|startoftext|>Hi\n\nUser: <boi><img_size_64><img_ratio_4><timestep><img>*6<joint_img_sep><img>*9<eoi>red\n\n"
        "Assistant: <think>")
    assert sequence.ids_BL.dtype == torch.int64 and sequence.ids_BL.shape == (1, sequence.length)


def test_an_image_sequence_and_its_unconditional_row(tokenizer, config, generation):
    sequence = image_sequence(tokenizer, config, generation, "red", [PICTURE], BUCKET, thinking="<think>ab</think>tail",
                              system_prompt="Hi")
    image = "<boi><img_size_64><img_ratio_4><timestep><img>*6<joint_img_sep><img>*9<eoi>"
    canvas = "<answer><boi><img_size_64><img_ratio_7><timestep><img>*4<eoi></answer>\n\n"
    assert parts(tokenizer, sequence, 0) == (
        f"<|startoftext|>Hi\n\nUser: {image}red\n\nAssistant: <think>ab</think>tail{canvas}")
    assert parts(tokenizer, sequence, 1) == (
        f"<|startoftext|>Hi\n\nUser: {image}<cfg>*3\n\nAssistant: <think><cfg>*2</think><cfg>*4{canvas}")


def test_both_rows_begin_alike(tokenizer, config, generation):
    """Up to the first <cfg>, pictures included; a cut inside a picture moves before it."""
    sequence = image_sequence(tokenizer, config, generation, "red", [PICTURE], BUCKET, system_prompt="Hi")
    shared = sequence.shared_prefix
    assert parts(tokenizer, replace(sequence, ids_BL=sequence.ids_BL[:, :shared]), 1).endswith("<img>*9<eoi>")
    assert tokenizer.decode([sequence.ids_BL[1, shared].item()]) == "<cfg>"
    assert replace(sequence, ids_BL=sequence.ids_BL[:1]).shared_prefix == 0
    vit = sequence.spans("vit")[0]
    ids_BL = sequence.ids_BL.clone()
    ids_BL[1, vit.start + 2] = 0
    assert replace(sequence, ids_BL=ids_BL).shared_prefix == sequence.spans("vae")[0].start


def test_rows(tokenizer, config, distilled, generation):
    def rows(config, **more):
        return image_sequence(tokenizer, config, generation, "red", [], BUCKET, **more).ids_BL.shape[0]

    assert rows(config) == 2 and rows(distilled) == 1
    assert rows(config, rows=1) == 1 and rows(distilled, rows=2) == 2


def test_sections_are_tokenised_apart(tokenizer, config, generation):
    """The instruction's own line feeds must not merge with the separator behind it."""
    merged = tokenizer.encode("\n\n")
    assert len(merged) == 1 and len(tokenizer.encode("\n")) == 1
    ids = text_sequence(tokenizer, config, generation, "red\n", [], bot_task="auto").ids_BL[0].tolist()
    place = ids.index(tokenizer.encode("\n")[0])
    assert ids[place + 1] == merged[0]


def test_places_and_spans(tokenizer, distilled, generation):
    """<|startoftext|> 0, "User: " 1..6, then per picture <boi> size ratio <timestep> and its tokens."""
    other = SimpleNamespace(bucket=Bucket(9, 64, 16), grid=(3, 3))
    sequence = image_sequence(tokenizer, distilled, generation, "red", [PICTURE, other], BUCKET)
    vae0 = ImageSpan("vae", 11, 17, (2, 3), 0)
    vit0 = ImageSpan("vit", 18, 27, (2, 3), 0)
    vae1 = ImageSpan("vae", 32, 36, (4, 1), 1)
    vit1 = ImageSpan("vit", 37, 46, (3, 3), 1)
    # <eoi> 46, "red" 47..49, separator 50, "Assistant: " 51..61, <answer> 62, <boi> size ratio 63..65
    gen = ImageSpan("gen", 69, 73, (1, 4))
    assert sequence.images == (vae0, vit0, vae1, vit1, gen)
    assert sequence.cond_timestep == (10, 31)
    assert (sequence.gen_timestep, sequence.guidance, sequence.gen_timestep_r) == (66, 67, 68)
    assert sequence.gen == gen and sequence.later_slice == (66, 73)
    assert sequence.joint_spans == ((11, 27), (32, 46))

    ids = sequence.ids_BL[0]
    named = {"<timestep>": [10, 31, 66], "<guidance>": [67], "<timestep_r>": [68], "<joint_img_sep>": [17, 36]}
    for token, places in named.items():
        assert (ids == tokenizer.id(token)).nonzero().flatten().tolist() == places
    inside = [place for span in sequence.images for place in range(span.start, span.stop)]
    assert (ids == tokenizer.id("<img>")).nonzero().flatten().tolist() == inside


def test_spans_by_attention_type(tokenizer, config, generation):
    sequence = image_sequence(tokenizer, config, generation, "red", [PICTURE], BUCKET)
    vae, vit, gen = (11, 17), (18, 27), (sequence.gen.start, sequence.gen.stop)
    assert sequence.full_spans("joint_full") == [(11, 27), gen]
    assert sequence.full_spans("full") == [vae, vit, gen]
    assert sequence.full_spans("full_causal") == [vae, gen]
    assert sequence.full_spans("causal") == [gen]
    everything = [(vae, (2, 3)), (vit, (2, 3)), (gen, (1, 4))]
    assert sequence.rope_spans("joint_full") == sequence.rope_spans("full") == everything
    assert sequence.rope_spans("full_causal") == everything[:1]
    assert sequence.rope_spans("causal") == []


def test_a_text_sequence_paints_nothing(tokenizer, config, generation):
    sequence = text_sequence(tokenizer, config, generation, "red", [])
    assert sequence.images == () and sequence.gen is None and sequence.later_slice is None
    assert (sequence.gen_timestep, sequence.guidance, sequence.gen_timestep_r) == (None, None, None)


def test_without_meanflow_and_distillation_the_canvas_has_neither_token(tokenizer, config, generation):
    sequence = image_sequence(tokenizer, config, generation, "red", [], BUCKET)
    assert sequence.guidance is None and sequence.gen_timestep_r is None
    assert sequence.gen.start == sequence.gen_timestep + 1


def test_the_checkpoint_decides_about_the_thought_unless_asked(tokenizer, config, generation):
    thinking = "<think>long thought</think><recaption>b</recaption>"

    def text(generation, **more):
        sequence = text_sequence(
            tokenizer, config, generation, "red", [], thinking=thinking, bot_task="img_ratio", **more)
        return parts(tokenizer, sequence)

    dropping = replace(generation, drop_think=True)
    assert "long thought" in text(generation) and "long thought" not in text(dropping)
    assert "long thought" not in text(generation, drop_think=True) and "long thought" in text(dropping, drop_think=False)
    assert "<recaption>b</recaption>" in text(dropping)


def test_think_recaption_opens_like_think(tokenizer, config, generation):
    first = text_sequence(tokenizer, config, generation, "red", [], bot_task="think_recaption")
    second = text_sequence(tokenizer, config, generation, "red", [], bot_task="think")
    assert torch.equal(first.ids_BL, second.ids_BL)


@pytest.mark.parametrize("prompt", ["", "  ", "\n\t "])
def test_an_empty_instruction_is_refused(tokenizer, config, generation, prompt):
    with pytest.raises(PromptError, match="instruction is empty"):
        text_sequence(tokenizer, config, generation, prompt, [PICTURE])
    with pytest.raises(PromptError, match="instruction is empty"):
        image_sequence(tokenizer, config, generation, prompt, [PICTURE], BUCKET)


@pytest.mark.parametrize("token", ["<img>", "<|endoftext|>", "<think>", "<img_ratio_35>", "<cfg>", "<boi>"])
def test_structure_tokens_in_the_instruction_are_refused_by_name(tokenizer, config, generation, token):
    with pytest.raises(PromptError, match=rf"instruction contains {token}".replace("|", r"\|")):
        text_sequence(tokenizer, config, generation, f"make it red {token} please", [])


def test_thinking_may_hold_its_tags_and_nothing_else(tokenizer, config, generation):
    text_sequence(tokenizer, config, generation, "red", [], thinking="<think>a</think><answer>b</answer>")
    with pytest.raises(PromptError, match="thinking text contains <img>"):
        text_sequence(tokenizer, config, generation, "red", [], thinking="<think>a<img></think>")


def test_other_angle_brackets_are_text(tokenizer, config, generation):
    sequence = text_sequence(tokenizer, config, generation, "a < b, <b>bold</b>, <pos_0>", [])
    assert "a < b, <b>bold</b>, <pos_0>" in parts(tokenizer, sequence)


def test_too_long_names_both_lengths_and_what_to_cut(tokenizer, config, generation):
    fits = text_sequence(tokenizer, config, generation, "ab", [PICTURE]).length
    tight = replace(generation, max_length=fits)
    text_sequence(tokenizer, config, tight, "ab", [PICTURE])
    with pytest.raises(PromptError, match=rf"needs {fits + 3} tokens, 5 of them.*allows {fits} .*by 3 tokens"):
        text_sequence(tokenizer, config, tight, "ab123", [PICTURE])


def test_the_ratio_is_not_asked_for_without_room_for_a_picture(tokenizer, config, generation):
    fits = text_sequence(tokenizer, config, generation, "ab", [], bot_task="img_ratio").length
    room = min(bucket.height * bucket.width for bucket in Buckets(64).entries) // 256
    assert room == 10
    text_sequence(tokenizer, config, replace(generation, max_length=fits + room), "ab", [], bot_task="img_ratio")
    with pytest.raises(PromptError, match=f"needs {fits + room} tokens.*allows {fits + room - 1}"):
        text_sequence(tokenizer, config, replace(generation, max_length=fits + room - 1), "ab", [], bot_task="img_ratio")


def test_twenty_thousand_tokens_are_refused_quickly(tokenizer, config, generation):
    start = time.perf_counter()
    with pytest.raises(PromptError, match="20020 tokens"):
        text_sequence(tokenizer, config, generation, "x" * 20_000, [])
    assert time.perf_counter() - start < 2
