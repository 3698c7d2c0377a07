"""Which unit is a copy of which, by lists of groups of units: what the package computes, counted out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Groups = tuple[int, int]


@dataclass(frozen=True)
class Unit:
    """A unit after a growth: the old unit that it is or comes from, and whether it is that one."""

    source: int
    old: bool


def grown_units(before: int, after: int, groups: Groups = (1, 1)) -> list[Unit]:
    """All units after a growth: each group goes round its own units, then whole groups are copied in turn."""
    per_before, per_after = before // groups[0], after // groups[1]
    grown: list[list[Unit]] = []
    for first in range(0, before, per_before):
        group = [Unit(source, True) for source in range(first, first + per_before)]
        while len(group) < per_after:
            group.append(Unit(group[-per_before].source, False))
        grown.append(group)
    while len(grown) < groups[1]:
        grown.append([Unit(unit.source, False) for unit in grown[-groups[0]]])
    return [unit for group in grown for unit in group]


def births(widths: Sequence[int], groups: Sequence[int]) -> list[int]:
    """The stage in which every unit came to be, after growing from each of ``widths`` to the next."""
    per_group = [width // count for width, count in zip(widths, groups, strict=True)]
    alive = [[0] * per_group[0] for _ in range(groups[0])]
    for stage in range(1, len(widths)):
        for group in alive:
            group += [stage] * (per_group[stage] - len(group))
        alive += [[stage] * per_group[stage] for _ in range(groups[stage] - len(alive))]
    return [birth for group in alive for birth in group]


@dataclass(frozen=True)
class Entry:
    """What one index of a dimension stands for."""

    segment: int
    unit: int
    place: int


def entries(width: int, segments: int, block: int, *, interleaved: bool) -> list[Entry]:
    """Every index of a dimension in order: segment by segment, or unit by unit; the places in a block run fastest."""
    if interleaved:
        return [Entry(s, u, b) for u in range(width) for s in range(segments) for b in range(block)]
    return [Entry(s, u, b) for s in range(segments) for u in range(width) for b in range(block)]
