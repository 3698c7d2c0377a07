"""Which elements of a flat tensor were born in which growth stage.

A stretch of one birth stage costs nothing; where stages alternate, as in the columns of a fan-in dimension, a map takes
one byte per element.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

#: Up to as many runs of one birth stage are told apart without a map.
_FEW = 16


@dataclass(frozen=True)
class Segment:
    """Elements ``start`` to ``stop`` of a flat tensor: all of one birth stage, or each of its own (uint8)."""

    start: int
    stop: int
    births: int | Tensor

    @property
    def stages(self) -> frozenset[int]:
        """The birth stages that occur."""
        if isinstance(self.births, int):
            return frozenset((self.births,))
        return frozenset(self.births.unique().tolist())


def segments_of(pieces: Iterable[tuple[int, int, Tensor | None]], numel: int) -> tuple[Segment, ...]:
    """Cut a flat tensor of ``numel`` elements into segments, end to end.

    Args:
        pieces: (start, stop, births) in order; None for elements that are all original. What lies between them is
            padding, and counts as original.
        numel: the flat tensor's size.
    """
    merged: list[Segment] = []

    def add(segment: Segment) -> None:
        last = merged[-1] if merged else None
        if last and isinstance(last.births, int) and isinstance(segment.births, int) and last.births == segment.births:
            merged[-1] = Segment(last.start, segment.stop, last.births)
        else:
            merged.append(segment)

    end = 0
    for start, stop, births in [*pieces, (numel, numel, None)]:
        if start > end:
            add(Segment(end, start, 0))
        if stop > start:
            for segment in _runs(start, births) if births is not None else [Segment(start, stop, 0)]:
                add(segment)
        end = max(end, stop)
    return tuple(merged)


def _runs(start: int, births: Tensor) -> list[Segment]:
    """A few segments of one birth stage each, or a single one with a map."""
    changes = (births[1:] != births[:-1]).nonzero().flatten()
    if len(changes) >= _FEW:
        return [Segment(start, start + births.numel(), births)]
    bounds = [0, *(changes + 1).tolist(), births.numel()]
    return [Segment(start + a, start + b, int(births[a])) for a, b in itertools.pairwise(bounds)]
