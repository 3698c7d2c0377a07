"""The list of faults that tests have to notice: it fits the package as it is, and says what isn't noticed."""

from __future__ import annotations

import ast
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from broken_lines import BROKEN_LINES, ROOT, BrokenLine


def test_there_are_some_in_every_room() -> None:
    assert len(BROKEN_LINES) >= 30
    assert len(set(BROKEN_LINES)) == len(BROKEN_LINES)
    rooms = {line.file.partition("/")[0] for line in BROKEN_LINES}
    tested = {path.name for path in (ROOT / "ds_sparkling").iterdir() if (ROOT / "tests" / path.name).is_dir()}
    assert tested - rooms <= {"__pycache__", "examples", "integrations", "job", "models", "tools"}


@pytest.mark.parametrize("line", BROKEN_LINES, ids=lambda line: f"{line.file}: {line.new.strip()}")
def test_each_is_there_once_and_can_be_broken(line: BrokenLine) -> None:
    broken = line.broken()
    ast.parse(broken)
    assert broken != (ROOT / line.path).read_text()
    files = [word for word in shlex.split(line.tests) if word.startswith("tests/")]
    assert files
    assert all((ROOT / file).exists() for file in files)


def test_a_line_that_has_changed_is_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match=r"units\.py has 'no such text' 0 times, expected once"):
        BrokenLine("growth/units.py", "no such text", "", "tests/growth").broken()


#: A package of one line, which is broken, and what checks it.
_TOOL = """
import sys
from pathlib import Path
import broken_lines
broken_lines.ROOT = Path(sys.argv[1])
broken_lines._COPIED = ("ds_sparkling", "test_sums.py", "pyproject.toml")
broken_lines.BROKEN_LINES = (broken_lines.BrokenLine("sums.py", "12", "13", "test_sums.py"),)
sys.exit(broken_lines.main([]))
"""


@pytest.mark.parametrize(("checked", "says", "status"), [("ANSWER == 12", "caught", 0), ("ANSWER > 0", "MISSED", 1)])
def test_what_no_test_notices_is_said(checked: str, says: str, status: int, tmp_path: Path) -> None:
    (tmp_path / "ds_sparkling").mkdir()
    (tmp_path / "ds_sparkling/__init__.py").touch()
    (tmp_path / "ds_sparkling/sums.py").write_text("ANSWER = 12\n")
    test = f"from ds_sparkling.sums import ANSWER\n\ndef test_it():\n    assert {checked}\n"
    (tmp_path / "test_sums.py").write_text(test)
    (tmp_path / "pyproject.toml").write_text("")
    command = [sys.executable, "-c", _TOOL, str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT / "tools")}
    )
    assert done.returncode == status, done.stderr
    assert f"{says}: ds_sparkling/sums.py" in done.stdout
