"""Constructors with more than five arguments take them by name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import ds_sparkling

ROOM = Path(ds_sparkling.__file__).parent / "engine"
MOST = 5


def positional(found: ast.ClassDef) -> int:
    """How many arguments the constructor of a class takes by position, ``self`` not counted."""
    for member in found.body:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            return len(member.args.posonlyargs) + len(member.args.args) - 1
    decorators = " ".join(map(ast.unparse, found.decorator_list))
    if "dataclass" not in decorators or "kw_only=True" in decorators:
        return 0
    fields = [member for member in found.body if isinstance(member, ast.AnnAssign)]
    return sum("ClassVar" not in ast.unparse(member.annotation) for member in fields)


@pytest.mark.parametrize("path", sorted(ROOM.rglob("*.py")), ids=lambda path: path.relative_to(ROOM).as_posix())
def test_many_arguments_are_named(path: Path) -> None:
    classes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
    assert not [found.name for found in classes if positional(found) > MOST]


def test_positional_arguments_are_counted() -> None:
    (counted,) = ast.parse("@dataclass(frozen=True)\nclass A:\n    a: int\n    b: int = 1").body
    assert isinstance(counted, ast.ClassDef)
    assert positional(counted) == 2
    (counted,) = ast.parse("class A:\n    def __init__(self, a, b, *, c): ...").body
    assert isinstance(counted, ast.ClassDef)
    assert positional(counted) == 2
