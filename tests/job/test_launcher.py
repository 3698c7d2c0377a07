"""The job's processes, all of which end when the command that started them is stopped."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from ds_sparkling.job import launcher
from ds_sparkling.job.launcher import launcher_command, run_job


def running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_jobs_status_is_returned_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert run_job([sys.executable, "-S", "-c", "raise SystemExit(3)"]) == 3
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("deaf", [False, True], ids=["", "deaf"])
def test_a_signal_ends_all_of_the_jobs_processes(
    tmp_path: Path,
    stop: signal.Signals,
    deaf: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also those that the launcher would leave, and those that don't listen."""
    monkeypatch.setattr(launcher, "_GRACE", 0.3)
    ranks = tmp_path / "ranks"
    rank = f"{'trap : TERM; ' * deaf}echo $BASHPID >> {ranks}; while :; do sleep 0.1; done"
    script = f"({rank}) & ({rank}) & wait"

    def send() -> None:
        while not ranks.exists() or len(ranks.read_text().split()) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), stop)

    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(SystemExit) as ended:
        run_job(["bash", "-c", script])
    sender.join()
    assert ended.value.code == 128 + stop
    assert capsys.readouterr().err.startswith(f"{stop.name}: stopping the job\n")
    time.sleep(0.1)
    assert not any(running(int(pid)) for pid in ranks.read_text().split())


def test_the_launchers_command() -> None:
    command = launcher_command(4, ["--resume"], 1234)
    assert command[command.index("--num_gpus") :] == [
        *("--num_gpus", "4", "--master_port", "1234", "--module", "ds_sparkling.train", "--resume")
    ]
