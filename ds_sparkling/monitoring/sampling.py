"""Choose which tensors, and which of their elements, a statistic looks at when all would be too many."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Evenly spaced indices along every dimension of a tensor.

    Attributes:
        shape: the tensor's.
        counts: how many indices of each dimension are taken; index ``i`` of them is ``i * size // count``.
    """

    shape: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def whole(self) -> bool:
        """Whether it has every element."""
        return self.counts == self.shape

    @property
    def numel(self) -> int:
        return math.prod(self.counts)

    def flat(self) -> Tensor:
        """The elements' indices in the flattened tensor, ascending; int64 [numel]."""
        flat = torch.zeros(1, dtype=torch.int64)
        for size, count in zip(self.shape, self.counts, strict=True):
            indices = torch.arange(count) * size // count
            flat = (flat[:, None] * size + indices[None, :]).flatten()
        return flat


def thinned(shape: tuple[int, ...], limit: int, keep: Collection[int] = ()) -> Grid:
    """A grid of ``limit`` elements at most, if that can be: dimensions are thinned from the first on, to one index each
    at most, but for those in ``keep``. What comes first in a shape, as experts and tokens do, recurs the most."""
    counts = list(shape)
    order = [position for position in range(len(shape)) if position not in keep]
    for position in order:
        excess = math.prod(counts) / limit
        if excess > 1:
            counts[position] = max(1, math.floor(counts[position] / excess))
    return Grid(shape, tuple(counts))


def chosen(names: Sequence[str], count: int) -> list[str]:
    """At most ``count`` of the names, in their order, the same in every process: a random sample, so that parameters
    that recur from block to block don't all come out alike."""
    if len(names) <= count:
        return list(names)
    picked = torch.randperm(len(names), generator=torch.Generator().manual_seed(len(names)))[:count]
    return [names[index] for index in picked.sort().values.tolist()]
