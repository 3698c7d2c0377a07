"""A request says what is asked of the file room. It imports no torch, so that the command's help is quick."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

FORMATS = ("zero", "universal", "hf")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for.

    Attributes:
        checkpoint: the directory that ``save_checkpoint`` was given, one with a universal checkpoint, or that of a tag.
        out: the directory to make; must not exist, or be empty.
        widths: the axes that grow, and to what; empty to reshape or export only.
        tag: of the checkpoint; the one named in ``latest`` by default.
        config: where the axes come from (:func:`~ds_sparkling.checkpoint.parameter_axes.checkpoint_axes`); with format
            ``hf`` the model's ``config.json``.
        deepspeed_config: a DeepSpeed config whose ``"sparkling"`` block says how to grow; that in the checkpoint
            by default.
        world_size: data-parallel ranks of the output; those of the checkpoint by default.
        expert_parallel: its expert-parallel size.
        format: ``zero``, ``universal`` or ``hf``.
        workers: threads that fill files.
        verify: check the inputs' checksums before, and read the output back after.
        trust: unpickle classes that aren't known.
    """

    checkpoint: Path
    out: Path
    widths: Mapping[str, int] = field(default_factory=dict)
    tag: str | None = None
    config: str | None = None
    deepspeed_config: Path | None = None
    world_size: int | None = None
    expert_parallel: int | None = None
    format: str = "zero"
    workers: int = min(os.cpu_count() or 1, 8)
    verify: bool = False
    trust: bool = False
