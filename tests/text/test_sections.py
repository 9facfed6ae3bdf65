"""Thinking text and whole conversations as sections, in both templates."""

import time
from types import SimpleNamespace

import pytest
from comfyui_hywu.hywu_core.text.sections import (
    TEMPLATES,
    CanvasSection,
    PictureSection,
    TextSection,
    image_turns,
    text_turns,
    thinking_sections,
)
from comfyui_hywu.hywu_core.vision.buckets import Bucket

INSTRUCT, PLAIN = TEMPLATES["instruct"], TEMPLATES["pretrain"]
PICTURE = SimpleNamespace(bucket=Bucket(16, 64, 64), grid=(2, 3))
BUCKET = Bucket(3, 48, 80)


def texts(sections):
    return [section.text if isinstance(section, TextSection) else type(section).__name__ for section in sections]


def content(sections):
    return [section.text for section in sections if isinstance(section, TextSection) and section.content]


@pytest.mark.parametrize(("thinking", "drop", "expected"), [
    ("<think>a</think><recaption>b</recaption>", False, ["<think>", "a", "</think>", "<recaption>", "b", "</recaption>"]),
    ("<think>a</think><recaption>b</recaption>", True, ["<recaption>", "b", "</recaption>"]),
    ("<recaption>b</recaption><think>a</think>", False, ["<recaption>", "b", "</recaption>", "<think>", "a", "</think>"]),
    ("x<think>a</think>y<recaption>b</recaption>z", False,
     ["x", "<think>", "a", "</think>", "y", "<recaption>", "b", "</recaption>", "z"]),
    ("x<think>a</think>y", True, ["x", "y"]),
    ("<think>a</think><think>b</think>", False, ["<think>", "a", "</think>", "<think>", "b", "</think>"]),
    ("<think>a<recaption>b</think>c</recaption>", False, ["<think>", "a<recaption>b", "</think>", "c</recaption>"]),
    ("<think></think>", False, ["<think>", "", "</think>"]),
    ("<recaption>b</recaption><think>open", False, ["<recaption>", "b", "</recaption>", "<think>open"]),
    ("no tags", False, ["<answer>no tags</answer>"]),
    ("<think>open", True, ["<answer><think>open</answer>"]),
    ("</think>wrong way<think>", False, ["<answer></think>wrong way<think></answer>"]),
])
def test_thinking_falls_into_sections(thinking, drop, expected):
    got = texts(thinking_sections(INSTRUCT, thinking, drop))
    # Where two texts meet, an empty one may stand between: it has no tokens.
    assert [text for text in got if text] == [text for text in expected if text]


def test_tags_stay_in_the_unconditional_row_and_their_text_does_not():
    sections = thinking_sections(INSTRUCT, "x<think>a</think><recaption>b</recaption>z", False)
    assert [text for text in content(sections) if text] == ["x", "a", "b", "z"]
    assert content(thinking_sections(INSTRUCT, "no tags", False)) == ["<answer>no tags</answer>"]


def test_the_plain_template_answers_without_tags():
    assert texts(thinking_sections(PLAIN, "no tags", False)) == ["no tags"]


def test_many_unclosed_and_closed_tags_take_no_time():
    start = time.perf_counter()
    thinking_sections(INSTRUCT, "<think>" * 50_000, False)
    assert len(thinking_sections(INSTRUCT, "<think>a</think>" * 5_000, False)) >= 15_000
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(("task", "opening"), [
    ("think", ["Assistant: <think>"]),
    ("recaption", ["Assistant: <recaption>"]),
    ("img_ratio", ["Assistant: <answer><boi><img_size_64>"]),
    ("auto", ["Assistant: "]),
    ("image", []),
])
def test_how_the_answer_opens(task, opening):
    sections = text_turns(INSTRUCT, task, "<img_size_64>", "do it", [PICTURE, PICTURE], "", "be kind", False)
    assert texts(sections) == ["be kind", "\n\n", "User: ", "PictureSection", "PictureSection", "do it", "\n\n", *opening]
    assert [section.index for section in sections if isinstance(section, PictureSection)] == [0, 1]
    assert content(sections) == ["do it"]


@pytest.mark.parametrize(("task", "opening"), [
    ("think", ["<think>"]), ("img_ratio", ["<boi><img_size_64>"]), ("auto", [])])
def test_the_plain_template_puts_nothing_around(task, opening):
    sections = text_turns(PLAIN, task, "<img_size_64>", "do it", [PICTURE], "", "be kind", False)
    assert texts(sections) == ["be kind", "PictureSection", "do it", *opening]


def test_after_thinking_the_turn_stays_open():
    sections = text_turns(INSTRUCT, "img_ratio", "<img_size_64>", "do it", [], "<recaption>b</recaption>", None, False)
    assert texts(sections) == [
        "User: ", "do it", "\n\n", "Assistant: ", "<recaption>", "b", "</recaption>", "<answer><boi><img_size_64>"]


def test_a_picture_answer_shares_the_turn_with_the_thinking():
    sections = image_turns(INSTRUCT, "do it", [PICTURE], BUCKET, "<think>a</think>", None, False)
    assert texts(sections) == [
        "User: ", "PictureSection", "do it", "\n\n", "Assistant: ", "<think>", "a", "</think>", "<answer>", "CanvasSection",
        "</answer>", "\n\n"]
    assert CanvasSection(BUCKET) in sections
    plain = image_turns(PLAIN, "do it", [], BUCKET, "", None, False)
    assert texts(plain) == ["do it", "CanvasSection"]
