"""Noise on the weights that consume twins which changes nothing that they compute.

Twins (a unit and its copies) have the same activation right after the growth, so their consumers see only the sum of
their weights. Noise that sums to zero over twins therefore keeps the function, and gives each twin another gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ds_sparkling.growth.random import standard_normal
from ds_sparkling.growth.scaling import AxisGrowth
from ds_sparkling.growth.survey import Spread
from ds_sparkling.growth.units import twin_units
from ds_sparkling.spec.axes import Dim, Role

#: Elements drawn at a time.
_CHUNK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class ZeroSumNoise:
    """The noise on one grown weight; an element's depends on the old weight's RMS and on its own index alone.

    Element w of a unit with m > 1 twins gets ``strength * RMS(old) * d/d' * sqrt(m / (m - 1)) * (n - mean of n over the
    twins)`` with n standard normal: noise of ``strength`` times the RMS of evenly shared copies. Copies of a unit on
    the weight's other dimensions share its noise, so that they are still copies.

    Attributes:
        key: of the random stream.
        place: which of the weight's dimensions it is along which twins are consumed.
        twins: the entries of that dimension that are consumed alike, int64 of shape [most twins, size]; -1 for none.
        strength: RMS of the noise over that of the weights, times d/d', for each of its entries; float64.
        sources: the old index of every index, by dimension.
        first: index of the first expert held, for stacked experts.
        matrices: how many equal stretches with an RMS of their own the weight has.
    """

    key: int
    place: int
    twins: Tensor
    strength: Tensor
    sources: tuple[Tensor, ...]
    first: int
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
        return torch.where(m > 1, self.strength[own] * noise * (m / (m - 1).clamp(min=1)).sqrt(), 0.0)

    @cached_property
    def _sizes(self) -> tuple[int, ...]:
        return tuple(len(source) for source in self.sources)


def consumed_twins(dim: Dim, growths: Mapping[str, AxisGrowth]) -> Tensor:
    """The entries of a dimension that are consumed alike: of every entry, all with the same source, itself included.

    What isn't consumed, or never grows, has only itself.

    Args:
        dim: settled for this growth.
        growths: of the grown axes.

    Returns:
        int64 of shape [most twins, size]; -1 for none.
    """
    after = {axis: growth.after for axis, growth in growths.items()}

    def of_leaf(leaf: Dim) -> Tensor:
        if leaf.axis is None or leaf.role is not Role.FAN_IN:
            return torch.arange(leaf.size(after.get(leaf.axis or "", 0)))[None]
        growth = growths[leaf.axis]
        units = twin_units(growth.before, growth.after, growth.groups)
        entries = torch.stack([leaf.sources(twins.clamp(min=0), growth.after) for twins in units])
        return torch.where(units[:, leaf.units(growth.after)] >= 0, entries, -1)

    found = {leaf: of_leaf(leaf) for leaf in dim.leaves}
    most = max(map(len, found.values()))

    def of_place(place: int) -> Tensor:
        of_leaves = {leaf: t[place] if place < len(t) else torch.full_like(t[0], -1) for leaf, t in found.items()}
        there = dim.laid(lambda leaf: of_leaves[leaf] >= 0)
        return torch.where(there, dim.laid_indices(lambda leaf: of_leaves[leaf], after), -1)

    return torch.stack([of_place(place) for place in range(most)])
