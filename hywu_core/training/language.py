"""How people ask for an edit, and what the model is taught to think: phrases, thinking text, and the tokenizer file.

Owns ``phrases.json`` (English and Chinese; the held-out phrasings are never trained on) and the word-level vocabulary, which is
the words that occur here: English words, single Chinese characters, punctuation. Thinking is English whatever the instruction.
"""

import itertools
import json
import random
import re
from functools import cache
from pathlib import Path

from .edits import EDITS

SYSTEM_PROMPT = "edit the photo"
LANGUAGES = ("en", "zh")
OBJECTS = {
    "en": ("it", "the photo", "this photo", "my photo", "the picture", "this picture", "the image", "this image",
           "the whole picture", "everything", "this shot", "the scene", "this", "my picture", "the whole image"),
    "zh": ("它", "照片", "这张照片", "图片", "这张图", "这张图片", "画面", "整张图", "我的照片", "相片"),
}
# Things that the vocabulary does not know become <unk>; people will name such things ("the cat").
UNKNOWN = {"en": ("the zzz", "my zzz", "this zzz", "the zzz zzz"), "zh": ("我的〇", "这只〇", "〇〇")}
BEFORE = {
    "en": ("please", "can you", "could you", "now", "i want you to", "just", "hey ,", "would you", "try to", "let us"),
    "zh": ("请", "请帮我", "帮我", "麻烦", "能不能", "我想", "现在", "可以"),
}
AFTER = {
    "en": (".", "please", "a bit", "a lot", "for me", "!", "a little", "now", "strongly", "slightly", "please .", "?",
           "if you can", "thanks", "very much"),
    "zh": ("。", "吧", "一点", "谢谢", "！", "好吗", "一下", "？"),
}
# Some people ask twice in one sentence: "it is too dark and make it brighter".
TWICE, BETWEEN = 0.15, {"en": (" , ", " and "), "zh": ("，", "、")}
SWAPS = {
    "photo": ("photo", "picture", "image", "photograph"), "picture": ("picture", "photo", "image"),
    "gray": ("gray", "grey"), "color": ("color", "colour"), "colors": ("colors", "colours"),
    "colorful": ("colorful", "colourful"),
}
BRIGHTNESS, HUES = ("dark", "medium", "bright"), ("gray", "purple", "blue", "green", "brown", "red")
FOUND = {"blur": "blurry", "noise": "noisy", "fade": "faded", "cast": "tinted", None: "fine"}  # damage -> one word
TOKEN = re.compile(r"[\u3400-\u9fff\u3007]|[^\W\u3400-\u9fff\u3007]+|[^\w\s]")

STRUCTURE = (
    "<|endoftext|>", "<|startoftext|>", "<boi>", "<eoi>", "<img>", "<pad>", "<cfg>", "<timestep>", "<timestep_r>", "<guidance>",
    "<joint_img_sep>", "<recaption>", "</recaption>", "<think>", "</think>", "<answer>", "</answer>")
RATIOS = 37


@cache
def phrases() -> dict[str, dict[str, dict[str, list[str]]]]:
    """edit -> language -> "train" | "held_out" -> phrases; ``{o}`` stands for one of OBJECTS."""
    return json.loads((Path(__file__).parent / "phrases.json").read_text(encoding="utf-8"))


def instruction(edit: str, language: str, draw: random.Random) -> str:
    """One training instruction."""
    thing = draw.choice(OBJECTS[language] if draw.random() < 0.9 else UNKNOWN[language])
    known = phrases()[edit][language]["train"]
    text = draw.choice(known)
    if draw.random() < TWICE:
        text += draw.choice(BETWEEN[language]) + draw.choice(known)
    text = text.replace("{o}", thing)
    before = draw.choice(BEFORE[language]) if draw.random() < 0.5 else ""
    after = draw.choice(AFTER[language]) if draw.random() < 0.6 else ""
    if language == "zh":
        return before + text + after
    words = f"{before} {text} {after}".split()
    return " ".join(draw.choice(SWAPS[word]) if word in SWAPS and draw.random() < 0.3 else word for word in words)


def held_out(edit: str, language: str) -> list[str]:
    """The phrasings that evaluation asks with."""
    thing = OBJECTS[language][1]
    return [text.replace("{o}", thing) for text in phrases()[edit][language]["held_out"]]


def thinking(edit: str, seen: tuple[str, str], damage: str | None = None, other: tuple[str, str] | None = None) -> str:
    """The thinking that is taught: a thought that says what to do and what is found, then what the wanted picture shows.

    It has equally many words for all edits of one picture, so that its length gives nothing away.

    seen: brightness and hue of the source (``edits.describe``); damage: what "restore" finds; other: what picture 2 looks like.
    """
    word, place = EDITS[edit].word, f"a {seen[0]} {seen[1]} scene"
    found = FOUND[damage] if edit == "restore" else seen[0]
    if edit == "match":
        place += f" in {other[0]} {other[1]} colors"
    return f"<think>make it {word} , it is {found} .</think><recaption>a {word} photo of {place}</recaption>"


def names_edit(text: str, edit: str) -> bool:
    """Whether a thinking text names this edit, in its thought and in its description; spaces do not count."""
    thought, _, caption = text.partition("<recaption>")
    thought, caption = " ".join(thought.replace("<", " <").split()), " ".join(caption.split())
    word = EDITS[edit].word
    return f"make it {word} ," in thought and caption.startswith(f"a {word} photo")


def tokens(text: str) -> list[str]:
    """What the tokenizer makes of a text: words, single Chinese characters, punctuation marks."""
    return TOKEN.findall(text.lower())


def vocabulary() -> dict[str, int]:
    """Words in a fixed order, ``<unk>`` first."""
    seen = list(itertools.product(BRIGHTNESS, HUES))
    made = [re.sub("<[^>]*>", " ", thinking(edit, one, damage, two)) for edit in EDITS
            for one in seen for two in seen[:6] + seen[::6] for damage in FOUND]
    made += [text for edit in phrases().values() for language in edit.values() for text in language["train"]]
    for group in (OBJECTS, BEFORE, AFTER, BETWEEN):
        made += [text for texts in group.values() for text in texts]
    made += [*itertools.chain(*SWAPS.values()), SYSTEM_PROMPT, "user : assistant :"]
    words = sorted({word for text in made for word in tokens(text.replace("{o}", " "))})
    return {word: index for index, word in enumerate(["<unk>", *words])}


def write_tokenizer(folder: Path, base_size: int) -> dict[str, int]:
    """Write tokenizer.json and tokenizer_config.json; returns the ids of the special tokens, which follow the words."""
    words = vocabulary()
    specials = [*STRUCTURE, f"<img_size_{base_size}>", *(f"<img_ratio_{index}>" for index in range(RATIOS))]
    ids = {token: len(words) + index for index, token in enumerate(specials)}
    added = [dict(id=number, content=token, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
             for token, number in ids.items()]
    one_by_one = "[\u3400-\u9fff\u3007]|[^\\w\\s]"
    file = dict(
        version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=dict(type="Lowercase"),
        pre_tokenizer=dict(type="Sequence", pretokenizers=[
            dict(type="Split", pattern=dict(Regex=one_by_one), behavior="Isolated", invert=False),
            dict(type="Whitespace")]),
        post_processor=None, decoder=None, model=dict(type="WordLevel", vocab=words, unk_token="<unk>"))
    (folder / "tokenizer.json").write_text(json.dumps(file, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    names = dict(
        bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=specials[2:], clean_up_tokenization_spaces=False,
        tokenizer_class="PreTrainedTokenizerFast")
    (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=1) + "\n")
    return ids
