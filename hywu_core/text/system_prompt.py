"""The system prompts that a checkpoint carries in its ``system_prompt.py``, read without running a line of it.

Owns the little evaluator (string literals, names, ``+``, lists, tuples, dicts) and the selection by name. Everything else that
the file does is ignored unless a wanted text depends on it, and then it is an error.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, RequestError
from ..json_fields import read_text

NAMES = ("None", "en_unified", "en_vanilla", "en_recaption", "en_think_recaption", "dynamic", "custom")
_UNIFIED, _TABLE = "unified_system_prompt_en", "t2i_system_prompts"
_IN_TABLE = ("en_vanilla", "en_recaption", "en_think_recaption")
# The published file has about 30 kB. "+" of names could otherwise double a text line by line.
_MAX_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class SystemPrompts:
    """The texts of one checkpoint by name, unstripped as they stand in the file."""

    texts: dict[str, str] = field(hash=False)
    where: str = "system_prompt.py"

    def select(self, name: str | None, bot_task: str = "think_recaption", custom: str | None = None) -> str | None:
        """The system prompt to use, stripped; None for none (spec section 5).

        name: one of NAMES ("dynamic" chooses by bot_task), or a text of one's own, which a space in it tells from a name.
        custom: the text for "custom", and for "dynamic" with another task.

        Raises:
            RequestError: an unknown name.
            CheckpointError: the checkpoint has no text of that name.
        """
        if name is None or name == "None":
            return None
        if name not in NAMES and len(name.split()) != 1:
            return name.strip() or None
        if name not in NAMES:
            raise RequestError(f"there is no system prompt {name!r}: choose one of {', '.join(NAMES)}")
        if name == "dynamic":
            if bot_task.startswith("think"):
                name = "en_think_recaption"
            else:
                name = {"recaption": "en_recaption", "image": "en_vanilla"}.get(bot_task, "custom")
        text = custom if name == "custom" else self._text(name)
        return (text or "").strip() or None

    def _text(self, name: str) -> str:
        if name not in self.texts:
            raise CheckpointError(
                f"{self.where} has no text for {name}, only for {', '.join(self.texts) or 'nothing'}: choose one of these, or "
                "take the system_prompt.py that was published with these weights")
        return self.texts[name]


def read_system_prompts(folder: Path) -> SystemPrompts:
    """Read ``folder/system_prompt.py`` as data.

    Raises:
        CheckpointError: the file is missing, is no Python text, or computes a wanted text in a way that needs running it.
    """
    path = Path(folder) / "system_prompt.py"
    source = read_text(path)
    if len(source) > _MAX_CHARACTERS:
        raise CheckpointError(f"{path} has {len(source)} characters, a system prompt file has at most {_MAX_CHARACTERS}")
    try:
        values = _Reader(str(path)).read(ast.parse(source, filename=str(path)))
    except (SyntaxError, ValueError) as error:
        raise CheckpointError(f"{path} is not a Python file ({error}): download it again") from None
    except (RecursionError, MemoryError):
        raise CheckpointError(f"{path} is nested deeper than Python can read: download it again") from None
    return SystemPrompts(values, str(path))


@dataclass(frozen=True)
class _Unknown:
    """A name whose value would need running the file, and the line that says so."""

    line: int


class _Reader:
    """Follows the assignments of a module from top to bottom."""

    def __init__(self, path: str):
        self.path = path
        self.names: dict[str, Any] = {}

    def read(self, module: ast.Module) -> dict[str, str]:
        for statement in module.body:
            self._statement(statement)
        texts = {}
        if _UNIFIED in self.names:
            texts["en_unified"] = self._wanted(_UNIFIED, self.names[_UNIFIED])
        table = self._known(_TABLE, self.names.get(_TABLE, {}))
        if not isinstance(table, dict):
            raise CheckpointError(f"{self.path}: {_TABLE} is a {type(table).__name__}, expected a dict of texts")
        for name in _IN_TABLE:
            if name in table:
                entry = self._known(f"{_TABLE}[{name!r}]", table[name])
                if isinstance(entry, (list, tuple)) and entry:
                    entry = entry[0]  # the published table holds lists of one text
                texts[name] = self._wanted(f"{_TABLE}[{name!r}]", entry)
        return texts

    def _wanted(self, name: str, value: Any) -> str:
        value = self._known(name, value)
        if not isinstance(value, str):
            raise CheckpointError(f"{self.path}: {name} is a {type(value).__name__}, expected a text")
        return value

    def _known(self, name: str, value: Any) -> Any:
        if isinstance(value, _Unknown):
            raise CheckpointError(
                f"{self.path}, line {value.line}: {name} is not a plain text there, and nothing of a checkpoint is executed; "
                "write the text out as a string")
        return value

    def _statement(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                self.names[name] = self._value(value)
            case ast.AnnAssign(target=ast.Name(id=name), value=value):
                if value is not None:
                    self.names[name] = self._value(value)
            case ast.Expr(value=ast.Constant()):
                pass  # a docstring
            case _:
                for name, bound in _names_touched(statement):
                    # A method can change a list or a dict (``table.update(...)``), never a string.
                    if bound or not isinstance(self.names.get(name), str):
                        self.names[name] = _Unknown(statement.lineno)

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=str()):
                return node.value
            case ast.Name(id=name):
                return self.names.get(name, _Unknown(node.lineno))
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                parts = self._value(left), self._value(right)
                if all(isinstance(part, str) for part in parts):
                    if sum(map(len, parts)) > _MAX_CHARACTERS:
                        raise CheckpointError(
                            f"{self.path}, line {node.lineno}: a text of {sum(map(len, parts))} characters, expected at most "
                            f"{_MAX_CHARACTERS}")
                    return "".join(parts)
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return [self._value(item) for item in items]
            case ast.Dict(keys=keys, values=values) if all(isinstance(key, ast.Constant) for key in keys):
                return {key.value: self._value(value) for key, value in zip(keys, values, strict=True)}
        return _Unknown(node.lineno)


def _names_touched(statement: ast.stmt) -> Iterator[tuple[str, bool]]:
    """The names that a statement may change, and whether it binds them anew (else it only calls a method of theirs)."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield statement.name, True
        return
    for node in ast.walk(statement):
        if isinstance(node, ast.alias):
            yield (node.asname or node.name).split(".")[0], True
        elif isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del)):
            yield _root(node), True
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield _root(node.func), False


def _root(node: ast.AST) -> str:
    """``x`` of ``x``, ``x[...]``, ``x.y``; "" for what hangs on no name."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Starred)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""
