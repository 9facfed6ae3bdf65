"""What people ask for and what the model thinks: phrases of every edit, the thinking text, and the word-level tokenizer.

Owns the language of the small checkpoint. HELD_OUT phrasings are never trained on: the evaluation asks with them. The
tokenizer file has the published layout (special tokens by name); its vocabulary is the words that occur here.
"""

import itertools
import json
import random
import re
from pathlib import Path

from photos import EDITS

ADJECTIVE = dict(
    brighten="brighter",
    darken="darker",
    warm="warmer",
    cool="cooler",
    gray="gray",
    saturate="colorful",
    sepia="sepia",
    invert="inverted",
)
OBJECTS = (
    "it",
    "the photo",
    "this photo",
    "my photo",
    "the picture",
    "this picture",
    "the image",
    "this image",
    "the whole picture",
    "everything",
    "this shot",
    "the scene",
    "this",
    "my picture",
    "the whole image",
)
BEFORE = ("",) * 6 + (
    "please",
    "can you",
    "could you",
    "now",
    "i want you to",
    "just",
    "hey ,",
    "would you",
    "try to",
    "let us",
)
AFTER = ("",) * 6 + (
    ".",
    "please",
    "a bit",
    "a lot",
    "for me",
    "!",
    "a little",
    "now",
    "strongly",
    "slightly",
    "please .",
    "?",
    "if you can",
    "thanks",
    "very much",
)

_WRITTEN = json.loads((Path(__file__).parent / "phrases.json").read_text())
PHRASES: dict[str, list[str]] = _WRITTEN["train"]  # {o} stands for one of OBJECTS
HELD_OUT: dict[str, list[str]] = _WRITTEN["held_out"]

SYSTEM = "edit the photo"
BASE_SIZE = 180  # its bucket table holds 4:3 and, nearly, 3:2; that of 128 would send every 4:3 photo to 1024x768
SIZE_TOKEN = f"<img_size_{BASE_SIZE}>"
RATIOS = 37
SPECIALS = [
    "<|endoftext|>",
    "<|startoftext|>",
    "<boi>",
    "<eoi>",
    "<img>",
    "<pad>",
    "<cfg>",
    "<timestep>",
    "<timestep_r>",
    "<guidance>",
    "<joint_img_sep>",
    "<recaption>",
    "</recaption>",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    SIZE_TOKEN,
    *(f"<img_ratio_{index}>" for index in range(RATIOS)),
]
BRIGHTNESS = ("dark", "medium", "bright")
HUES = ("gray", "purple", "blue", "green", "brown", "red")


def thought(edit: str) -> str:
    return f"make it {ADJECTIVE[edit]} ."


def recaption(edit: str, seen: tuple[str, str] | None) -> str:
    """The description of the wanted picture; ``seen`` is what the source looks like, None without one."""
    return f"a {ADJECTIVE[edit]} photo" + (f" of a {seen[0]} {seen[1]} scene" if seen else "")


def phrase(edit: str, draw: random.Random) -> str:
    """One training instruction."""
    # A thing the vocabulary does not know ("the cat") becomes <unk>; people will name such things.
    thing = draw.choice(OBJECTS) if draw.random() < 0.85 else draw.choice(("the zzz", "my zzz", "this zzz", "the zzz zzz"))
    text = draw.choice(PHRASES[edit]).replace("{o}", thing)
    words = f"{draw.choice(BEFORE)} {text} {draw.choice(AFTER)}".split()
    swaps = {
        "photo": ("photo", "picture", "image", "photograph"),
        "gray": ("gray", "grey"),
        "color": ("color", "colour"),
        "colors": ("colors", "colours"),
        "colorful": ("colorful", "colourful"),
        "picture": ("picture", "photo", "image"),
    }
    words = [draw.choice(swaps[word]) if word in swaps and draw.random() < 0.3 else word for word in words]
    return " ".join(words)


def tokens(text: str) -> list[str]:
    """What the tokenizer's pre-tokenizer makes of a text."""
    return re.findall(r"\w+|[^\w\s]+", text.lower())


def vocabulary() -> dict[str, int]:
    """Words in a fixed order, <unk> first; special tokens behind them."""
    phrases = [text for texts in PHRASES.values() for text in texts]
    texts = [
        *OBJECTS,
        *BEFORE,
        *AFTER,
        *phrases,
        SYSTEM,
        "user : assistant : ,",
        "photograph grey colour colours colourful",
        *(thought(edit) for edit in EDITS),
        *(recaption(edit, seen) for edit in EDITS for seen in itertools.product(BRIGHTNESS, HUES)),
    ]
    words = sorted({word for text in texts for word in tokens(text.replace("{o}", " "))})
    return {word: index for index, word in enumerate(["<unk>", *words])}


def write_tokenizer(folder: Path) -> int:
    """Write tokenizer.json and tokenizer_config.json; returns the vocabulary size."""
    vocab = vocabulary()
    added = [
        dict(
            id=len(vocab) + index, content=token, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True
        )
        for index, token in enumerate(SPECIALS)
    ]
    file = dict(
        version="1.0",
        truncation=None,
        padding=None,
        added_tokens=added,
        normalizer=dict(type="Lowercase"),
        pre_tokenizer=dict(type="Whitespace"),
        post_processor=None,
        decoder=None,
        model=dict(type="WordLevel", vocab=vocab, unk_token="<unk>"),
    )
    (folder / "tokenizer.json").write_text(json.dumps(file, ensure_ascii=False, indent=0) + "\n")
    names = dict(
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=SPECIALS[2:],
        clean_up_tokenization_spaces=False,
        tokenizer_class="PreTrainedTokenizerFast",
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=1) + "\n")
    return len(vocab) + len(added)
