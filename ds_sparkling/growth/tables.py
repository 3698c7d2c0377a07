"""Tables of one growth: what every index along a dimension is after it, and what its entries are multiplied with.

A dimension's table depends on its layout and its size alone, so a thousand parameters of one layout share one. The
plan holds no tensor: tables are made when they are first asked for, and go with the :class:`GrowthTables`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar

import torch
from torch import Tensor

from ds_sparkling.growth.noise import Term, consumed_twins, zero_sum
from ds_sparkling.growth.plan import GrowthPlan
from ds_sparkling.growth.scaling import AxisGrowth, Scale, UnitScales, unit_scales
from ds_sparkling.growth.units import old_units, paired_units, source_units
from ds_sparkling.spec.axes import Dim, ParamAxes, Role
from ds_sparkling.spec.strategy import Init, NewIndex

_T = TypeVar("_T")


class Kind(IntEnum):
    """What the entries of an index are. Of an element's indices, the one of the largest kind decides."""

    OLD = 0
    COPY = 1
    MEAN = 2
    RANDOM = 3
    ZERO = 4


#: The kind of what is made as an :class:`Init` says.
OF_INIT = {Init.COPY: Kind.COPY, Init.RANDOM: Kind.RANDOM, Init.ZERO: Kind.ZERO, Init.CANCEL: Kind.RANDOM}
_OF_NEW_INDEX = {NewIndex.MEAN: Kind.MEAN, NewIndex.RANDOM: Kind.RANDOM}


@dataclass(frozen=True)
class IndexTable:
    """What every index of a dimension is, by tensors of shape [size after].

    Attributes:
        source: the old index that it is or comes from, int64.
        kind: its :class:`Kind`, uint8.
        drawn_as: the index whose random entries it has, int64: its own, or that of the first of its pair.
        sign: what random entries are multiplied with, float64; None for 1.
    """

    source: Tensor
    kind: Tensor
    drawn_as: Tensor
    sign: Tensor | None = None

    @property
    def signs(self) -> Tensor:
        """The signs, one per index."""
        return torch.ones(len(self.source), dtype=torch.float64) if self.sign is None else self.sign


@dataclass(frozen=True)
class IndexRun:
    """Indices ``start`` to ``stop`` of one kind, which come from consecutive old ones, from ``source`` on."""

    start: int
    stop: int
    source: int
    kind: Kind

    def __len__(self) -> int:
        return self.stop - self.start


