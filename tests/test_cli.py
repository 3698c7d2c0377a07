"""The ``ds-sparkling`` command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ds_sparkling.cli import COMMANDS, main
from ds_sparkling.job import command as job_command

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "tools"

#: Asks every command line of argv for its help, one after the other, and says what that has printed and imported.
_ASK_FOR_HELP = """
import contextlib, io, json, runpy, subprocess, sys

def no_process(*arguments, **options):
    raise AssertionError(f"help starts {arguments}")

subprocess.Popen = no_process
sys.path.insert(0, "tools")
seen = {}
for line in sys.argv[1:]:
    script, *arguments = line.split()
    sys.argv = [script, *arguments, "--help"]
    printed, status = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as exit:
            status = exit.code
    seen[line] = [status, printed.getvalue(), sorted({name.partition(".")[0] for name in sys.modules})]
print(json.dumps(seen))
"""
#: What takes its time to import.
HEAVY = {"torch", "deepspeed", "numpy", "matplotlib", "scipy", "tensorboard", "transformers", "tqdm"}


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


def test_help_is_quick_and_comes_once() -> None:
    """Nothing that takes its time is imported, and no process is started, for the help of any command or script."""
    scripts = [path.relative_to(ROOT).as_posix() for path in sorted(TOOLS.glob("*.py"))]
    lines = ["ds_sparkling/cli.py", *(f"ds_sparkling/cli.py {name}" for name in COMMANDS), "ds_sparkling/train.py"]
    command = [sys.executable, "-c", _ASK_FOR_HELP, *lines, *scripts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=ROOT)
    seen = json.loads(done.stdout)
    assert list(seen) == [*lines, *scripts]
    for line, (status, printed, modules) in seen.items():
        assert status == 0, line
        assert printed.count("usage:") == 1, line
        assert not HEAVY & set(modules), line


def test_train_tells_a_mistake_before_it_starts_processes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_command, "run_job", lambda command: pytest.fail(f"starts {command}"))
    with pytest.raises(SystemExit):
        main(["train", "--deepspeed_config", "x.json", "--stepz", "3"])
    assert "unrecognized arguments: --stepz 3" in capsys.readouterr().err


def test_train_gives_the_launcher_its_options_and_the_job_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def call(command: list[str]) -> int:
        started.append(command)
        return 0

    monkeypatch.setattr(job_command, "run_job", call)
    job = ["--deepspeed_config", "x.json", "--variant", "never-grown"]
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--num_gpus", "4", *job])
    assert started[0][started[0].index("--num_gpus") :] == ["--num_gpus", "4", "--module", "ds_sparkling.train", *job]


def test_every_python_tool_is_a_command_unless_it_needs_a_checkout() -> None:
    needs_checkout = {"bench-draws", "bench-expand", "bench-regrow", "bench-step", "broken-lines", "check-families"}
    needs_checkout |= {"compile-ops", "make-docs", "reproduce"}
    assert {path.stem.replace("_", "-") for path in TOOLS.glob("*.py")} - needs_checkout <= COMMANDS.keys()


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["grow"])
    assert "invalid choice: 'grow'" in capsys.readouterr().err


def test_the_installed_command_reaches_the_tools() -> None:
    command = Path(sys.executable).with_name("ds-sparkling")
    done = subprocess.run([command, "plan-growth", "--help"], capture_output=True, text=True, timeout=120, check=True)
    assert "--tokens" in done.stdout
