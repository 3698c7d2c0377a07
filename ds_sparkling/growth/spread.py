"""Exact mean and root mean square of weight matrices, whatever the order they are summed in.

A floating-point sum depends on its order, and so on threads, ranks and file boundaries. These sums are taken over
integers: every value is rounded to 24 bits below its matrix's largest power of two, so partial sums of any pieces
add up to the same total.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_BITS = 24
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Spread:
    """Mean and root mean square of the entries of one weight matrix."""

    mean: float
    rms: float

    @property
    def std(self) -> float:
        return math.sqrt(max(self.rms**2 - self.mean**2, 0.0))


def spread(elements: Callable[[int, int], Tensor], start: int, stop: int) -> Spread:
    """The :class:`Spread` of the elements ``start .. stop`` (at least one), reproducible to the last bit.

    Each entry is rounded to 2^-24 of the smallest power of two above the largest entry.

    Args:
        elements: gives any stretch of the elements, 1-D; never asked for more than some megabytes at once.

    Raises:
        ValueError: if an entry isn't finite.
    """
    unit = _unit(elements, start, stop)
    total, square_high, square_low = 0, 0, 0
    for chunk in _chunks(elements, start, stop, _CHUNK):
        q = (chunk.double() / unit).round().long()
        total += int(q.sum())
        square = q * q
        # q <= 2^24, so a square needs 49 bits: summed in halves, 2^38 entries can't overflow int64.
        square_high += int((square >> _BITS).sum())
        square_low += int((square & ((1 << _BITS) - 1)).sum())
    count = stop - start
    mean_square = ((square_high << _BITS) + square_low) / count
    return Spread(total / count * unit, math.sqrt(mean_square) * unit)


def row_mean(elements: Callable[[int, int], Tensor], start: int, stop: int, columns: int) -> Tensor:
    """Mean over the rows of the matrix ``start .. stop``, float64 of shape [columns], as reproducible as a spread.

    Raises:
        ValueError: if an entry isn't finite.
    """
    unit = _unit(elements, start, stop)
    total = torch.zeros(columns, dtype=torch.int64)
    for chunk in _chunks(elements, start, stop, max(_CHUNK // columns, 1) * columns):
        total += (chunk.double() / unit).round().long().view(-1, columns).sum(0).cpu()
    return total.double() / ((stop - start) // columns) * unit


def column_mean(elements: Callable[[int, int], Tensor], start: int, stop: int, columns: int) -> Tensor:
    """Mean over the columns of the matrix ``start .. stop``, float64 of shape [rows], as reproducible as a spread.

    Raises:
        ValueError: if an entry isn't finite.
    """
    unit = _unit(elements, start, stop)
    totals = [
        (chunk.double() / unit).round().long().view(-1, columns).sum(1).cpu()
        for chunk in _chunks(elements, start, stop, max(_CHUNK // columns, 1) * columns)
    ]
    return torch.cat(totals).double() / columns * unit


def _unit(elements: Callable[[int, int], Tensor], start: int, stop: int) -> float:
    """What entries are rounded to a multiple of."""
    largest = 0.0
    for chunk in _chunks(elements, start, stop, _CHUNK):
        largest_here = float(chunk.abs().max())
        if not math.isfinite(largest_here):
            raise ValueError("a weight that new entries are made after holds NaN or Inf")
        largest = max(largest, largest_here)
    return 2.0 ** (math.frexp(largest)[1] - _BITS)


def _chunks(elements: Callable[[int, int], Tensor], start: int, stop: int, size: int) -> Iterator[Tensor]:
    for first in range(start, stop, size):
        yield elements(first, min(first + size, stop))
