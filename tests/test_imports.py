"""The arrows between rooms: what may import what, and that all but the engine room works without DeepSpeed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ds_sparkling
from ds_sparkling.cli import COMMANDS

PACKAGE = Path(ds_sparkling.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
#: The one file that imports by a table, which is read.
COMMAND_TABLE = PACKAGE / "cli.py"

#: What every room may import of this package beside itself.
FOUNDATION = {"errors", "files", "figures", "progress", "spec", "text_tables"}
GROUND = {"growth", "optim", "discovery", "monitoring", "models"}
MAY_IMPORT = {
    "errors": set(),
    "files": {"errors"},
    "figures": {"errors", "files", "spec", "text_tables"},
    "native": set(),
    "progress": set(),
    "text_tables": set(),
    "spec": {"errors", "files"},
    "models": {"errors", "spec"},
    "growth": {"errors", "native", "spec", "text_tables"},
    "optim": FOUNDATION | {"native", "growth"},
    "discovery": FOUNDATION | {"growth"},
    "monitoring": FOUNDATION | {"growth"},
    "check": FOUNDATION | GROUND,
    "checkpoint": FOUNDATION | GROUND,
    "engine": FOUNDATION | GROUND,
    # The base scheduler of a config is DeepSpeed's, so drawing its curve leads to the engine room.
    "planner": FOUNDATION | GROUND | {"engine"},
    "report": {"errors", "figures", "progress", "spec", "text_tables", "monitoring"},
    "integrations": {"errors", "discovery", "engine"},
    "job": FOUNDATION | GROUND | {"engine", "planner"},
    "train": {"job"},
    "cli": {"job", "check", "checkpoint", "planner", "report", "spec"},  # by the table of commands
    "": {"check", "discovery", "engine", "errors", "spec"},  # the package's public names
}

#: What works where importing DeepSpeed is an error.
FREE = [
    "",
    ".growth",
    ".spec.config",
    ".spec.record",
    ".discovery.find_axes",
    ".monitoring.alarms",
    ".models.olmoe",
    ".optim.step",
    ".check.command",
    ".checkpoint.command",
    ".planner.command",
    ".report.command",
    ".job.compare",
    ".job.command",
    ".job.side_by_side",
    ".train",
    ".cli",
]

#: Imports those; then shows that DeepSpeed is blocked, and that the public names do lead to it.
_WITHOUT_DEEPSPEED = """
import importlib, sys
from importlib.abc import MetaPathFinder

class Blocked(Exception):
    pass

class Block(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "deepspeed":
            raise Blocked(name)

sys.meta_path.insert(0, Block())
for name in sys.argv[1:]:
    importlib.import_module(name)
assert "deepspeed" not in sys.modules
try:
    import ds_sparkling
    ds_sparkling.initialize
except Blocked:
    print("blocked")
"""


def test_everything_but_the_engine_room_works_without_deepspeed() -> None:
    names = [f"ds_sparkling{name}" for name in FREE]
    command = [sys.executable, "-c", _WITHOUT_DEEPSPEED, *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "blocked"


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports anywhere in it; for ``from a import b`` both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative imports hide where they lead"
            assert node.module is not None
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            argument = node.args[0]
            if path == COMMAND_TABLE and ast.unparse(argument) == "COMMANDS[arguments.command].module":
                found |= {command.module for command in COMMANDS.values()}
                continue
            assert isinstance(argument, ast.Constant), f"{path}:{node.lineno}: an import that can't be checked"
            found.add(str(argument.value))
    return found


def under(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py").replace("__init__", "")


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_room_imports_only_what_it_may_know(path: Path) -> None:
    rooms = {name.split(".")[1] for name in imported(path) if name.startswith("ds_sparkling.")}
    assert rooms & MAY_IMPORT.keys() <= MAY_IMPORT[room_of(path)] | {room_of(path)}


def test_rooms_stand_in_an_order() -> None:
    """No room is reached from one that it reaches."""
    for room in MAY_IMPORT:
        reached: set[str] = set()
        new = {room}
        while new:
            new = set().union(*(MAY_IMPORT[other] for other in new)) - reached
            reached |= new
        assert room not in reached, room


@pytest.mark.parametrize("path", [path for path in FILES if room_of(path) in ("growth", "spec")], ids=relative)
def test_growth_knows_torch_alone_and_spec_what_reads_json_too(path: Path) -> None:
    read_json = ("pydantic", "pydantic_core", "typing_extensions") if room_of(path) == "spec" else ()
    for name in imported(path):
        known = under(name, "ds_sparkling", "torch", *read_json) or name.partition(".")[0] in sys.stdlib_module_names
        assert known, name


def test_only_the_engine_room_and_the_main_job_import_deepspeed() -> None:
    users = {relative(path) for path in FILES if any(under(name, "deepspeed") for name in imported(path))}
    assert any(user.startswith("engine/") for user in users)  # the scan does find imports
    assert {user for user in users if not user.startswith("engine/")} <= {"job/main_job.py"}


def test_other_peoples_loops_are_imported_by_their_integrations_alone() -> None:
    """Each library by the file that is called after it (the Trainer needs both)."""
    allowed = {
        "integrations/accelerate.py": {"accelerate"},
        "integrations/trainer.py": {"transformers"},
        "discovery/factory.py": {"transformers"},
    }
    for path in FILES:
        names, own = imported(path), relative(path)
        libraries = {library for library in ("accelerate", "transformers") if any(under(n, library) for n in names)}
        assert libraries <= allowed.get(own, set()), own


def test_a_report_is_made_of_files_alone() -> None:
    """And starts fast: what trains isn't imported."""
    alarms = PACKAGE / "monitoring" / "alarms.py"  # what it calls locked or dead
    for path in (alarms, *(path for path in FILES if room_of(path) == "report")):
        names = imported(path)
        assert not any(under(name, "torch") for name in names), path
        for name in names:
            if name.startswith(("ds_sparkling.monitoring.", "ds_sparkling.spec.")):
                light = ("ds_sparkling.spec.command_line", "ds_sparkling.spec.run_summary")
                assert under(name, "ds_sparkling.monitoring.alarms", *light), name
