"""Births: in which growth each element of a parameter came to be.

An element is as young as the youngest of its indices. The sizes that its axes went through tell that, so no checkpoint
stores it and no memory goes with the elements: rows whose columns were born alike are told apart as one block.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ds_sparkling.growth.units import birth_of_units
from ds_sparkling.spec.axes import Dim, ParamAxes


@dataclass(frozen=True)
class BirthRun:
    """Columns up to ``stop`` (from where the run before it stops) that were born in ``birth``."""

    stop: int
    birth: int


@dataclass(frozen=True)
class Block:
    """Consecutive elements of a flat tensor: ``rows`` rows that are cut into the same runs, whatever their number.

    Attributes:
        start: the first element's index.
        rows: how many rows there are.
        runs: the runs of one row; the last one's ``stop`` is the row's length.
    """

    start: int
    rows: int
    runs: tuple[BirthRun, ...]

    @property
    def row(self) -> int:
        """Elements of a row."""
        return self.runs[-1].stop

    @property
    def stop(self) -> int:
        """The index after the last element's."""
        return self.start + self.rows * self.row

    @property
    def uniform(self) -> int | None:
        """The birth of all its elements, if it is the same."""
        return self.runs[0].birth if len(self.runs) == 1 else None


def stretch(start: int, stop: int, birth: int) -> Block:
    """A block of elements that were all born in ``birth``."""
    return Block(start, 1, (BirthRun(stop - start, birth),))


def birth_blocks(
    axes: ParamAxes,
    shape: tuple[int, ...],
    widths: Mapping[str, tuple[int, ...]],
    start: int,
    stop: int,
    *,
    layer: int = 0,
) -> list[Block]:
    """The births of the elements ``start`` to ``stop`` of a flattened parameter, as blocks that lie end to end.

    Args:
        axes: what the parameter's dimensions are.
        shape: its present shape.
        widths: per axis, its width at the start and after every growth; axes that never grew may be left out.
        start, stop: indices into the flattened parameter; the blocks count from ``start``.
        layer: in which growth the parameter's layer came to be.
    """
    if stop <= start:
        return []
    births = [_births_of_dim(dim, size, widths) for dim, size in zip(axes.dims, shape, strict=True)]
    grown = [position for position, per_index in enumerate(births) if per_index.any()]
    if not grown:
        return [stretch(0, stop - start, layer)]
    last = grown[-1]
    runs = _runs(births[last], math.prod(shape[last + 1 :]))
    row = runs[-1].stop
    # How old the other dimensions allow the elements of each row to be at most.
    floors = torch.full((1,), layer, dtype=torch.uint8)
    for per_index in births[:last]:
        floors = torch.maximum(floors[:, None], per_index[None, :]).flatten()
    blocks: list[Block] = []
    for first, end, floor in _stretches(floors, start // row, -(-stop // row)):
        blocks += _cut(first * row, end * row, _floored(runs, floor), start, stop)
    return join(replace(block, start=block.start - start) for block in blocks)


def join(blocks: Iterable[Block]) -> list[Block]:
    """Blocks that lie end to end, with neighbours of one birth joined."""
    joined: list[Block] = []
    for block in blocks:
        birth = block.uniform
        if joined and birth is not None and joined[-1].uniform == birth:
            joined[-1] = stretch(joined[-1].start, block.stop, birth)
        else:
            joined.append(block if birth is None else stretch(block.start, block.stop, birth))
    return joined


def _births_of_dim(dim: Dim, size: int, widths: Mapping[str, tuple[int, ...]]) -> Tensor:
    """Birth of every index of one dimension, uint8."""
    if not dim.axes & widths.keys():
        return torch.zeros(size, dtype=torch.uint8)

    def of_leaf(leaf: Dim) -> Tensor:
        if leaf.axis is None:
            return torch.zeros(leaf.fixed, dtype=torch.uint8)
        history = widths[leaf.axis]
        groups = leaf.groups if isinstance(leaf.groups, int) else widths[leaf.groups]
        return birth_of_units(history, groups)[leaf.units(history[-1])]

    return dim.laid(of_leaf)


def _stretches(births: Tensor, start: int, stop: int) -> Iterable[tuple[int, int, int]]:
    """(first, end, birth) of every stretch of equal entries between ``start`` and ``stop``."""
    window = births[start:stop]
    changes = (window[1:] != window[:-1]).nonzero().flatten() + 1
    bounds = [0, *changes.tolist(), len(window)]
    for first, end in itertools.pairwise(bounds):
        yield start + first, start + end, int(window[first])


def _runs(births: Tensor, trailing: int) -> tuple[BirthRun, ...]:
    """The runs of a row, whose indices have ``births`` and hold ``trailing`` elements each."""
    return tuple(BirthRun(end * trailing, birth) for _, end, birth in _stretches(births, 0, len(births)))


def _floored(runs: tuple[BirthRun, ...], floor: int) -> tuple[BirthRun, ...]:
    """The runs of a row that was itself born in ``floor``."""
    floored: list[BirthRun] = []
    for run in runs:
        birth = max(run.birth, floor)
        if floored and floored[-1].birth == birth:
            floored.pop()
        floored.append(BirthRun(run.stop, birth))
    return tuple(floored)


def _cut(first: int, end: int, runs: tuple[BirthRun, ...], start: int, stop: int) -> list[Block]:
    """Rows between the elements ``first`` and ``end``, without what lies outside of ``start`` to ``stop``."""
    row = runs[-1].stop
    low, high = max(first, start), min(end, stop)
    blocks = []
    while low < high:
        column = (low - first) % row
        if column or high - low < row:  # a part of a row
            width = min(row - column, high - low)
            inside = [
                BirthRun(min(run.stop, column + width) - column, run.birth)
                for before, run in zip((0, *(run.stop for run in runs)), runs, strict=False)
                if before < column + width and run.stop > column
            ]
            blocks.append(Block(low, 1, tuple(inside)))
            low += width
        else:
            rows = (high - low) // row
            blocks.append(Block(low, rows, runs))
            low += rows * row
    return blocks
