"""Exact mean and root mean square of weight matrices, whatever the order they are summed in.

A floating-point sum depends on its order, and so on threads, ranks and file boundaries. These sums are taken over
integers: every value is rounded to 24 bits below its matrix's largest power of two, so partial sums of any pieces
add up to the same total.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

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

    def chunks() -> Iterator[Tensor]:
        for first in range(start, stop, _CHUNK):
            yield elements(first, min(first + _CHUNK, stop))

    largest = 0.0
    for chunk in chunks():
        largest_here = float(chunk.abs().max())
        if not math.isfinite(largest_here):
            raise ValueError("a weight that random entries are drawn after holds NaN or Inf")
        largest = max(largest, largest_here)
    if largest == 0.0:
        return Spread(0.0, 0.0)
    unit = 2.0 ** (math.frexp(largest)[1] - _BITS)
    total, square_high, square_low = 0, 0, 0
    for chunk in chunks():
        q = (chunk.double() / unit).round().long()
        total += int(q.sum())
        square = q * q
        # q <= 2^24, so a square needs 49 bits: summed in halves, 2^38 entries can't overflow int64.
        square_high += int((square >> _BITS).sum())
        square_low += int((square & ((1 << _BITS) - 1)).sum())
    count = stop - start
    mean_square = ((square_high << _BITS) + square_low) / count
    return Spread(total / count * unit, math.sqrt(mean_square) * unit)
