"""What takes more than five values takes them by name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ds_sparkling"
MOST = 5
FILES = sorted(PACKAGE.rglob("*.py"))


def given(call: ast.expr | None, keyword: str) -> object:
    """A constant that a call is given by keyword; None if it isn't one, or is given nothing of that name."""
    for argument in call.keywords if isinstance(call, ast.Call) else ():
        if argument.arg == keyword and isinstance(argument.value, ast.Constant):
            return argument.value.value
    return None


def positional(cls: ast.ClassDef) -> int:
    """How many values the constructor of a class takes without their names."""
    for member in cls.body:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            return len(member.args.posonlyargs) + len(member.args.args) - 1
    for decorator in cls.decorator_list:
        name = ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator).rpartition(".")[2]
        if name in ("dataclass", "checked") and not given(decorator, "kw_only"):
            return sum(1 for _ in fields(cls))
    return 0


def fields(cls: ast.ClassDef) -> Iterator[str]:
    for member in cls.body:
        if not isinstance(member, ast.AnnAssign) or not isinstance(member.target, ast.Name):
            continue
        kind = ast.unparse(member.annotation)
        if kind == "KW_ONLY":
            return
        named = given(member.value, "kw_only") or given(member.value, "init") is False
        if not kind.startswith("ClassVar") and not named:
            yield member.target.id


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_more_than_five_values_are_given_by_name(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            assert positional(node) <= MOST, f"{node.name} takes {positional(node)}: make it kw_only"


def test_the_scan_counts() -> None:
    text = """
@dataclass(frozen=True)
class Fields:
    a: int
    b: ClassVar[int] = 1
    c: int = field(default=0, init=False)
    d: int = Field(default=0, kw_only=True)
    e: int = 0
class Written:
    def __init__(self, a, b, /, c, *, d): ...
@checked(kw_only=True)
class Named:
    a: int
"""
    classes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)]
    assert [positional(cls) for cls in classes] == [2, 3, 0]
