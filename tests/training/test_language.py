"""Phrases, vocabulary and thinking: the tokenizer file says what ``language`` says, and nothing held out is ever trained on."""

import random

import pytest
from comfyui_hywu.hywu_core.training import language
from comfyui_hywu.hywu_core.training.edits import DAMAGES, EDITS
from comfyui_hywu.hywu_core.training.language import AFTER, BEFORE, BRIGHTNESS, HUES, LANGUAGES, OBJECTS, SWAPS, UNKNOWN

DAMAGE_OF = [(edit, damage) for edit in EDITS for damage in ((*DAMAGES, None) if edit == "restore" else (None,))]


@pytest.fixture(scope="module")
def tokenizer(small_run):
    """Read from the file that ``write_tokenizer`` wrote."""
    return small_run.train.tokenizer


def phrases(edit: str, kind: str, spoken: str) -> list[str]:
    """With every object in its place, the unknown ones too."""
    things = OBJECTS[spoken] + UNKNOWN[spoken]
    return [text.replace("{o}", thing) for text in language.phrases()[edit][spoken][kind] for thing in things]


def plain(text: str) -> str:
    """Words alone, of one spelling each: what SWAPS exchanges is one word."""
    spelling = {other: word for word in ("gray", "color", "colors", "colorful", "photo") for other in SWAPS[word]}
    return " ".join(spelling.get(word, word) for word in language.tokens(text) if word not in tuple(".,!?。，！？、"))


def test_every_edit_has_phrases_of_both_kinds_in_both_languages():
    assert set(language.phrases()) == set(EDITS)
    for edit in EDITS:
        for spoken in LANGUAGES:
            for kind, least in (("train", 20), ("held_out", 5)):
                texts = language.phrases()[edit][spoken][kind]
                assert len(set(texts)) == len(texts) >= least


def test_the_tokenizer_encodes_every_phrase_as_the_vocabulary_says(tokenizer):
    words = language.vocabulary()
    assert words["<unk>"] == 0
    for edit in EDITS:
        for spoken in LANGUAGES:
            for text in phrases(edit, "train", spoken) + phrases(edit, "held_out", spoken):
                assert tokenizer.encode(text) == [words.get(word, 0) for word in language.tokens(text)], text


@pytest.mark.parametrize("text, words", (
    ("Make it BRIGHTER!", ["make", "it", "brighter", "!"]), ("把照片变亮，谢谢", list("把照片变亮，谢谢")),
    ("把photo变亮", ["把", "photo", "变", "亮"]), ("too dark , fix it.", ["too", "dark", ",", "fix", "it", "."]),
    ("gray?!", ["gray", "?", "!"]), ("photo的亮度", ["photo", "的", "亮", "度"])))
def test_how_people_type_is_encoded_alike(tokenizer, text, words):
    assert language.tokens(text) == words
    assert tokenizer.encode(text) == [language.vocabulary().get(word, 0) for word in words]
    assert 0 not in tokenizer.encode(text)


def test_what_nobody_taught_is_unknown(tokenizer):
    assert tokenizer.encode("the zzz") == [tokenizer.id("the"), 0] and tokenizer.encode("〇") == [0]


def test_specials_follow_the_words_and_stay_whole(tokenizer):
    count = len(language.vocabulary())
    assert tokenizer.id(language.STRUCTURE[0]) == count
    assert tokenizer.encode("<think>it</think>") == [tokenizer.id("<think>"), tokenizer.id("it"), tokenizer.id("</think>")]
    assert len(tokenizer.ratio_ids) == language.RATIOS and tokenizer.img_size == "<img_size_192>"


def test_no_training_instruction_is_a_held_out_phrase():
    """Nor with any object, politeness before, words after, other spelling or punctuation."""
    for spoken in LANGUAGES:
        # Politeness of which a phrase happens to begin is no help either: both sides are stripped of it.
        trained = {plain(text): edit for edit in EDITS for text in phrases(edit, "train", spoken)}
        before = [plain(text) for text in BEFORE[spoken]] + [""]
        after = [plain(text) for text in AFTER[spoken]] + [""]
        for edit in EDITS:
            for text in map(plain, phrases(edit, "held_out", spoken)):
                cores = {text.removeprefix(first).removesuffix(last).strip() for first in before for last in after}
                assert not cores & trained.keys(), text


def test_no_phrase_belongs_to_two_edits():
    seen: dict[str, str] = {}
    for edit in EDITS:
        for spoken in LANGUAGES:
            for kind in ("train", "held_out"):
                for text in phrases(edit, kind, spoken):
                    assert seen.setdefault(plain(text), edit) == edit, text


def test_every_held_out_word_is_in_the_vocabulary():
    words = language.vocabulary()
    missing = {(edit, word) for edit in EDITS for spoken in LANGUAGES for text in language.held_out(edit, spoken)
               for word in language.tokens(text) if word not in words}
    assert missing == set()


def test_instructions_are_trained_phrases_with_something_around_them():
    draw = random.Random(0)
    for spoken in LANGUAGES:
        for edit in EDITS:
            trained = [plain(text) for text in phrases(edit, "train", spoken)]
            for _ in range(20):
                text = language.instruction(edit, spoken, draw)
                assert "{" not in text and any(each in plain(text) for each in trained), text
    assert language.instruction("gray", "en", random.Random(3)) == language.instruction("gray", "en", random.Random(3))


def test_words_of_edits_are_their_own():
    assert len({edit.word for edit in EDITS.values()}) == len(EDITS)


@pytest.mark.parametrize("edit, damage", DAMAGE_OF)
def test_names_edit_takes_the_edits_own_thinking_only(tokenizer, edit, damage):
    for brightness in BRIGHTNESS:
        for hue in HUES:
            thought = language.thinking(edit, (brightness, hue), damage, ("dark", "blue"))
            read = tokenizer.decode(tokenizer.encode(thought))
            assert "".join(read.split()) == "".join(thought.split())
            for text in (thought, read):
                assert [name for name in EDITS if language.names_edit(text, name)] == [edit]


def test_thinking_says_what_was_found():
    assert "it is dark ." in language.thinking("expose", ("dark", "gray"))
    found = [language.thinking("restore", ("dark", "gray"), damage) for damage in (*DAMAGES, None)]
    assert "it is noisy ." in found[DAMAGES.index("noise")] and len(set(found)) == len(found)
    assert language.thinking("match", ("dark", "gray"), None, ("bright", "red")).endswith("in bright red colors</recaption>")


@pytest.mark.parametrize("text", (
    "", "<think>make it brighter , it is dark .</think>", "<recaption>a brighter photo of it</recaption>",
    "<think>make it brighter , it is dark .</think><recaption>a darker photo of it</recaption>"))
def test_half_a_thinking_names_nothing(text):
    assert not any(language.names_edit(text, edit) for edit in EDITS)


def test_thinking_has_known_words_only_and_equally_many_for_all_edits_of_one_picture(tokenizer):
    looks, lengths = [(brightness, hue) for brightness in BRIGHTNESS for hue in HUES], {1: set(), 2: set()}
    for edit, damage in DAMAGE_OF:
        for one in looks:
            for two in looks if edit == "match" else looks[:1]:
                ids = tokenizer.encode(language.thinking(edit, one, damage, two))
                assert 0 not in ids
                lengths[EDITS[edit].pictures].add(len(ids))
    assert [len(found) for found in lengths.values()] == [1, 1]
