"""How the main job is started."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def launcher_command(num_gpus: str, job: Sequence[str], port: str | None = None) -> list[str]:
    """The command that starts ``ds_sparkling/train.py`` under DeepSpeed's launcher.

    Args:
        num_gpus: processes to start on this machine.
        job: arguments of the job.
        port: where the processes meet; the launcher's default if left out.
    """
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", num_gpus]
    if port is not None:
        launcher += ["--master_port", port]
    return [*launcher, "--module", "ds_sparkling.train", *job]
