"""The ``ds-sparkling`` command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ds_sparkling.cli import COMMANDS, main

TOOLS = Path(__file__).parents[1] / "tools"


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


def test_every_python_tool_is_a_command_unless_it_needs_a_checkout() -> None:
    needs_checkout = {"bench-expand", "bench-regrow", "bench-step", "check-families", "reproduce"}
    assert {path.stem.replace("_", "-") for path in TOOLS.glob("*.py")} - needs_checkout <= COMMANDS.keys()


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["grow"])
    assert "invalid choice: 'grow'" in capsys.readouterr().err


def test_the_installed_command_reaches_the_tools() -> None:
    command = Path(sys.executable).with_name("ds-sparkling")
    done = subprocess.run([command, "plan-growth", "--help"], capture_output=True, text=True, timeout=120, check=True)
    assert "--tokens" in done.stdout
