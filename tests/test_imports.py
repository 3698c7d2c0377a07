"""The arrows between rooms: what may not import what, and that the growth maths starts without DeepSpeed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ds_sparkling

PACKAGE = Path(ds_sparkling.__file__).parent

#: Imports everything that must work without DeepSpeed, where importing DeepSpeed is an error; then shows that it is.
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

FREE = [
    "",
    ".growth",
    ".config",
    ".axes",
    ".probe",
    ".record",
    ".partition",
    ".models.olmoe",
    ".planner.command",
    ".report.command",
    ".compare",
]


def test_everything_but_the_engine_room_works_without_deepspeed() -> None:
    names = [f"ds_sparkling{name}" for name in FREE]
    command = [sys.executable, "-c", _WITHOUT_DEEPSPEED, *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "blocked"  # the hook works, and the public names do lead to DeepSpeed


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
            assert isinstance(argument, ast.Constant), f"{path}:{node.lineno}: an import that can't be checked"
            found.add(str(argument.value))
    return found


def under(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


FILES = sorted(PACKAGE.rglob("*.py"))
GROWTH = [path for path in FILES if path.parent == PACKAGE / "growth"]


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", GROWTH, ids=relative)
def test_growth_knows_torch_and_shapes_and_nothing_else(path: Path) -> None:
    allowed = [f"ds_sparkling.{name}" for name in ("axes", "errors", "state_kinds", "strategy", "growth")]
    for name in imported(path):
        if under(name, "ds_sparkling"):
            assert under(name, *allowed), name
        else:
            assert under(name, "torch") or name.partition(".")[0] in sys.stdlib_module_names, name


def test_only_the_engine_room_and_the_programs_import_deepspeed() -> None:
    users = {relative(path) for path in FILES if any(under(name, "deepspeed") for name in imported(path))}
    assert any(user.startswith("zero/") for user in users)  # the scan does find imports
    elsewhere = {user for user in users if not user.startswith(("zero/", "benchmarks/")) and user != "train.py"}
    assert elsewhere == set()


def test_other_peoples_loops_are_imported_by_their_integrations_alone() -> None:
    """Each library by the file that is called after it (the Trainer needs both), which nothing else imports."""
    for path in FILES:
        names, own = imported(path), relative(path)
        libraries = {library for library in ("accelerate", "transformers") if any(under(n, library) for n in names)}
        allowed = {
            "integrations/accelerate.py": {"accelerate"},
            "integrations/trainer.py": {"transformers"},
            "factory.py": {"transformers"},
        }
        assert libraries <= allowed.get(own, set()), own
        if not own.startswith("integrations/"):
            assert not any(under(name, "ds_sparkling.integrations") for name in names), own


def test_engine_room_and_file_room_do_not_know_each_other() -> None:
    for path in FILES:
        other = {"zero": "checkpoint", "checkpoint": "zero"}.get(path.relative_to(PACKAGE).parts[0])
        if other is not None:
            assert not any(under(name, f"ds_sparkling.{other}") for name in imported(path)), relative(path)


def test_a_report_is_made_of_files_alone() -> None:
    """And starts fast: what trains isn't imported."""
    alarms = PACKAGE / "diagnostics" / "alarms.py"  # what it calls locked or dead
    for path in (alarms, *(path for path in FILES if path.parent == PACKAGE / "report")):
        names = imported(path)
        assert not any(under(name, "torch") for name in names), path
        for name in (name for name in names if under(name, "ds_sparkling")):
            allowed = [
                f"ds_sparkling.{other}" for other in ("report", "errors", "progress", "summary", "diagnostics.alarms")
            ]
            assert under(name, *allowed), f"{relative(path)}: {name}"


def test_the_maths_does_not_know_the_engine_room() -> None:
    """Only the package's own lazy names lead there."""
    for path in FILES:
        top = path.relative_to(PACKAGE).parts[0]
        if top in (
            "errors.py",
            "axes.py",
            "strategy.py",
            "config.py",
            "partition.py",
            "record.py",
            "hints.py",
            "factory.py",
            "routing.py",
            "autoep.py",
            "probe",
            "check",
            "models",
            "diagnostics",
        ):
            assert not any(under(name, "ds_sparkling.zero") for name in imported(path)), relative(path)
