"""Compile what the tests would otherwise compile at their first use, a minute or two each: DeepSpeed's ops for CPUs.

Locks that killed builds have left, at which every start would wait for ever, are removed.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # here, so that --help doesn't wait for it
    from deepspeed.ops.op_builder.cpu import CPUAdamBuilder, FusedAdamBuilder, PinMemoryBuilder, ShareMemCommBuilder

    from ds_sparkling.engine.extension_locks import left_locks

    deepspeed.utils.logger.setLevel(logging.WARNING)
    for lock in left_locks():
        print(f"removing a lock that a killed build has left: {lock}", flush=True)
        lock.unlink(missing_ok=True)
    for builder in (ShareMemCommBuilder, CPUAdamBuilder, FusedAdamBuilder, PinMemoryBuilder):
        builder().load(verbose=False)


if __name__ == "__main__":
    main()
