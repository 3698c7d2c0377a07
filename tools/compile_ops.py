"""Compile what the tests would otherwise compile at their first use, a minute or two each: DeepSpeed's ops for CPUs."""

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

    deepspeed.utils.logger.setLevel(logging.WARNING)
    for builder in (ShareMemCommBuilder, CPUAdamBuilder, FusedAdamBuilder, PinMemoryBuilder):
        builder().load(verbose=False)


if __name__ == "__main__":
    main()
