"""Progress bars, and the errors that come while one is shown."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import ds_sparkling
from ds_sparkling import progress
from ds_sparkling.progress import progress_bar


def test_after_an_error_the_bar_stays_and_its_line_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with pytest.raises(ValueError, match="wrong"), progress_bar(range(3), desc="growing") as bar:  # noqa: PT012
        for _ in bar:
            raise ValueError("wrong")
    text = capsys.readouterr().err
    assert text.rsplit("\r", 1)[1].startswith("growing:   0%")
    assert text.endswith("\n")


def test_in_a_log_there_are_whole_lines_and_few(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1600 steps of a second each: one line in ten seconds at most, and in every fiftieth of the way."""
    clock = iter(range(10**6))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: float(next(clock)) / 2))
    with progress_bar(total=1600, initial=100, desc="training", unit="step") as bar:
        for step in range(1500):
            bar.update()
            bar.set_postfix(loss=f"{step}", refresh=False)
    lines = capsys.readouterr().err.splitlines(keepends=True)
    assert all(line.startswith("training: ") and line.endswith("\n") and "\r" not in line for line in lines)
    assert 10 <= len(lines) <= 52
    assert lines[-1].startswith("training: 100% 1600/1600 [")
    assert "loss=1499]" in lines[-1]


def test_in_a_log_a_short_bar_is_one_line_also_after_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(range(3), desc="growing") as bar:
        assert list(bar) == [0, 1, 2]
    assert capsys.readouterr().err.startswith("growing: 100% 3/3 [")
    with pytest.raises(ValueError, match="wrong"), progress_bar(range(3), desc="growing") as bar:  # noqa: PT012
        for _ in bar:
            raise ValueError("wrong")
    assert capsys.readouterr().err.startswith("growing:   0% 0/3 [")
    with progress_bar(range(3), desc="hidden", shown=False) as bar:
        assert list(bar) == [0, 1, 2]
    with progress_bar(range(3), desc="hidden", shown=None) as bar:
        assert list(bar) == [0, 1, 2]
    assert capsys.readouterr().err == ""


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
