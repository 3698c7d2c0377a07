"""Noise on the weights that consume twins which changes nothing that they compute.

Twins (a unit and its copies) have the same activation right after the growth, so their consumers see only the sum of
their weights. Noise that sums to zero over twins therefore keeps the function, and gives each twin another gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_sparkling.growth.random import add_normal
from ds_sparkling.growth.scaling import AxisGrowth
from ds_sparkling.growth.survey import Spread
from ds_sparkling.growth.units import twin_units
from ds_sparkling.spec.axes import Dim, Role


@dataclass(frozen=True)
class Term:
    """One deviate in the noise on each entry of the dimension along which twins are consumed.

    Attributes:
        drawn_as: the entry whose deviate it is, int64 of shape [size].
        factor: what it is multiplied with, float64 of the same shape.
    """

    drawn_as: Tensor
    factor: Tensor


@dataclass(frozen=True, kw_only=True)
class ZeroSumNoise:
    """The noise on one grown weight; an element's depends on the old weight's RMS and on its own index alone.

    The weights that consume a unit with twins get noise of ``strength * RMS(old) * d/d'``: ``strength`` times the RMS
    of evenly shared copies. :func:`zero_sum` says how it cancels. Copies of a unit on the weight's other dimensions
    share its noise, so that they are still copies.

    Attributes:
        key: of the random stream.
        place: which of the weight's dimensions it is along which twins are consumed.
        terms: what :func:`zero_sum` gives for its entries.
        sources: the old index of every index, by dimension.
        first: index of the first expert held, for stacked experts.
        matrices: how many equal stretches with an RMS of their own the weight has.
    """

    key: int
    place: int
    terms: tuple[Term, ...]
    sources: tuple[Tensor, ...]
    first: int
    matrices: int

    def add(self, out_RC: Tensor, row: int, column: int, spreads: Sequence[Spread]) -> None:
        """Add it to the rectangle of the grown weight that begins at a row and a column.

        Rows are all dimensions but the last, flattened.
        """
        last = len(self.sources) - 1
        rows, columns = torch.arange(row, row + out_RC.shape[0]), slice(column, column + out_RC.shape[1])
        rms = torch.tensor([spread.rms for spread in spreads], dtype=torch.float64)
        rows_per_matrix = max(math.prod(map(len, self.sources[:-1])) // self.matrices, 1)
        for term in self.terms:
            if self.place == last:
                drawn_as, factor = term.drawn_as[columns], term.factor[columns]
            else:
                drawn_as, factor = self.sources[last][columns], torch.ones(out_RC.shape[1])
            row_drawn_as, row_factor = self._of_rows(rows, term)
            add_normal(out_RC, self.key, row_drawn_as, drawn_as, rms[rows // rows_per_matrix] * row_factor, factor)

    def _of_rows(self, rows: Tensor, term: Term) -> tuple[Tensor, Tensor]:
        """The rows whose deviates ``rows`` have in a term, and their factors."""
        drawn_as, factor = torch.zeros_like(rows), torch.ones(len(rows), dtype=torch.float64)
        stride = 1
        for place, source in reversed(list(enumerate(self.sources[:-1]))):
            index, rows = rows % len(source), rows // len(source)
            if place == self.place:
                drawn_as += term.drawn_as[index] * stride
                factor = term.factor[index]
                stride *= len(source)
            else:
                drawn_as += (source[index] + (self.first if place == 0 else 0)) * stride
                stride *= int(source.max()) + 1
        return drawn_as, factor


def zero_sum(twins: Tensor, strength: Tensor) -> tuple[Term, ...]:
    """Noise of RMS ``strength`` on entries, each different from its twins', that sums to zero over all twins.

    Twins go in pairs, with opposite deviates. Of an odd number the last three have the differences, over sqrt(2), of
    three deviates in a ring. An entry without twins has none.

    Args:
        twins: the entries that are consumed alike, as :func:`consumed_twins` gives them.
        strength: of each entry, the same for twins.
    """
    size = twins.shape[1]
    own, number = torch.arange(size), (twins >= 0).sum(0)
    place = (twins == own).int().argmax(0)  # among its twins
    ring = number - 3
    in_ring = (number % 2 == 1) & (place >= ring) & (number > 1)
    even = 1.0 - 2.0 * (place % 2).double()
    drawn_as = torch.where(in_ring, own, twins[place - place % 2, own])
    factor = torch.where(in_ring, math.sqrt(0.5), torch.where(number > 1, even, 0.0))
    terms = [Term(drawn_as, strength * factor)]
    if bool(in_ring.any()):
        following = torch.where(in_ring, ring + (place - ring + 1) % 3, place)
        terms.append(Term(twins[following, own], strength * -math.sqrt(0.5) * in_ring.double()))
    return tuple(terms)


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
