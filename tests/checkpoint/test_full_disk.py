"""Disks that are full or can't be written: the file is named, and nothing is left."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import checkpoint_files
from damage import FACTORY, MODEL_0, OPTIMIZER_1, TAG, WIDE, hashes, out_of_space
from ds_sparkling.checkpoint import expand
from ds_sparkling.errors import CheckpointError


@pytest.mark.parametrize("calls", [0, 1, 7, 20])
@pytest.mark.parametrize("format", ["zero", "universal"])
def test_a_write_that_fails_names_the_file_and_leaves_nothing(
    format: str, calls: int, saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = saved("stage2")
    before = hashes(checkpoint.parent)
    write, left = os.pwrite, itertools.count(calls, -1)
    monkeypatch.setattr(os, "pwrite", lambda *args: write(*args) if next(left) > 0 else out_of_space())
    with pytest.raises(CheckpointError, match=r"can't write .*out.*\.pt: No space left on device"):
        checkpoint_files.run(checkpoint, checkpoint.parent / "out", WIDE, config=FACTORY, format=format)
    assert hashes(checkpoint.parent) == before


def test_a_file_is_closed_when_nobody_writes_to_it_any_more(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = saved("experts")
    pwrite, arrivals, meeting = os.pwrite, itertools.count(), threading.Barrier(2, timeout=20)
    closed: list[int] = []

    def write(descriptor: int, data: memoryview, position: int) -> int:
        """The first of two workers fails; the second one takes its time."""
        if threading.current_thread() is not threading.main_thread():
            if next(arrivals) >= 2 or meeting.wait() == 0:
                out_of_space()
            time.sleep(0.3)
            try:
                os.fstat(descriptor)
            except OSError:
                closed.append(descriptor)
        return pwrite(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", write)
    with pytest.raises(CheckpointError):
        checkpoint_files.run(checkpoint, tmp_path / "out")
    assert not closed


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (OPTIMIZER_1, f"out.*{OPTIMIZER_1}"),
        (MODEL_0, f"out.*{MODEL_0}"),
        ("latest", "out"),
        (TAG, "out"),
        ("data", "out"),
    ],
)
def test_what_cant_be_brought_to_the_disk_is_named(
    name: str, words: str, saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = saved("experts")
    before = hashes(checkpoint.parent)
    sync = os.fsync

    def fails(descriptor: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).name == name:
            out_of_space()
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fails)
    try:
        with pytest.raises(CheckpointError, match=f"{words}.*No space left on device"):
            checkpoint_files.run(checkpoint, checkpoint.parent / "out", WIDE, config=FACTORY)
    finally:
        assert hashes(checkpoint.parent) == before


@pytest.mark.parametrize("target", ["shutil.copy2", "ds_sparkling.spec.record.GrowthRecord.write"])
def test_small_files_that_cant_be_written_are_named(
    target: str, saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = saved("experts")
    before = hashes(checkpoint.parent)
    monkeypatch.setattr(target, out_of_space)
    try:
        with pytest.raises(CheckpointError, match=r"out.*No space left on device"):
            checkpoint_files.run(checkpoint, checkpoint.parent / "out", WIDE, config=FACTORY)
    finally:
        assert hashes(checkpoint.parent) == before


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system in memory."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        path = tmp_path / f"disk{len(mounted)}"
        path.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"can't mount a tmpfs: {done.stderr.strip()}")
        mounted.append(path)
        return path

    if shutil.which("mount") is None:
        pytest.skip("no mount")
    yield mount
    for path in mounted:
        subprocess.run(["umount", path], check=True)


def test_a_full_disk_is_named_and_left_empty(
    disk: Callable[[str], Path], saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = saved("stage2")
    before = hashes(checkpoint)
    checkpoint_files.run(checkpoint, tmp_path / "out", WIDE, config=FACTORY)
    tensors = sum(path.stat().st_size for path in (tmp_path / "out" / TAG).glob("*.pt"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=10**12))
    for part in range(6):
        full = disk(f"size={max(tensors * part // 6, 4096)}")
        with pytest.raises(CheckpointError, match=rf"can't write {full}/out.*\.pt: No space left on device"):
            checkpoint_files.run(checkpoint, full / "out", WIDE, config=FACTORY)
        assert not list(full.iterdir())
    large = disk("size=10m")
    checkpoint_files.run(checkpoint, large / "out", WIDE, config=FACTORY)
    assert hashes(large / "out") == hashes(tmp_path / "out")
    assert hashes(checkpoint) == before


def test_a_disk_that_cant_be_written_is_named(disk: Callable[[str], Path], saved: Callable[[str], Path]) -> None:
    with pytest.raises(CheckpointError, match=r"out.*Read-only file system"):
        checkpoint_files.run(saved("experts"), disk("ro") / "out", WIDE, config=FACTORY)


def test_too_little_space_is_noticed_before_anything_is_written(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = saved("experts")
    before = hashes(checkpoint.parent)
    monkeypatch.setattr(expand, "published", lambda _: pytest.fail("it has begun to write"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=12_345))
    with pytest.raises(CheckpointError, match=r"out needs \d+\.\d\d kB, but only 12\.35 kB are free there"):
        checkpoint_files.run(checkpoint, checkpoint.parent / "out", WIDE, config=FACTORY)
    assert hashes(checkpoint.parent) == before
