"""Compile what the tests and the quickstart would otherwise compile at their first use, a minute or two each."""

from __future__ import annotations

import logging
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.ops.op_builder.cpu import CPUAdamBuilder, FusedAdamBuilder, PinMemoryBuilder, ShareMemCommBuilder


def main() -> None:
    deepspeed.utils.logger.setLevel(logging.WARNING)
    for builder in (ShareMemCommBuilder, CPUAdamBuilder, FusedAdamBuilder, PinMemoryBuilder):
        builder().load(verbose=False)


if __name__ == "__main__":
    main()
