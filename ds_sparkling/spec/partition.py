"""Arithmetic of flat pieces: which part of a flattened parameter each rank of a group owns. No tensors, no I/O."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

#: Elements of grown tensors that a rank gets the old elements for at a time.
BUCKET = 1 << 24


@dataclass(frozen=True)
class Piece:
    """Elements ``start .. stop`` of a flattened parameter."""

    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Pieces(Sequence[Piece]):
    """One piece of a parameter per rank, made when it is asked for: of thousands of ranks mostly one is.

    The parameter lies in a flat tensor, of which rank ``r`` owns the window ``r * window .. (r + 1) * window``. ZeRO
    stages 1 and 2 lay all parameters of a group end to end in one, wherever they begin and end; under stage 3 each has
    its own (:func:`even_pieces`).

    Attributes:
        numel: the parameter's elements.
        window: elements of each rank's window.
        ranks: how many windows there are.
        offset: where the parameter starts in the flat tensor.
    """

    numel: int
    window: int
    ranks: int
    offset: int = 0

    def __len__(self) -> int:
        return self.ranks

    @overload
    def __getitem__(self, index: int) -> Piece: ...

    @overload
    def __getitem__(self, index: slice) -> list[Piece]: ...

    def __getitem__(self, index: int | slice) -> Piece | list[Piece]:
        if isinstance(index, slice):
            return [self.within(rank, 0, self.window) for rank in range(self.ranks)[index]]
        return self.within(range(self.ranks)[index], 0, self.window)

    def within(self, rank: int, start: int, stop: int) -> Piece:
        """Which of the parameter's elements lie at ``start .. stop`` of a rank's window."""
        begin = rank * self.window - self.offset
        return Piece(
            min(max(begin + max(start, 0), 0), self.numel),
            min(max(begin + min(max(stop, 0), self.window), 0), self.numel),
        )

    def rank_of(self, element: int) -> int:
        """The rank that owns an element."""
        return (self.offset + element) // self.window


def even_pieces(numel: int, ranks: int) -> Pieces:
    """The pieces that ZeRO stage 3 makes of a parameter: ``ceil(numel / ranks)`` each, the last ones short or empty."""
    return Pieces(numel, padded_piece(numel, ranks), ranks)


def whole_piece(numel: int) -> Pieces:
    """That of a parameter which isn't partitioned."""
    return Pieces(numel, numel, 1)


def padded_piece(numel: int, ranks: int) -> int:
    """Elements that each rank stores of a parameter under ZeRO stage 3, padding included."""
    return -(-numel // ranks)


def sub_groups(sizes: Sequence[int], limit: int) -> list[int]:
    """How many parameters each sub-group of ZeRO stage 3 takes.

    A sub-group is closed as soon as its ranks' pieces reach ``limit`` elements.

    Args:
        sizes: :func:`padded_piece` of every parameter of the group.
        limit: DeepSpeed's ``sub_group_size``.
    """
    if limit >= sum(sizes):
        return [len(sizes)] if sizes else []
    counts, count, filled = [], 0, 0
    for size in sizes:
        count, filled = count + 1, filled + size
        if filled >= limit:
            counts.append(count)
            count, filled = 0, 0
    return [*counts, count] if count else counts


def expert_groups(sizes: Sequence[int], limit: int) -> list[int]:
    """How many parameters each optimizer group takes when DeepSpeed splits those of the experts.

    A group never exceeds ``limit`` elements unless it is one parameter; if the first parameter alone does, an empty
    group comes before it.

    Args:
        sizes: elements of every expert parameter on one rank, before it is partitioned.
    """
    counts, count, filled = [], 0, 0
    for size in sizes:
        if filled + size > limit:
            counts.append(count)
            count, filled = 0, 0
        count, filled = count + 1, filled + size
    return [*counts, count] if count else counts


def round_robin(count: int, ranks: int) -> list[int]:
    """Which parameter comes where when ZeRO stages 1 and 2 deal a group's ``count`` parameters out to ``ranks``."""
    return [index for first in range(min(ranks, count)) for index in range(first, count, ranks)]


def cut(start: int, stop: int, size: int) -> Iterator[tuple[int, int, int]]:
    """The elements ``start .. stop`` cut at the multiples of ``size``: (which multiple, offset in it, elements)."""
    while start < stop:
        index, offset = divmod(start, size)
        count = min(size - offset, stop - start)
        yield index, offset, count
        start += count
