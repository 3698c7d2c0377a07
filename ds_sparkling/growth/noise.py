"""Noise on the weights that consume twins which changes nothing that they compute.

Twins (a unit and its copies) have the same activation right after the growth, so their consumers see only the sum of
their weights. Noise that sums to zero over twins therefore keeps the function, and gives each twin another gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ds_sparkling.axes import Dim
from ds_sparkling.growth.random import standard_normal
from ds_sparkling.growth.scaling import AxisGrowth
from ds_sparkling.growth.spread import Spread
from ds_sparkling.growth.units import twin_units

#: Elements drawn at a time.
_CHUNK = 1 << 16


@dataclass(frozen=True)
class ZeroSumNoise:
    """The noise on one grown weight; an element's depends on the old weight's RMS and on its own index alone.

    Element w of a unit with m > 1 twins gets ``strength * RMS(old) * d/d' * sqrt(m / (m - 1)) * (n - mean of n over the
    twins)`` with n standard normal: noise of ``strength`` times the RMS of evenly shared copies. Copies of a unit on
    the weight's other dimensions share its noise, so that they are still copies.

    Attributes:
        key: of the random stream.
        place: which of the weight's dimensions twins are consumed along.
        twins: its entries that are consumed alike (:func:`consumed_alike`).
        growth: of the axis it carries.
        sources: the old index of every index, by dimension.
        first: index of the first expert held, for stacked experts.
        strength: RMS of the noise over that of the weights.
        matrices: how many equal stretches with an RMS of their own the weight has.
    """

    key: int
    place: int
    twins: Tensor
    growth: AxisGrowth
    sources: tuple[Tensor, ...]
    first: int
    strength: float
    matrices: int

    def add(self, out: Tensor, start: int, spreads: Sequence[Spread]) -> None:
        """Add it to the elements ``start ..`` of the grown weight, 1-D."""
        rms = torch.tensor([spread.rms for spread in spreads], dtype=torch.float64)
        per_matrix = max(math.prod(self._sizes) // self.matrices, 1)
        for first in range(start, start + out.numel(), _CHUNK):
            flat = torch.arange(first, min(first + _CHUNK, start + out.numel()))
            noise = self._of(flat) * rms[flat // per_matrix]
            out[first - start : first - start + len(flat)] += noise.to(out.device, out.dtype)

    def _of(self, flat: Tensor) -> Tensor:
        """The noise of some elements over the RMS of their matrix, float64."""
        base = torch.zeros_like(flat)
        stride, rest = 1, flat
        own, own_stride = flat, 1
        for place, (size, source) in reversed(list(enumerate(zip(self._sizes, self.sources, strict=True)))):
            index = rest % size
            rest = rest // size
            if place == self.place:
                own, own_stride = index, stride
                stride *= size
            else:
                base += (source[index] + (self.first if place == 0 else 0)) * stride
                stride *= int(source.max()) + 1
        twins = self.twins[:, own]
        exists = twins >= 0
        # One after the other: how a reduction adds up depends on how many elements are asked for.
        total = torch.zeros(len(flat), dtype=torch.float64)
        for of_twin, there in zip(twins, exists, strict=True):
            total += standard_normal(self.key, base + of_twin * own_stride) * there
        m = exists.sum(0)
        noise = standard_normal(self.key, base + own * own_stride) - total / m
        factor = self.strength * self.growth.before / self.growth.after
        return torch.where(m > 1, factor * noise * (m / (m - 1).clamp(min=1)).sqrt(), 0.0)

    @cached_property
    def _sizes(self) -> tuple[int, ...]:
        return tuple(len(source) for source in self.sources)


def consumed_alike(dim: Dim, growth: AxisGrowth) -> Tensor:
    """The entries of a grown dimension that consume the same, int64 of shape [most twins, size]; -1 for none."""
    units = twin_units(growth.before, growth.after, growth.groups)
    entries = [dim.sources(twins.clamp(min=0), growth.after) for twins in units]
    of_entry = dim.units(growth.after)
    return torch.stack([torch.where(t[of_entry] >= 0, e, -1) for t, e in zip(units, entries, strict=True)])
