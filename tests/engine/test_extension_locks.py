"""Locks in torch's cache of extensions: those that nobody holds are named, with the command that removes them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import _get_build_directory
from torch.utils.file_baton import FileBaton

from ds_sparkling.engine import extension_locks
from ds_sparkling.engine.extension_locks import left_locks, warn_of_left_locks


@pytest.fixture(params=["TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME", "HOME"])
def lock(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch would take the lock for an op called ``some_op``, with the cache said in each of the ways."""
    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(request.param, str(tmp_path / "it's here"))
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(extension_locks, "_warned", set())
    return Path(_get_build_directory("some_op", False)) / "lock"


def test_a_lock_whose_builder_was_killed_is_named_once(lock: Path, caplog: pytest.LogCaptureFixture) -> None:
    taken = "from torch.utils.file_baton import FileBaton; import os, sys; FileBaton(sys.argv[1]).try_acquire(); "
    subprocess.run([sys.executable, "-c", taken + "os.kill(os.getpid(), 9)", str(lock)], check=False)
    assert left_locks() == [lock]
    warn_of_left_locks()
    warn_of_left_locks()
    (said,) = caplog.messages
    assert "some_op" in said
    command = said[said.index("rm ") :]
    subprocess.run(command, shell=True, check=True)
    assert not lock.exists()
    assert left_locks() == []


def test_a_lock_that_is_held_is_left_alone(lock: Path) -> None:
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    assert left_locks() == []
    baton.release()
    assert left_locks() == []


def test_other_ranks_of_a_machine_leave_it_to_the_first(
    lock: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock.touch()
    monkeypatch.setenv("LOCAL_RANK", "3")
    warn_of_left_locks()
    assert not caplog.messages


def test_where_other_machines_build_too_a_lock_has_to_be_old(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension_locks, "_file_system", lambda _path: "nfs4")
    lock.touch()
    assert left_locks() == []
    os.utime(lock, (0, 0))
    assert left_locks() == [lock]


def test_no_cache_has_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "absent"))
    assert left_locks() == []


def test_a_launched_script_is_warned_by_the_import(tmp_path: Path) -> None:
    """DeepSpeed may load its first op before the script calls anything of this package."""
    (tmp_path / "some_op").mkdir()
    (tmp_path / "some_op" / "lock").touch()
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    environment.pop("LOCAL_RANK", None)
    for rank, warned in ((None, False), ("0", True), ("1", False)):
        launched = {} if rank is None else {"LOCAL_RANK": rank}
        done = subprocess.run(
            [sys.executable, "-c", "import ds_sparkling"],
            env={**environment, **launched},
            capture_output=True,
            text=True,
            check=True,
        )
        assert (f"rm {tmp_path}" in done.stderr) == warned
