"""Exact statistics of a tensor, from any pieces of it and whatever the order they are summed in.

A floating-point sum depends on its order, and so on threads, ranks and file boundaries. These sums are taken over
integers: every value is rounded to 24 bits below its matrix's largest power of two, so partial sums of any pieces
add up to the same total. That takes two passes: one for the largest values, one for the sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_BITS = 24
_CHUNK = 1 << 20

#: What gives the elements start..stop of a flattened tensor, 1-D: of one that is never held as a whole.
Elements = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Spread:
    """Mean and root mean square of the entries of one weight matrix."""

    mean: float
    rms: float

    @property
    def std(self) -> float:
        return math.sqrt(max(self.rms**2 - self.mean**2, 0.0))


@dataclass(frozen=True)
class Statistics:
    """What new entries of one parameter need to know of all its old ones.

    Attributes:
        spreads: of every weight matrix (per expert, per segment of the fan-out), if any entry is drawn.
        mean: mean over the old indices, float64, one number per entry of one of them (per old column, where rows are
            indices), if new indices get it.
    """

    spreads: tuple[Spread, ...] = ()
    mean: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The statistics of one tensor.

    :meth:`largest` of pieces that make up the tensor are maximised, then their :meth:`sums` added up, and both together
    are the :meth:`statistics`.

    Attributes:
        numel: elements of the tensor.
        matrices: how many equal stretches have a spread of their own; 0 for no spreads.
        columns: entries of its last dimension.
        mean_of: what there is a mean of, if of anything: "rows" (one number per column) or "columns".
    """

    numel: int
    matrices: int = 0
    columns: int = 1
    mean_of: str | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """How many numbers :meth:`largest` and :meth:`sums` are."""
        means = {None: 0, "rows": self.columns, "columns": self.numel // max(self.columns, 1)}[self.mean_of]
        return self.matrices + (self.mean_of is not None), 3 * self.matrices + means

    def largest(self, elements: Elements, start: int, stop: int) -> Tensor:
        """The largest absolute values of the elements ``start .. stop``: per matrix, and of all if there is a mean.

        Args:
            elements: never asked for more than some megabytes at once.
            start, stop: indices into the flattened tensor.

        Returns:
            float64 on the CPU; infinite where an entry isn't finite.
        """
        found = torch.zeros(self.sizes[0], dtype=torch.float64)
        for place, first, last in self._matrices_in(start, stop):
            found[place] = _largest(elements, first, last)
        if self.mean_of is not None:
            found[-1] = _largest(elements, start, stop)
        return found

    def sums(self, elements: Elements, start: int, stop: int, largest: Tensor) -> Tensor:
        """Sums over the elements ``start .. stop``, in units of the whole tensor's ``largest``; int64 on the CPU.

        Raises:
            ValueError: if an entry of the tensor isn't finite.
        """
        units = _units(largest)
        moments = torch.zeros(self.matrices, 3, dtype=torch.int64)
        for place, first, last in self._matrices_in(start, stop):
            moments[place] = _moments(elements, first, last, units[place])
        return torch.cat([moments.flatten(), self._totals(elements, start, stop, units)])

    def statistics(self, largest: Tensor, sums: Tensor) -> Statistics:
        """The statistics, from both passes over the whole tensor.

        Raises:
            ValueError: if an entry isn't finite.
        """
        units = _units(largest)
        moments, totals = sums[: 3 * self.matrices].view(-1, 3).tolist(), sums[3 * self.matrices :]
        spreads = []
        for (total, high, low), unit in zip(moments, units, strict=False):
            count = self.numel // self.matrices
            mean_square = ((high << _BITS) + low) / count
            spreads.append(Spread(total / count * unit, math.sqrt(mean_square) * unit))
        if self.mean_of is None:
            return Statistics(tuple(spreads))
        return Statistics(tuple(spreads), totals.double() / (self.numel // len(totals)) * units[-1])

    def of(self, elements: Elements) -> Statistics:
        """The statistics of a tensor that is all here.

        Raises:
            ValueError: if an entry isn't finite.
        """
        largest = self.largest(elements, 0, self.numel)
        return self.statistics(largest, self.sums(elements, 0, self.numel, largest))

    def _matrices_in(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(which matrix, start, stop) of every stretch of a matrix in ``start .. stop``."""
        if not self.matrices or start >= stop:
            return
        size = self.numel // self.matrices
        for place in range(start // size, -(-stop // size)):
            yield place, max(start, place * size), min(stop, (place + 1) * size)

    def _totals(self, elements: Elements, start: int, stop: int, units: list[float]) -> Tensor:
        """Sums over the rows, or over the columns."""
        if self.mean_of is None:
            return torch.empty(0, dtype=torch.int64)
        of_rows = self.mean_of == "rows"
        totals = torch.zeros(self.sizes[1] - 3 * self.matrices, dtype=torch.int64)
        for first, last in self._rows_in(start, stop):
            row, column = divmod(first, self.columns)
            width = min(last - first, self.columns)
            values = _rounded(elements(first, last), units[-1]).view(-1, width)
            if of_rows:
                totals[column : column + width] += values.sum(0).cpu()
            else:
                totals[row : row + len(values)] += values.sum(1).cpu()
        return totals

    def _rows_in(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Stretches that are some whole rows, or a part of one."""
        at_once = max(_CHUNK // self.columns, 1) * self.columns
        while start < stop:
            row_end = (start // self.columns + 1) * self.columns
            whole = start % self.columns == 0 and row_end <= stop
            last = min(start + at_once, stop // self.columns * self.columns) if whole else min(row_end, stop)
            yield start, last
            start = last


def _units(largest: Tensor) -> list[float]:
    """What entries are rounded to a multiple of: 2^-24 of the smallest power of two above the largest one."""
    if not bool(largest.isfinite().all()):
        raise ValueError("a weight that new entries are made after holds NaN or Inf")
    return [2.0 ** (math.frexp(value)[1] - _BITS) for value in largest.tolist()]


def _largest(elements: Elements, start: int, stop: int) -> float:
    """Infinite if an entry isn't finite."""
    found = [float(chunk.abs().max()) for chunk in _chunks(elements, start, stop)]
    return max(found, default=0.0) if all(map(math.isfinite, found)) else math.inf


def _moments(elements: Elements, start: int, stop: int, unit: float) -> Tensor:
    """Sum, and sum of squares in two halves: [3]."""
    total = torch.zeros(3, dtype=torch.int64)
    for chunk in _chunks(elements, start, stop):
        q = _rounded(chunk, unit)
        square = q * q
        # q <= 2^24, so a square needs 49 bits: summed in halves, 2^38 entries can't overflow int64.
        halves = (q.sum(), (square >> _BITS).sum(), (square & ((1 << _BITS) - 1)).sum())
        total += torch.stack(halves).cpu()
    return total


def _rounded(chunk: Tensor, unit: float) -> Tensor:
    return (chunk.double() / unit).round().long()


def _chunks(elements: Elements, start: int, stop: int) -> Iterator[Tensor]:
    for first in range(start, stop, _CHUNK):
        yield elements(first, min(first + _CHUNK, stop))
