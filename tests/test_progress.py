"""Progress bars, and the errors that come while one is shown."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import ds_sparkling
from ds_sparkling.progress import progress_bar


def test_after_an_error_the_bar_stays_and_its_line_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="wrong"), progress_bar(range(3), desc="growing") as bar:  # noqa: PT012
        for _ in bar:
            raise ValueError("wrong")
    text = capsys.readouterr().err
    assert text.rsplit("\r", 1)[1].startswith("growing:   0%")
    assert text.endswith("\n")


def test_in_a_log_every_bar_ends_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(range(3), desc="growing") as bar:
        assert list(bar) == [0, 1, 2]
    assert capsys.readouterr().err.endswith("\n")


def test_on_a_terminal_nothing_is_left_without_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar(range(3), desc="growing") as bar:
        assert list(bar) == [0, 1, 2]
    with progress_bar(range(3), desc="hidden", shown=False) as bar:
        assert list(bar) == [0, 1, 2]
    text = capsys.readouterr().err
    assert "\n" not in text
    assert not text.rsplit("\r", 2)[1].strip()
    assert "hidden" not in text


def test_no_other_bars_are_made() -> None:
    calls = []
    for path in Path(ds_sparkling.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "tqdm":
                calls.append(path.name)
    assert not calls
