"""What every rank does before anything else: meet the others, and take its device."""

from __future__ import annotations

import os
from typing import Any

import deepspeed
from deepspeed.accelerator import get_accelerator

from ds_sparkling.zero.consensus import Consensus


def meet(consensus: Consensus, args: Any = None) -> None:
    """Start torch.distributed if it isn't yet, take this rank's device, and settle ``consensus``.

    Args:
        consensus: holds what went wrong on this rank so far.
        args: parsed command line, as for ``deepspeed.initialize``.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if not (alone and consensus.failed):
        deepspeed.init_distributed()
        with consensus:
            bind_device(args)
    consensus.settle()


def bind_device(args: Any = None) -> None:
    """Make this rank's device the current one, as DeepSpeed's engine does when it is constructed.

    Collectives and random states before that would use the first device on every rank.

    Args:
        args: may have a ``device_rank``, as for ``deepspeed.initialize``.
    """
    device = getattr(args, "device_rank", int(os.environ.get("LOCAL_RANK", "-1")))
    if device >= 0:
        get_accelerator().set_device(device)
