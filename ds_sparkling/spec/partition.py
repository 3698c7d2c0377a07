"""Arithmetic of flat pieces: which part of a flattened parameter each rank of a group owns. No tensors, no I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload


@dataclass(frozen=True)
class Piece:
    """Elements ``start .. stop`` of a flattened parameter."""

    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


class Pieces(Sequence[Piece]):
    """One piece per rank, made when it is asked for: of thousands of ranks mostly one is.

    Args:
        ranks: how many.
        make: the piece of a rank.
    """

    def __init__(self, ranks: int, make: Callable[[int], Piece]) -> None:
        self._ranks = range(ranks)
        self._make = make

    def __len__(self) -> int:
        return len(self._ranks)

    @overload
    def __getitem__(self, index: int) -> Piece: ...

    @overload
    def __getitem__(self, index: slice) -> list[Piece]: ...

    def __getitem__(self, index: int | slice) -> Piece | list[Piece]:
        if isinstance(index, slice):
            return [self._make(rank) for rank in self._ranks[index]]
        return self._make(self._ranks[index])


def even_pieces(numel: int, ranks: int) -> Pieces:
    """The pieces that ZeRO stage 3 makes of a parameter: ``ceil(numel / ranks)`` each, the last ones short or empty."""
    return Pieces(ranks, lambda rank: even_piece(numel, ranks, rank))


def even_piece(numel: int, ranks: int, rank: int) -> Piece:
    """That of rank ``rank`` alone."""
    size = padded_piece(numel, ranks)
    return Piece(min(rank * size, numel), min((rank + 1) * size, numel))


def padded_piece(numel: int, ranks: int) -> int:
    """Elements that each rank stores of a parameter under ZeRO stage 3, padding included."""
    return -(-numel // ranks)


def window_pieces(offset: int, numel: int, window: int, ranks: int) -> Pieces:
    """The pieces that ZeRO stages 1 and 2 make of a parameter.

    All parameters of a group lie end to end in one flat tensor, and rank ``r`` owns the window
    ``r * window .. (r + 1) * window`` of it, wherever parameters begin and end.

    Args:
        offset: where the parameter starts in the flat tensor.
        numel: its elements.
        window: elements of each rank's window.
        ranks: how many windows there are.
    """
    return Pieces(ranks, lambda rank: window_piece(offset, numel, window, rank))


def window_piece(offset: int, numel: int, window: int, rank: int) -> Piece:
    """That of rank ``rank`` alone."""

    def clip(position: int) -> int:
        return min(max(position - offset, 0), numel)

    return Piece(clip(rank * window), clip((rank + 1) * window))


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
