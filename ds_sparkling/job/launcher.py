"""Start the main job."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def add_launcher_options(parser: argparse.ArgumentParser) -> None:
    """``--num_gpus`` and ``--master_port``."""
    parser.add_argument(
        "--num_gpus", default="2", metavar="N", help="processes to start on this machine (CPU processes without GPU)"
    )
    parser.add_argument("--master_port", metavar="PORT", help="where the processes meet; the launcher's by default")


def launcher_command(num_gpus: str, job: Sequence[str], port: str | None = None) -> list[str]:
    """The command that starts :mod:`ds_sparkling.train` under DeepSpeed's launcher, which tells errors alone.

    Args:
        num_gpus: processes to start on this machine.
        job: arguments of the job.
        port: where the processes meet; the launcher's default if left out.
    """
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error", "--num_gpus", num_gpus]
    if port is not None:
        launcher += ["--master_port", port]
    return [*launcher, "--module", "ds_sparkling.train", *job]
