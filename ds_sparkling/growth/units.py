"""Unit maps: which old unit each unit of a grown axis comes from.

The copy order is cyclic. New units come after the old ones, and new unit ``j`` is a copy of unit ``j mod d``; so at
twice the width unit ``d + i`` is the twin of unit ``i``, and at ``1 < d'/d < 2`` the first ``d' - d`` units get one.

Units may be parted into equal consecutive groups. Then groups are copied cyclically, and the units within each group
are: query heads stay with (the copy of) the key/value head that they share.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ds_sparkling.errors import PlanError


def check_widths(axis: str, before: int, after: int, groups: tuple[int, int] = (1, 1)) -> None:
    """Refuse anything but a widening.

    Raises:
        PlanError: if ``after`` is not larger than ``before``, either isn't positive, or the groups don't fit.
    """
    if before < 1 or after < 1:
        raise PlanError(f"{axis}: widths must be positive, got {before} -> {after}")
    if after == before:
        raise PlanError(f"{axis}: width {before} -> {after} changes nothing; leave the axis out of the growth")
    if after < before:
        raise PlanError(f"{axis}: width {before} -> {after} shrinks; growth only widens")
    if before % groups[0] or after % groups[1]:
        raise PlanError(f"{axis}: {before} -> {after} units can't be parted into {groups[0]} -> {groups[1]} groups")
    if groups[1] < groups[0] or after // groups[1] < before // groups[0]:
        raise PlanError(
            f"{axis}: {before} -> {after} units in {groups[0]} -> {groups[1]} groups: neither the groups nor the units "
            "in each may become fewer"
        )


def source_units(before: int, after: int, groups: tuple[int, int] = (1, 1)) -> Tensor:
    """Source unit of every unit, int64 of shape [after].

    Args:
        groups: how many groups there are before and after.
    """
    per_before, per_after = before // groups[0], after // groups[1]
    unit = torch.arange(after)
    return (unit // per_after) % groups[0] * per_before + unit % per_after % per_before


def old_units(before: int, after: int, groups: tuple[int, int] = (1, 1)) -> Tensor:
    """Which units are the old ones; bool of shape [after]."""
    unit, per_after = torch.arange(after), after // groups[1]
    return (unit // per_after < groups[0]) & (unit % per_after < before // groups[0])


def multiplicities(before: int, after: int, groups: tuple[int, int] = (1, 1)) -> Tensor:
    """How many units, itself included, each *unit's source* has after the growth; int64 of shape [after]."""
    source = source_units(before, after, groups)
    return torch.bincount(source, minlength=before)[source]


def twin_units(before: int, after: int, groups: tuple[int, int] = (1, 1)) -> Tensor:
    """All units with the same source as each unit, itself included; int64 of shape [most twins, after], -1 for none."""
    source = source_units(before, after, groups)
    order = source.argsort(stable=True)
    counts = torch.bincount(source, minlength=before)
    first = counts.cumsum(0) - counts
    twins = []
    for place in range(int(counts.max())):
        found = order[(first[source] + place).clamp(max=after - 1)]
        twins.append(torch.where(place < counts[source], found, -1))
    return torch.stack(twins)


def paired_units(before: int, after: int, groups: tuple[int, int] = (1, 1)) -> tuple[Tensor, Tensor]:
    """The new units in pairs, so that the two of a pair are fed alike.

    In a group that was there the first half of its new units is paired with the second, in order. Of new groups the
    first half is, unit by unit, with the second; one that is left over is paired in itself.

    Returns:
        The first of its pair for every unit (itself for an old one), int64 of shape [after]; and a sign of the same
        shape, 1, or -1 for the second of a pair, or 0 for a new unit that is left over.
    """
    old_groups, new_groups = groups[0], groups[1] - groups[0]
    units = torch.arange(after).view(groups[1], -1)
    within, apart = units[:old_groups, before // old_groups :], units[old_groups:]
    first, sign = torch.arange(after), torch.ones(after, dtype=torch.float64)
    even = apart[: new_groups // 2 * 2].reshape(1, -1)
    for new in (within, even, apart[new_groups // 2 * 2 :]):
        half = new.shape[1] // 2
        first[new[:, half : 2 * half]] = new[:, :half]
        sign[new[:, half:]] = -1.0
        sign[new[:, 2 * half :]] = 0.0
    return first, sign


def birth_of_units(widths: Sequence[int], groups: Sequence[int] | int = 1) -> Tensor:
    """Birth of every unit of an axis that went through ``widths``; uint8 of shape [widths[-1]].

    Birth 0 are the original units, birth ``s`` those added when the axis went from ``widths[s - 1]`` to
    ``widths[s]``. Equal consecutive widths mean that growth ``s`` grew another axis.

    Args:
        groups: how many groups there were at each of these, or always.

    Raises:
        PlanError: if the widths ever shrink.
    """
    counts = [groups] * len(widths) if isinstance(groups, int) else list(groups)
    per_group = [width // count for width, count in zip(widths, counts, strict=True)]
    within, of_groups = _births(per_group, widths), _births(counts, widths)
    return torch.maximum(of_groups[:, None], within[None, :]).flatten()


def _births(sizes: Sequence[int], widths: Sequence[int]) -> Tensor:
    births = torch.zeros(sizes[-1], dtype=torch.uint8)
    for growth, (before, after) in enumerate(itertools.pairwise(sizes), start=1):
        if after < before:
            raise PlanError(f"an axis went through widths {tuple(widths)}, which shrink at growth {growth}")
        births[before:after] = growth
    return births
