"""The wheel: what is in it, and that installing it takes neither a compiler nor a checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import ds_sparkling

ROOT = Path(__file__).parents[1]
PARTS = ("ds_sparkling", "tools", "tests", "docs", "pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the sources, so that nothing is left in the checkout."""
    sources, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, sources / part, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copy(ROOT / part, sources)
    command = ["wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir"]
    subprocess.run([sys.executable, "-m", "pip", *command, str(out)], cwd=sources, check=True, timeout=120)
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "ds_sparkling",
        f"ds_sparkling-{ds_sparkling.__version__}.dist-info",
    }
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ds_sparkling").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert {"ds_sparkling/py.typed", "ds_sparkling/growth/random.cpp", "ds_sparkling/optim/adam.cpp"} <= set(names)


def test_the_wheel_is_for_every_machine(wheel: Path) -> None:
    """Nothing is compiled when it is installed."""
    assert wheel.name == f"ds_sparkling-{ds_sparkling.__version__}-py3-none-any.whl"


def test_it_installs_and_runs_where_there_is_no_compiler(wheel: Path, tmp_path: Path) -> None:
    target, nothing = tmp_path / "target", tmp_path / "bin"
    nothing.mkdir()
    environment = {**os.environ, "PATH": str(nothing), "PYTHONPATH": str(target)}
    environment = {key: value for key, value in environment.items() if key not in ("CC", "CXX")}
    install = ["-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(target), str(wheel)]
    subprocess.run([sys.executable, *install], env=environment, check=True, timeout=120)
    show = "import ds_sparkling.cli; ds_sparkling.check_growth; print(ds_sparkling.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", show],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.stdout.strip() == str(target / "ds_sparkling" / "__init__.py")


def test_the_same_files_are_held_to_whole_docstrings_before_a_commit_and_after() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    (pattern,) = (hook["files"] for hook in hooks if hook["id"] == "pydoclint")
    (command,) = re.findall(r"\bpydoclint --quiet (.*)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    named = subprocess.run(["bash", "-c", f"find {command} -name '*.py'"], cwd=ROOT, capture_output=True, check=True)
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ds_sparkling").rglob("*.py")}
    assert set(named.stdout.decode().split()) == {file for file in files if re.search(pattern, file)}


def test_one_version_everywhere() -> None:
    citation, changelog = ((ROOT / name).read_text() for name in ("CITATION.cff", "CHANGELOG.md"))
    assert f"\nversion: {ds_sparkling.__version__}\n" in citation
    assert re.findall(r"^## (\d+\.\d+\.\d+)", changelog, re.MULTILINE)[0] == ds_sparkling.__version__
