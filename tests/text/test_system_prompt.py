"""System prompts from a file that is never run: what can be read, what is refused, and the choice by name."""

import pytest
from comfyui_hywu.hywu_core.errors import CheckpointError, RequestError
from comfyui_hywu.hywu_core.text.system_prompt import read_system_prompts

PUBLISHED = '''
"""The shape of the published file: named texts, a table of lists, and a function that nobody calls."""
from somewhere import anything

t2i_system_prompt_en_vanilla = """
Paint.
"""
t2i_system_prompt_en_recaption = "\\nRewrite" " it.\\n"
HEAD: str = "Think, "
t2i_system_prompts = {
    "en_vanilla": [t2i_system_prompt_en_vanilla],
    "en_recaption": (t2i_system_prompt_en_recaption,),
    "en_think_recaption": HEAD + "then " + "rewrite. ",
    "other": [anything(1)],
}
unified_system_prompt_en = ' Unified. \\n'


def get_system_prompt(kind):
    global unified_system_prompt_en
    unified_system_prompt_en = "never"
    return t2i_system_prompts[kind][0]


if anything:
    print(get_system_prompt("en_vanilla"), unified_system_prompt_en.strip())
'''


def read(folder, source: str):
    (folder / "system_prompt.py").write_text(source, encoding="utf-8")
    return read_system_prompts(folder)


def test_the_published_shape_is_read_as_it_stands(tmp_path):
    assert read(tmp_path, PUBLISHED).texts == {
        "en_unified": " Unified. \n",
        "en_vanilla": "\nPaint.\n",
        "en_recaption": "\nRewrite it.\n",
        "en_think_recaption": "Think, then rewrite. ",
    }


@pytest.mark.parametrize(("name", "task", "text"), [
    ("en_unified", "think_recaption", "Unified."),
    ("en_vanilla", "think_recaption", "Paint."),
    ("None", "think_recaption", None),
    (None, "think_recaption", None),
    ("custom", "think_recaption", "be kind"),
    ("dynamic", "think_recaption", "Think, then rewrite."),
    ("dynamic", "think", "Think, then rewrite."),
    ("dynamic", "recaption", "Rewrite it."),
    ("dynamic", "image", "Paint."),
    ("dynamic", "img_ratio", "be kind"),
])
def test_selection(tmp_path, name, task, text):
    assert read(tmp_path, PUBLISHED).select(name, task, custom="  be kind\n") == text


@pytest.mark.parametrize("custom", [None, "", " \n"])
def test_an_empty_text_means_no_system_turn(tmp_path, custom):
    assert read(tmp_path, PUBLISHED).select("custom", custom=custom) is None


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(RequestError, match="'en_fancy'.*en_unified"):
        read(tmp_path, PUBLISHED).select("en_fancy")


def test_a_text_of_ones_own_is_told_from_a_name_by_its_spaces(tmp_path):
    assert read(tmp_path, PUBLISHED).select(" Be brief.\n") == "Be brief."
    assert read(tmp_path, PUBLISHED).select("") is None


def test_a_text_that_the_file_lacks_is_an_error_only_when_wanted(tmp_path):
    prompts = read(tmp_path, "unified_system_prompt_en = 'only this'")
    assert prompts.select("en_unified") == "only this"
    with pytest.raises(CheckpointError, match="no text for en_recaption, only for en_unified"):
        prompts.select("en_recaption")


@pytest.mark.parametrize(("line", "source"), [
    (1, "unified_system_prompt_en = open('secret').read()"),
    (1, "unified_system_prompt_en = f'{1 + 1}'"),
    (1, "unified_system_prompt_en = 'a' * 3"),
    (2, "a = 'x'\nunified_system_prompt_en = a.strip()"),
    (1, "unified_system_prompt_en = unknown_name"),
    (2, "unified_system_prompt_en = 'x'\nunified_system_prompt_en += 'y'"),
    (3, "unified_system_prompt_en = 'x'\n\nif True:\n    unified_system_prompt_en = 'y'"),
    (2, "unified_system_prompt_en = 'x'\ndef unified_system_prompt_en(): pass"),
    (1, "from evil import unified_system_prompt_en"),
    (2, "t2i_system_prompts = {'en_vanilla': ['x']}\nt2i_system_prompts['en_vanilla'] = ['y']"),
    (2, "t2i_system_prompts = {'en_vanilla': ['x']}\nt2i_system_prompts.update(en_vanilla=['y'])"),
    (1, "t2i_system_prompts = {'en_vanilla': [print('x')]}"),
    (1, "t2i_system_prompts = {**{}, 'en_vanilla': ['x']}"),
    (1, "a, unified_system_prompt_en = 'x', 'y'"),
])
def test_what_would_need_running_is_refused_with_its_line(tmp_path, line, source):
    with pytest.raises(CheckpointError, match=rf"system_prompt.py, line {line}: .*nothing of a checkpoint is executed"):
        read(tmp_path, source)


def test_nothing_runs_while_reading(tmp_path):
    mark = tmp_path / "ran"
    prompts = read(tmp_path, f"open({str(mark)!r}, 'w').close()\nunified_system_prompt_en = 'x'")
    assert prompts.select("en_unified") == "x" and not mark.exists()


@pytest.mark.parametrize(("source", "what"), [
    ("unified_system_prompt_en = 7", "line 1"),
    ("unified_system_prompt_en = ['x']", "is a list, expected a text"),
    ("t2i_system_prompts = 'x'", "is a str, expected a dict"),
    ("this is no python", "is not a Python file"),
    ("a = '\0'", "is not a Python file"),
    ("x = " + "(" * 5000 + ")" * 5000, "system_prompt.py"),
    ("x = " + "-" * 100_000 + "1", "system_prompt.py"),
    ("unified_system_prompt_en = 'x'" + " + 'x'" * 50_000, "system_prompt.py"),
    ("#" * 1_000_001, "1000001 characters"),
])
def test_other_contents_are_refused(tmp_path, source, what):
    with pytest.raises(CheckpointError, match=what):
        read(tmp_path, source)


def test_doubling_names_cannot_fill_the_memory(tmp_path):
    lines = ["a0 = 'x' + 'x'"] + [f"a{n} = a{n - 1} + a{n - 1}" for n in range(1, 60)]
    with pytest.raises(CheckpointError, match="line 20: a text of 1048576 characters"):
        read(tmp_path, "\n".join(lines))


def test_a_missing_file_is_named_with_its_path(tmp_path):
    with pytest.raises(CheckpointError, match="system_prompt.py is missing"):
        read_system_prompts(tmp_path)
