"""Meet the other ranks and take this one's device, before anything else."""

from __future__ import annotations

import os
from typing import Any

import deepspeed
from deepspeed.accelerator import get_accelerator

from ds_sparkling.engine.fail_together import FailTogether


def meet(all_ranks: FailTogether, args: Any = None) -> None:
    """Start torch.distributed if it isn't yet, take this rank's device, and settle ``all_ranks``.

    Args:
        all_ranks: holds what went wrong on this rank so far.
        args: parsed command line, as for ``deepspeed.initialize``.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if not (alone and all_ranks.failed):
        deepspeed.init_distributed()
        with all_ranks:
            bind_device(args)
    all_ranks.settle()


def bind_device(args: Any = None) -> None:
    """Make this rank's device the current one, as DeepSpeed's engine does when it is constructed.

    Collectives and random states before that would use the first device on every rank.

    Args:
        args: may have a ``device_rank``, as for ``deepspeed.initialize``.
    """
    device = getattr(args, "device_rank", int(os.environ.get("LOCAL_RANK", "-1")))
    if device >= 0:
        get_accelerator().set_device(device)
