"""A conversation as a list of sections: which texts and pictures follow each other (spec section 5).

Each section is tokenised on its own later, so where one ends is part of the format. Owns the two templates and how thinking
text falls into sections; knows neither token ids nor positions (``template.py`` lays sections out).
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Protocol

from ..vision.buckets import Bucket
from .tokenizer import ANSWER, BOI, END_ANSWER, END_RECAPTION, END_THINK, RECAPTION, THINK


class Picture(Protocol):
    """What a sequence needs to know of a source picture: its VAE bucket and its grid of vision patches (rows, cols)."""

    bucket: Bucket
    grid: tuple[int, int]


@dataclass(frozen=True)
class TextSection:
    """One piece of text. ``content`` marks what the unconditional row does not get to see: instruction and thinking."""

    text: str
    content: bool = False


@dataclass(frozen=True)
class PictureSection:
    """The source picture number ``index``: latent tokens and vision tokens."""

    index: int
    bucket: Bucket
    grid: tuple[int, int]


@dataclass(frozen=True)
class CanvasSection:
    """The picture to be painted."""

    bucket: Bucket


Section = TextSection | PictureSection | CanvasSection


@dataclass(frozen=True)
class Template:
    """What a template puts around the turns; the plain one puts nothing anywhere."""

    user: str = ""
    assistant: str = ""
    separator: str = ""
    answer: str = ""
    end_answer: str = ""


TEMPLATES = {
    "instruct": Template("User: ", "Assistant: ", "\n\n", ANSWER, END_ANSWER),
    "pretrain": Template(),
}

# Think pairs are looked for first: a recaption tag inside of one is part of the thought.
_PAIRS = ((THINK, END_THINK), (RECAPTION, END_RECAPTION))


def text_turns(template: Template, task: str, img_size: str, prompt: str, pictures: Many[Picture], thinking: str,
               system_prompt: str | None, drop_think: bool) -> list[Section]:
    """The sections of a prompt that the backbone continues with text.

    task: "think" | "recaption" | "img_ratio" | "auto" | "image"; it decides the opening words of the answer. img_size: the
    token that names the base size. thinking: "" for none, else the assistant's turn so far.
    """
    sections = _system_and_user(template, prompt, pictures, system_prompt)
    prefix = template.assistant
    if thinking:
        sections += [TextSection(template.assistant), *thinking_sections(template, thinking, drop_think)]
        prefix = ""  # the assistant's turn is already open, and stays open: its separator is left out
    opening = {
        "auto": prefix,
        "think": prefix + THINK,
        "recaption": prefix + RECAPTION,
        "img_ratio": prefix + template.answer + BOI + img_size,
        "image": "",
    }
    sections.append(TextSection(opening[task]))
    return _without_empty(sections)


def image_turns(template: Template, prompt: str, pictures: Many[Picture], bucket: Bucket, thinking: str,
                system_prompt: str | None, drop_think: bool) -> list[Section]:
    """The sections of a sequence whose answer is a picture of the size ``bucket``."""
    return _without_empty([
        *_system_and_user(template, prompt, pictures, system_prompt),
        TextSection(template.assistant),
        *(thinking_sections(template, thinking, drop_think) if thinking else ()),
        TextSection(template.answer),
        CanvasSection(bucket),
        TextSection(template.end_answer),
        TextSection(template.separator),
    ])


def thinking_sections(template: Template, thinking: str, drop_think: bool) -> list[TextSection]:
    """Thinking text as sections: tags apart from what they hold; text without any complete pair is one answer."""
    if not any(_find_pair(thinking, *pair) for pair in _PAIRS):
        return [TextSection(template.answer + thinking + template.end_answer, content=True)]
    return _split(thinking, _PAIRS, drop_think)


def _find_pair(text: str, opening: str, closing: str) -> tuple[str, str, str] | None:
    """Text before the first complete pair, inside it, and after it; None if no pair is complete."""
    before, found, rest = text.partition(opening)
    inner, closed, after = rest.partition(closing)
    return (before, inner, after) if found and closed else None


def _split(text: str, pairs: tuple[tuple[str, str], ...], drop_think: bool) -> list[TextSection]:
    if not pairs:
        return [TextSection(text, content=True)]
    (opening, closing), others = pairs[0], pairs[1:]
    sections: list[TextSection] = []
    while found := _find_pair(text, opening, closing):
        before, inner, text = found
        sections += _split(before, others, drop_think)
        if not (opening == THINK and drop_think):
            sections += [TextSection(opening), TextSection(inner, content=True), TextSection(closing)]
    return sections + _split(text, others, drop_think)


def _system_and_user(template: Template, prompt: str, pictures: Many[Picture], system_prompt: str | None) -> list[Section]:
    sections: list[Section] = []
    if system_prompt:
        sections += [TextSection(system_prompt), TextSection(template.separator)]
    sections.append(TextSection(template.user))
    sections += [PictureSection(index, picture.bucket, picture.grid) for index, picture in enumerate(pictures)]
    return [*sections, TextSection(prompt, content=True), TextSection(template.separator)]


def _without_empty(sections: list[Section]) -> list[Section]:
    return [section for section in sections if not (isinstance(section, TextSection) and not section.text)]
