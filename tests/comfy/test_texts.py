"""The texts of the nodes in English and Chinese: help pages, names and tooltips, the words of the panels. None may be missing,
and the English ones may not say anything else than the nodes."""

import json
import re
import urllib.error
from collections.abc import Iterator

import pytest
from comfyui_hywu.tests.comfy.graphs import ROOT
from comfyui_hywu.tests.comfy.server import PACK
from comfyui_hywu.tests.comfy.test_nodes import NODES
from comfyui_hywu.tests.comfy.texts import english, stored

WEB = ROOT / "nodes" / "web"
CHINESE = re.compile(r"[\u4e00-\u9fff]")
BARE = re.compile(r"(LoRA|VAE|Latent|Top-[KP])( [AB\d])?")  # names that Chinese users write so, too
SPECIAL = re.compile(r"[{}|@]")  # the front end's message format (vue-i18n) reads these as its own
ENTRY = re.compile(r'^  (\w+): \[\s*("(?:[^"\\]|\\.)*"),\s*("(?:[^"\\]|\\.)*"),?\s*\],$', re.MULTILINE)


def leaves(texts: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every text with its keys; an empty dictionary counts as a text, so that it is not overlooked."""
    for key, value in texts.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


# ---- names and tooltips


def test_the_english_texts_are_the_nodes_own(server):
    # If not: `python -m comfyui_hywu.tests.comfy.texts` writes the English file; the Chinese one then needs the same by hand.
    found = english(server.get("/object_info"))
    assert set(found) == set(NODES)
    assert stored("en") == found


def test_the_chinese_texts_have_the_same_keys_and_are_chinese():
    english_texts, chinese_texts = dict(leaves(stored("en"))), dict(leaves(stored("zh")))
    assert list(chinese_texts) == list(english_texts)
    for path, text in chinese_texts.items():
        if text != {}:
            assert CHINESE.search(text) or path[-1] == "name" and BARE.fullmatch(text), (path, text)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_text_holds_what_the_front_end_would_read_as_its_own(language):
    assert not [(path, text) for path, text in leaves(stored(language)) if text != {} and SPECIAL.search(text)]


def test_chinese_texts_keep_the_words_that_are_no_language():
    # File names, choices of a list and numbers are the same in any language.
    kept = re.compile(r"[\w./-]*\.(?:json|py|yaml|safetensors)|\w+/hywu\w*|\b(?:bf16|fp8|int8|int4|bfloat16|float32)\b|\d+ GB",
                      re.ASCII)
    chinese_texts = dict(leaves(stored("zh")))
    for path, text in leaves(stored("en")):
        if text != {}:
            assert set(kept.findall(text)) == set(kept.findall(chinese_texts[path])), path


def test_names_are_told_apart_within_a_node():
    for language in ("en", "zh"):
        for node, texts in stored(language).items():
            for side in ("inputs", "outputs"):
                names = [entry["name"] for entry in texts[side].values()]
                assert len(set(names)) == len(names), (language, node, names)
        titles = [texts["display_name"] for texts in stored(language).values()]
        assert len(set(titles)) == len(titles)


def test_comfyui_serves_both_languages(server):
    served = server.get("/i18n")
    for language in ("en", "zh"):
        assert {name: served[language]["nodeDefs"][name] for name in NODES} == stored(language)


# ---- help pages


@pytest.mark.parametrize("node", NODES)
def test_the_chinese_page_explains_every_input_under_both_its_names(server, node):
    # The front end asks for this first, and for NODE.md where it gets a 404.
    page = server.get(f"/extensions/{PACK}/docs/{node}/zh.md").decode()
    one, two = stored("en")[node], stored("zh")[node]
    title = page.splitlines()[0]
    assert title.startswith(f"# {one['display_name']}（") and len(CHINESE.findall(page)) > 100
    assert two["display_name"].removeprefix("HY-WU ").removesuffix("（PEFT）") in title
    names = [(entry["name"], two[side][key]["name"]) for side in ("inputs", "outputs") for key, entry in one[side].items()]
    for name, label in names:
        assert f"`{name}`" in page or re.search(rf"`{name[:-1]}\d`", page), f"{node}: {name} is not explained"
        assert label.rstrip(" 123456789") in page, f"{node}: {name} is called {label} on the node"


def test_without_a_page_of_its_own_a_language_gets_the_english_one(server):
    with pytest.raises(urllib.error.HTTPError, match="404"):
        server.get(f"/extensions/{PACK}/docs/HYWUSaveLoRA/fr.md")
    assert server.get(f"/extensions/{PACK}/docs/HYWUSaveLoRA.md").decode().startswith("# HY-WU Save LoRA\n")


def test_both_pages_have_the_same_form():
    pages = sorted(WEB.glob("docs/*.md"))
    assert [page.stem for page in pages] == sorted(NODES) == sorted(page.parent.name for page in WEB.glob("docs/*/zh.md"))
    for page in pages:
        one, two = page.read_text(encoding="utf-8"), (page.parent / page.stem / "zh.md").read_text(encoding="utf-8")
        for mark in ("\n#", "\n- ", "\n|", "\n```", "`hywu "):
            assert one.count(mark) == two.count(mark), (page.name, mark)
        # A line break inside a paragraph is shown as a blank, which Chinese has not.
        assert not re.search(r"[\u3000-\u9fff\uff00-\uffef]\n[^\n#|`-]", two), page.name


# ---- words of the panels


@pytest.mark.parametrize("script", ["inspect.js", "generate_only.js"])
def test_every_word_of_a_panel_is_there_in_both_languages(script):
    code = (WEB / script).read_text(encoding="utf-8")
    table = code[code.index("const text = words({"):]
    table = table[:table.index("\n});")] + "\n"
    words = {key: (json.loads(one), json.loads(two)) for key, one, two in ENTRY.findall(table)}
    assert set(words) == set(re.findall(r"^  (\w+): \[", table, re.MULTILINE))
    for key, (one, two) in words.items():
        assert CHINESE.search(two) and not CHINESE.search(one), key
        assert sorted(re.findall(r"\{\d\}", one)) == sorted(re.findall(r"\{\d\}", two)), key
    used = set(re.findall(r'text\(\s*"(\w+)"', code)) | set(re.findall(r'text\(\w+ \? "(\w+)" : "\w+"', code)) | set(
        re.findall(r'text\(\w+ \? "\w+" : "(\w+)"', code))
    assert used == set(words)
