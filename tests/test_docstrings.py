"""Docstrings hold what they promise: modules say in a sentence what they do, public functions say everything."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ds_sparkling

PACKAGE = Path(ds_sparkling.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
#: Openings of fragments: of questions that nobody asks, and of gerunds. Some nouns look like these.
FRAGMENT = re.compile(r"(What|Which|Whether|How|Where|When|Why|(?!Learning|Training|Everything|Nothing)[A-Z]\w+ing)\b")
SECTIONS = ("Args", "Returns", "Yields", "Raises", "Attributes")


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    """The functions of a file that have a docstring of more than one line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and "\n" in (ast.get_docstring(node) or ""):
            yield node


def sections(docstring: str) -> dict[str, list[str]]:
    """The entries of every section: what stands before a colon."""
    found: dict[str, list[str]] = {}
    entries: list[str] = []
    for line in inspect.cleandoc(docstring).splitlines():
        if line.rstrip(":") in SECTIONS and line.endswith(":"):
            entries = found.setdefault(line.rstrip(":"), [])
        elif entries is not None and re.match(r"    \S", line):
            entries.append(line.strip().partition(":")[0])
        elif line and not line.startswith(" "):
            entries = []
    return found


def arguments(function: ast.FunctionDef) -> set[str]:
    given = function.args
    stars = {f"*{given.vararg.arg}"} if given.vararg else set()
    stars |= {f"**{given.kwarg.arg}"} if given.kwarg else set()
    return {arg.arg for arg in (*given.posonlyargs, *given.args, *given.kwonlyargs)} | stars


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_says_in_a_sentence_what_it_does(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    if docstring is None:
        assert path.read_text() == ""
        return
    summary = docstring.partition("\n\n")[0]
    assert re.match(r"[A-Z`]|bf16|fp16", summary)
    assert summary.endswith(".")
    assert not FRAGMENT.match(summary), summary
    assert len(summary.split()) >= 3


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_is_documented_of_arguments_is_one(path: Path) -> None:
    for function in functions(path):
        for entry in sections(ast.get_docstring(function) or "").get("Args", []):
            named = {name.strip() for name in entry.split(",")}
            assert named <= arguments(function), f"{function.name}, line {function.lineno}: {entry}"


def public() -> dict[str, Any]:
    from ds_sparkling.integrations.accelerate import growing
    from ds_sparkling.integrations.trainer import SparklingCallback

    exported = {name: getattr(ds_sparkling, name) for name in ds_sparkling.__all__}
    return {**exported, "growing": growing, "SparklingCallback": SparklingCallback}


def test_public_functions_say_everything() -> None:
    for name, value in public().items():
        docstring = inspect.getdoc(value)
        assert docstring, name
        found = sections(docstring)
        if inspect.isclass(value):
            told_apart = value.__module__.startswith("ds_sparkling.spec") or issubclass(value, Exception)
            own = {} if told_apart else inspect.signature(value).parameters  # what is in the JSON is said key by key
            assert set(own) <= {*found.get("Args", []), *found.get("Attributes", [])}, name
            continue
        function = inspect.unwrap(value)
        parameters = inspect.signature(function).parameters.values()
        assert [str(each.replace(annotation=each.empty, default=each.empty)) for each in parameters] == found.get(
            "Args", []
        ), name
        assert found.get("Returns") or inspect.signature(function).return_annotation in (None, "None"), name
        raised = re.findall(r"^\s+raise (\w+)\(", inspect.getsource(function), re.MULTILINE)
        assert set(raised) <= set(found.get("Raises", [])), name