class GrowthTables:
    """The tables of one growth.

    Args:
        plan: the growth.

    Raises:
        PlanError: if the strategy's scaling can't hold on an axis.
    """

    def __init__(self, plan: GrowthPlan) -> None:
        self.plan = plan
        self.growths: dict[str, AxisGrowth] = {growth.axis: growth for growth in plan.growths}
        self.scales: dict[str, UnitScales] = {
            growth.axis: unit_scales(growth, plan.strategy, plan.number) for growth in plan.growths
        }
        self._made: dict[Hashable, Any] = {}

    def indices(self, dim: Dim, size: int) -> IndexTable:
        """What the indices of a dimension are.

        Args:
            dim: settled for this growth.
            size: how many indices there are after it.
        """
        return self._once(("indices", dim, size), lambda: self._indices(dim, size))

    def runs(self, dim: Dim, size: int) -> list[IndexRun]:
        """The same indices as runs."""
        table = self.indices(dim, size)
        return self._once(("runs", dim, size), lambda: index_runs(table.source, table.kind))

    def weight_scale(self, dim: Dim, head_gain: bool) -> Scale:
        """The factor of a weight's entries: a float where it is the same for all, whatever piece is asked for."""
        return self._once(
            ("weight", dim, head_gain),
            lambda: self._scale(dim, lambda scales, leaf: scales.weight(leaf, head_gain), -dim.power),
        )

    def gradient_scale(self, dim: Dim, head_gain: bool) -> Scale:
        """The factor of the gradient's old entries."""
        return self._once(
            ("gradient", dim, head_gain),
            lambda: self._scale(dim, lambda scales, leaf: scales.gradient(leaf, head_gain), dim.power),
        )

    def multiplier(self, axes: ParamAxes) -> float:
        """How many times as much the model multiplies what a parameter gives, by widths that it doesn't carry."""
        grown = ((self.growths[axis], power) for axis, power in axes.powers if axis in self.growths)
        return math.prod((growth.after / growth.before) ** power for growth, power in grown)

    def noise(self, dim: Dim) -> tuple[Term, ...]:
        """The noise on the entries of a dimension along which twins are consumed, over the RMS of the old weights."""
        return self._once(
            ("noise", dim),
            lambda: zero_sum(consumed_twins(dim, self.growths), dim.laid(self._noise_strength)),
        )

    def consumes_grown(self, leaf: Dim) -> bool:
        """Whether a leaf consumes the units of an axis that grows."""
        return leaf.role is Role.FAN_IN and leaf.axis in self.growths

    def _once(self, key: Hashable, make: Callable[[], _T]) -> _T:
        if key not in self._made:
            self._made[key] = make()
        found: _T = self._made[key]
        return found

    def _scale(self, dim: Dim, choose: Callable[[UnitScales, Dim], Tensor], power: float) -> Scale:
        """The factors of a dimension's entries, from those of the units of its leaves."""
        if not dim.axes & self.scales.keys():
            return 1.0

        def of_leaf(leaf: Dim) -> Tensor:
            if leaf.axis is None:
                return torch.ones(leaf.fixed, dtype=torch.float64)
            per_unit = choose(self.scales[leaf.axis], leaf)
            return per_unit[leaf.units(len(per_unit))]

        factors = dim.laid(of_leaf)
        if dim.parts:
            factors = factors * self._stretch(dim) ** power
        return float(factors[0]) if bool((factors == factors[0]).all()) else factors

    def _stretch(self, dim: Dim) -> float:
        """How many times as many entries a segment of a dimension of parts gets."""
        before = sum(dim.sizes({axis: growth.before for axis, growth in self.growths.items()}))
        return sum(dim.sizes({axis: growth.after for axis, growth in self.growths.items()})) / before

    def _indices(self, dim: Dim, size: int) -> IndexTable:
        growths = self.growths
        if not dim.axes & growths.keys():
            return _unmoved(size)
        before = {axis: growth.before for axis, growth in growths.items()}
        after = {axis: growth.after for axis, growth in growths.items()}
        tables = {leaf: self._leaf_indices(leaf) for leaf in dim.leaves}
        signed = any(table.sign is not None for table in tables.values())
        return IndexTable(
            source=dim.laid_indices(lambda leaf: tables[leaf].source, before),
            kind=dim.laid(lambda leaf: tables[leaf].kind),
            drawn_as=dim.laid_indices(lambda leaf: tables[leaf].drawn_as, after),
            sign=dim.laid(lambda leaf: tables[leaf].signs) if signed else None,
        )

    def _leaf_indices(self, leaf: Dim) -> IndexTable:
        if leaf.axis is None:
            return _unmoved(leaf.fixed)
        growth = self.growths[leaf.axis]
        sizes = growth.before, growth.after, growth.groups
        new = torch.tensor([self._new_kind(leaf, segment) for segment in range(leaf.segments)], dtype=torch.uint8)
        old = old_units(*sizes)[leaf.units(growth.after)]
        kind = torch.where(old, int(Kind.OLD), new[leaf.segment(growth.after)])
        if not self.plan.strategy.cancels:
            own = torch.arange(leaf.size(growth.after))
            return IndexTable(leaf.sources(source_units(*sizes), growth.before), kind, own)
        # Copies that belong to a pair of units (biases of a convolution, say) must be the same for both.
        first, sign = paired_units(*sizes)
        source = leaf.sources(source_units(*sizes)[first], growth.before)
        drawn_as = leaf.sources(first, growth.after)
        return IndexTable(source, kind, drawn_as, sign[leaf.units(growth.after)] if leaf.role is Role.FAN_IN else None)

    def _new_kind(self, leaf: Dim, segment: int) -> Kind:
        """What new entries of a segment are."""
        strategy = self.plan.strategy
        if leaf.role is Role.GAIN:
            return OF_INIT[strategy.norm]
        if leaf.role is Role.INDEX:
            return _OF_NEW_INDEX[strategy.vocabulary]
        if leaf.role is Role.PER_UNIT:
            return Kind.COPY
        init = strategy.fan_out if leaf.role is Role.FAN_OUT else strategy.fan_in
        if init is Init.ZERO and segment in leaf.alive:
            return Kind.COPY
        return OF_INIT[init]

    def _noise_strength(self, leaf: Dim) -> Tensor:
        """RMS of the noise on each entry over that of the weights, times d/d'; float64."""
        if leaf.axis is None:
            return torch.zeros(leaf.fixed, dtype=torch.float64)
        growth = self.growths[leaf.axis]
        strength = self.plan.strategy.perturbation * growth.before / growth.after
        return torch.full((leaf.size(growth.after),), strength, dtype=torch.float64)


def _unmoved(size: int) -> IndexTable:
    """What the indices of a dimension that doesn't grow are."""
    own = torch.arange(size)
    return IndexTable(own, torch.full((size,), int(Kind.OLD), dtype=torch.uint8), own)


def index_runs(source: Tensor, kind: Tensor, first: int = 0) -> list[IndexRun]:
    """Split indices ``first ..`` wherever the kind changes or the sources stop being consecutive."""
    breaks = (source[1:] != source[:-1] + 1) | (kind[1:] != kind[:-1])
    starts = [0, *(breaks.nonzero().flatten() + 1).tolist()]
    stops = [*starts[1:], source.numel()]
    heads = torch.tensor(starts)
    return [
        IndexRun(first + start, first + stop, old, Kind(of_kind))
        for start, stop, old, of_kind in zip(starts, stops, source[heads].tolist(), kind[heads].tolist(), strict=True)
    ]
