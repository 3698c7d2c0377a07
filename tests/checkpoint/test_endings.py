"""However a call ends, it says so in one line and with a status, and nothing is left of it."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import checkpoint_files
from damage import hashes, refused
from ds_sparkling.checkpoint import output, team
from ds_sparkling.checkpoint.command import main
from ds_sparkling.checkpoint.team import LostProcessError, Team
from ds_sparkling.errors import CheckpointError


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_call_that_is_stopped_says_so_and_leaves_nothing(
    number: signal.Signals,
    status: int,
    saved: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint, sync = saved("experts"), output._sync

    def stop(descriptor: int) -> None:
        os.kill(os.getpid(), number)
        sync(descriptor)

    monkeypatch.setattr(output, "_sync", stop)
    before, handler = hashes(tmp_path), signal.getsignal(signal.SIGTERM)
    interrupted = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
    try:
        with pytest.raises(SystemExit) as ended:
            main([str(checkpoint), str(tmp_path / "out"), "--workers", "1"])
    finally:
        signal.signal(signal.SIGINT, interrupted)
    assert ended.value.code == status
    assert capsys.readouterr().err.splitlines()[-1] == f"stopped: {tmp_path / 'out'} isn't made"
    assert hashes(tmp_path) == before
    assert signal.getsignal(signal.SIGTERM) == handler


def in_a_team(monkeypatch: pytest.MonkeyPatch) -> Team:
    member = Team()
    member.size = 2
    return member


def test_a_process_that_is_lost_ends_the_others(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(values: list[object], value: object) -> None:
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")

    monkeypatch.setattr(dist, "all_gather_object", closed)
    member = in_a_team(monkeypatch)
    with pytest.raises(LostProcessError, match="another process of this job has ended"):
        member.together(lambda: None)
    with pytest.raises(CheckpointError, match="my own"):
        member.agree(CheckpointError("my own"))


def test_an_end_that_waits_for_ever_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    going_on = threading.Event()
    monkeypatch.setattr(team, "_PATIENCE", 0.05)
    monkeypatch.setattr(dist, "destroy_process_group", going_on.wait)
    member = in_a_team(monkeypatch)
    member._started = True
    member.__exit__(None, None, None)
    going_on.set()


@pytest.mark.parametrize(
    ("out", "words"),
    [("saved/out", "lies in the checkpoint"), ("link/out", "lies in the checkpoint"), ("loop/out", "loop")],
)
def test_an_output_in_the_checkpoint_or_in_a_loop_is_refused(
    out: str, words: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = saved("experts")
    (tmp_path / "link").symlink_to("saved")
    (tmp_path / "loop").symlink_to("loop")
    refused(checkpoint, out.partition("/")[2], words, out=tmp_path / out, widths={})


@pytest.mark.parametrize("option", ["checkpoint", "out", "config", "tag", "deepspeed_config"])
def test_a_nul_in_a_path_is_refused(option: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    given: dict[str, Any] = {"checkpoint": saved("experts"), "out": tmp_path / "out"}
    path = "a\0b" if option in ("config", "tag") else tmp_path / "a\0b"
    with pytest.raises(CheckpointError, match="NUL"):
        checkpoint_files.run(**{**given, option: path})


@pytest.mark.parametrize("option", ["world_size", "expert_parallel"])
@pytest.mark.parametrize("count", [10**30, 10**6, 0, -1])
def test_sizes_that_no_run_has_are_refused(option: str, count: int, saved: Callable[[str], Path]) -> None:
    options: dict[str, Any] = {option: count, "widths": {}}
    refused(saved("experts"), f"--{option.replace('_', '-')}", "at most 262144", **options)


@pytest.mark.parametrize("denied", ["saved", "saved/global_step2", "."])
def test_directories_without_permission_are_named(
    denied: str,
    saved: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Tests run as the superuser, whom permissions don't bind."""
    checkpoint, stat, listed = saved("experts"), os.stat, os.scandir
    place = str(tmp_path / denied)

    def refuse(path: Any) -> None:
        if isinstance(path, (str, Path)) and str(path).startswith(f"{place}/"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    def denied_stat(path: Any, *args: Any, **options: Any) -> Any:
        refuse(path)
        return stat(path, *args, **options)

    def denied_list(path: Any = ".") -> Any:
        if str(path) == place:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "stat", denied_stat)
    monkeypatch.setattr(os, "scandir", denied_list)
    with pytest.raises(SystemExit) as ended:
        main([str(checkpoint), str(tmp_path / "out")])
    monkeypatch.undo()
    assert ended.value.code == 1
    assert "Permission denied" in capsys.readouterr().err
