"""Sets of elements of a flattened tensor, as stretches that lie apart, in ascending order."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Stretches:
    """The elements ``starts[i] .. stops[i]`` of a flattened tensor, for all i; int64, [N] each."""

    starts: Tensor
    stops: Tensor

    @staticmethod
    def none() -> Stretches:
        empty = torch.empty(0, dtype=torch.int64)
        return Stretches(empty, empty)

    @staticmethod
    def one(start: int, stop: int) -> Stretches:
        return Stretches(torch.tensor([start]), torch.tensor([stop])) if start < stop else Stretches.none()

    @staticmethod
    def union(starts: Tensor, stops: Tensor) -> Stretches:
        """All elements of stretches that may overlap, touch, and come in any order, but are none of them empty."""
        if not len(starts):
            return Stretches.none()
        starts, order = starts.sort()
        reached = stops[order].cummax(0).values
        apart = torch.cat([torch.ones(1, dtype=torch.bool), starts[1:] > reached[:-1]])
        return Stretches(starts[apart], reached[torch.cat([apart[1:], torch.ones(1, dtype=torch.bool)])])

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self.starts.tolist(), self.stops.tolist(), strict=True)

    @cached_property
    def numel(self) -> int:
        return int((self.stops - self.starts).sum())

    def within(self, start: int, stop: int) -> Stretches:
        """Those of the elements that lie in ``start .. stop``."""
        first = int(torch.searchsorted(self.stops, start, right=True))
        last = int(torch.searchsorted(self.starts, stop))
        if first >= last or start >= stop:
            return Stretches.none()
        return Stretches(self.starts[first:last].clamp(min=start), self.stops[first:last].clamp(max=stop))

    def packed(self, tensor: Tensor, start: int, out: Tensor) -> None:
        """Copy the elements one after the other.

        Args:
            tensor: 1-D, from the element ``start`` on.
            out: 1-D, of :attr:`numel` elements.
        """
        if len(self) > 2 and _alike(self.stops - self.starts) and _alike(self.starts.diff()):
            size, step = int(self.stops[0] - self.starts[0]), int(self.starts[1] - self.starts[0])
            rows = tensor.as_strided(
                (len(self), size), (step, 1), tensor.storage_offset() + int(self.starts[0]) - start
            )
            out.view(rows.shape).copy_(rows)
        elif len(self):
            torch.cat([tensor[first - start : last - start] for first, last in self], out=out)


def _alike(values: Tensor) -> bool:
    return bool((values == values[0]).all())


class Packed:
    """Gives elements of a tensor of which only some stretches are there.

    Args:
        stretches: which are.
        values: those, one after the other, 1-D.
    """

    def __init__(self, stretches: Stretches, values: Tensor) -> None:
        self._starts: Sequence[int] = stretches.starts.tolist()
        sizes = stretches.stops - stretches.starts
        self._offsets: Sequence[int] = (sizes.cumsum(0) - sizes - stretches.starts).tolist()
        self._values = values

    def __call__(self, start: int, stop: int) -> Tensor:
        """The elements ``start .. stop``, which lie in one of the stretches; 1-D."""
        offset = self._offsets[bisect_right(self._starts, start) - 1]
        return self._values[start + offset : stop + offset]
