"""Where the output is to be, something may lie already, or another call may be writing."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import checkpoint_files
from damage import TAG, Change, hashes, made, readable, refused
from ds_sparkling.checkpoint import publish
from ds_sparkling.errors import CheckpointError

TOOL = Path(__file__).parents[2] / "tools/expand_zero_ckpt.py"


@pytest.mark.parametrize(
    ("obstacle", "out", "words"),
    [
        (made("out/mine"), "out", ("out", "exists and isn't an empty directory")),
        (made("out"), "out", ("out", "exists and isn't an empty directory")),
        (lambda path: (path / "out").symlink_to("nowhere"), "out", ("out", "exists and isn't an empty directory")),
        (made(), "saved", ("saved", "exists and isn't an empty directory")),
        (made(), f"saved/{TAG}/out", ("out", "lies in the checkpoint", TAG)),
        (made("folder/"), f"folder/../saved/{TAG}/out", ("out", "lies in the checkpoint", TAG)),
        (lambda path: (path / "link").symlink_to(f"saved/{TAG}"), "link/out", ("out", "lies in the checkpoint", TAG)),
        (made(), "no/out", ("no isn't a directory",)),
        (made("file"), "file/out", ("file isn't a directory",)),
        (made("out.incomplete/data/mine"), "out", ("out.incomplete", "in the way")),
        (made("out.incomplete"), "out", ("out.incomplete", "in the way")),
    ],
    ids=readable,
)
def test_an_output_in_the_way_is_left_alone(
    obstacle: Change, out: str, words: tuple[str, ...], saved: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = saved("experts")
    obstacle(tmp_path)
    refused(checkpoint, *words, out=tmp_path / out)


LONG = ["o" * 244, "o" * 246, "o" * 255, "ö" * 122 + "o", "ö" * 127]


@pytest.mark.parametrize("name", LONG, ids=lambda name: f"{len(os.fsencode(name))} bytes")
def test_an_output_may_have_the_longest_name(name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint_files.run(saved("experts"), tmp_path / name, verify=True)
    assert {path.name for path in tmp_path.iterdir()} == {"saved", name}
    # Another long name has another place for what isn't finished.
    assert publish.staging(tmp_path / name) != publish.staging(tmp_path / f"{name[:-1]}p")


@pytest.mark.parametrize("out", ["o" * 256, "ö" * 128, f"{'o' * 256}/out"], ids=["ascii", "utf-8", "on the way"])
def test_an_output_whose_name_is_too_long_is_refused_at_once(
    out: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    refused(saved("experts"), "o" * 256 if "/" in out else "its name has 256 bytes, of 255 at most", out=tmp_path / out)


@pytest.mark.parametrize("obstacle", ["out.incomplete/mine", "out.incomplete/data/mine", "out.incomplete"])
def test_an_empty_output_doesnt_give_others_files_away(
    obstacle: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = saved("experts")
    made("out/", obstacle)(tmp_path)
    with pytest.raises(CheckpointError, match="in the way"):
        checkpoint_files.run(checkpoint, tmp_path / "out")
    assert (tmp_path / obstacle).read_text() == "precious"


def test_an_empty_output_is_taken(saved: Callable[[str], Path], tmp_path: Path) -> None:
    made("out/")(tmp_path)
    checkpoint_files.run(saved("experts"), tmp_path / "out")
    assert (tmp_path / "out/latest").read_text() == TAG


def test_a_link_to_an_empty_directory_is_refused_or_filled(saved: Callable[[str], Path], tmp_path: Path) -> None:
    made("real/")(tmp_path)
    (tmp_path / "out").symlink_to("real")
    try:
        checkpoint_files.run(saved("experts"), tmp_path / "out")
    except CheckpointError as error:
        assert "out" in str(error)  # noqa: PT017
    else:
        assert (tmp_path / "out/latest").read_text() == TAG


def test_the_current_directory_is_filled(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made("here/")(tmp_path)
    monkeypatch.chdir(tmp_path / "here")
    checkpoint_files.run(saved("experts"), Path("."))
    assert (tmp_path / "here/latest").read_text() == TAG


def test_what_another_process_is_writing_is_left_alone(saved: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = saved("experts")
    made("out.incomplete/data/theirs")(tmp_path)
    with open(tmp_path / "out.incomplete/lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = hashes(tmp_path)
        with pytest.raises(CheckpointError, match=r"another process is writing .*out .*out\.incomplete/lock"):
            checkpoint_files.run(checkpoint, tmp_path / "out")
        assert hashes(tmp_path) == before
    checkpoint_files.run(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out.incomplete").exists()


def test_of_two_calls_one_is_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint, out = saved("experts"), tmp_path / "out"
    with publish.published(out) as data:
        (data / "theirs").write_text("whole")
        command = [sys.executable, str(TOOL), str(checkpoint), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 1
        assert f"error: another process is writing {out}" in done.stderr
    assert hashes(out) == {"theirs": hashlib.sha256(b"whole").hexdigest()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "saved"]


@pytest.mark.parametrize("third", [False, True])
def test_a_lock_removed_by_its_holder_counts_for_nothing(
    third: bool, saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another call ends between opening the lock and locking it, and a third one may begin then."""
    checkpoint, incomplete = saved("experts"), tmp_path / "out.incomplete"
    flock = fcntl.flock
    calls, thirds = itertools.count(), []

    def late(lock: Any, operation: int) -> None:
        if next(calls) == 0:
            shutil.rmtree(incomplete)
            if third:
                made("out.incomplete/data/theirs")(tmp_path)
                thirds.append(open(incomplete / "lock", "a"))  # noqa: SIM115
                flock(thirds[0], fcntl.LOCK_EX)
        flock(lock, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    try:
        if third:
            with pytest.raises(CheckpointError, match="another process is writing"):
                checkpoint_files.run(checkpoint, tmp_path / "out")
            assert (incomplete / "data/theirs").read_text() == "precious"
        else:
            checkpoint_files.run(checkpoint, tmp_path / "out")
            assert not incomplete.exists()
    finally:
        for lock in thirds:
            lock.close()
