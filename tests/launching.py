"""Starting a script on two processes, as a user does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.common import free_port
from patience import QUIET, Patience, family

ROOT = Path(__file__).parents[1]
Launch = Callable[..., subprocess.CompletedProcess[str]]


def launch(script: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run ``script``, a path from the repository's root, by the ``deepspeed`` launcher on two CPU processes.

    Args:
        more: environment variables.

    Raises:
        AssertionError: if it hangs, with every process's stacks.
    """
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    command = [*launcher, str(ROOT / script), *arguments]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}
    environment["PYTHONFAULTHANDLER"] = "1"  # processes that are aborted say where they were
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )
    stdout, stderr = outcome(process)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def outcome(process: subprocess.Popen[str], quiet: float = QUIET) -> tuple[str, str]:
    """What a process writes until it ends.

    Raises:
        AssertionError: if it hangs, with the stacks of all that it has started and that said PYTHONFAULTHANDLER.
    """
    patience = Patience([process.pid], quiet)
    while not patience.is_over():
        try:
            return process.communicate(timeout=1)
        except subprocess.TimeoutExpired:
            continue
    for started in family(process.pid):
        started.send_signal(signal.SIGABRT)
    raise AssertionError(f"{process.args!r} hangs:\n{process.communicate()[1]}")
