"""Unit maps: which old unit each unit of a grown axis comes from.

The copy order is cyclic. New units come after the old ones, and new unit ``j`` is a copy of unit ``j mod d``; so at
twice the width unit ``d + i`` is the twin of unit ``i``, and at ``1 < d'/d < 2`` the first ``d' - d`` units get one.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ds_sparkling.errors import PlanError


def check_widths(axis: str, before: int, after: int) -> None:
    """Refuse anything but a widening.

    Raises:
        PlanError: if ``after`` is not larger than ``before``, or either isn't positive.
    """
    if before < 1 or after < 1:
        raise PlanError(f"{axis}: widths must be positive, got {before} -> {after}")
    if after == before:
        raise PlanError(f"{axis}: width {before} -> {after} changes nothing; leave the axis out of the stage")
    if after < before:
        raise PlanError(f"{axis}: width {before} -> {after} shrinks; growth only widens")


def source_units(before: int, after: int) -> Tensor:
    """Source unit of every unit, int64 of shape [after]; the identity on the first ``before``."""
    return torch.arange(after) % before


def multiplicities(before: int, after: int) -> Tensor:
    """How many units, itself included, each *unit's source* has after the growth; int64 of shape [after]."""
    copies, rest = divmod(after, before)
    return copies + (source_units(before, after) < rest).long()


def birth_of_units(widths: tuple[int, ...]) -> Tensor:
    """Birth stage of every unit of an axis that went through ``widths``; uint8 of shape [widths[-1]].

    Stage 0 are the original units, stage ``s`` those added when the axis went from ``widths[s - 1]`` to
    ``widths[s]``. Equal consecutive widths mean that stage ``s`` grew another axis.

    Raises:
        PlanError: if the widths ever shrink.
    """
    births = torch.zeros(widths[-1], dtype=torch.uint8)
    for stage, (before, after) in enumerate(itertools.pairwise(widths), start=1):
        if after < before:
            raise PlanError(f"an axis went through widths {widths}, which shrink at stage {stage}")
        births[before:after] = stage
    return births
