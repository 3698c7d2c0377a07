"""Start the main job."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from ds_sparkling.spec.command_line import port, positive

#: Seconds that a job has to end by itself when it is stopped. DeepSpeed's launcher gives its ranks 30.
_GRACE = 45.0
#: What stops a job.
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def add_launcher_options(parser: argparse.ArgumentParser) -> None:
    """``--num_gpus`` and ``--master_port``."""
    parser.add_argument(
        "--num_gpus",
        type=positive,
        default=2,
        metavar="N",
        help="processes to start on this machine (CPU processes without GPU)",
    )
    parser.add_argument(
        "--master_port", type=port, metavar="PORT", help="where the processes meet; the launcher's by default"
    )


def launcher_command(num_gpus: int, job: Sequence[str], master_port: int | None = None) -> list[str]:
    """The command that starts :mod:`ds_sparkling.train` under DeepSpeed's launcher, which tells errors alone.

    Args:
        num_gpus: processes to start on this machine.
        job: arguments of the job.
        master_port: where the processes meet; the launcher's default if left out.
    """
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error", "--num_gpus", str(num_gpus)]
    if master_port is not None:
        launcher += ["--master_port", str(master_port)]
    return [*launcher, "--module", "ds_sparkling.train", *job]


def run_job(command: Sequence[str]) -> int:
    """Run the main job's command to its end; a signal to this process stops all of the job's processes.

    The job is a process group of its own: DeepSpeed's launcher alone, told to stop, would leave its ranks training.

    Args:
        command: of :func:`launcher_command`.

    Returns:
        The job's exit status. After a signal this process ends with 128 plus its number, when the job's have ended.
    """
    came: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before = {
        number: signal.signal(number, remember) for number in _STOPS if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        with subprocess.Popen(command, start_new_session=True) as job:
            while not came:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return job.wait(timeout=0.5)
            sys.stderr.write(f"{signal.Signals(came[0]).name}: stopping the job\n")
            _end_group(job)
        sys.exit(128 + came[0])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_group(job: subprocess.Popen[bytes]) -> None:
    """Ask all processes of the job's group to end, and kill those that haven't when the time is over."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE
    while time.monotonic() < deadline:
        job.poll()
        try:
            os.killpg(job.pid, 0)
        except ProcessLookupError:  # all have ended
            return
        time.sleep(0.1)
    sys.stderr.write(f"killing what hasn't ended in {_GRACE:.0f} s\n")
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
