"""Measure whether copied units have parted from their sources."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ds_sparkling.growth.units import old_units, source_units
from ds_sparkling.spec.axes import Dim, ParamAxes, Role


def twin_cosine(
    weight: Tensor, axes: ParamAxes, axis: str, before: Mapping[str, int], after: Mapping[str, int]
) -> Tensor:
    """Cosine between every unit that ``axis`` gained and its source, in what the parameter holds of them.

    A unit's vector is all that belongs to it, within one expert if experts are stacked. Twins are parted when the
    cosine falls below 1 (Sec. 4.1); at 1 they are locked.

    Args:
        weight: a parameter or its gradient, at widths with ``axis`` at ``after``; all entries of the dimension along
            ``axis``, and of the other dimensions any sample.
        axes: what its dimensions are.
        axis: the axis whose units are compared.
        before, after: the widths before and after the growth that made the copies.

    Returns:
        fp64: one cosine per new unit, segment and expert, but for units that are zero (a gradient may be) and those of
        a single entry (a bias), of which a cosine tells nothing; empty if the parameter has no fan-out dimension along
        ``axis``.
    """
    position = twin_dimension(axes, axis)
    if position is None:
        return weight.new_empty(0, dtype=torch.float64)
    places = _places_of_twins(axes.dims[position], axis)
    return torch.cat([_cosine(weight, axes, position, place, before, after) for place in places])


def _cosine(
    weight: Tensor, axes: ParamAxes, position: int, place: int, before: Mapping[str, int], after: Mapping[str, int]
) -> Tensor:
    """The same of the units that the leaf at ``place`` of a dimension holds."""
    dim = axes.dims[position]
    leaf = dim.leaves[place]
    # A unit's entries, by expert and segment: [experts, segments, units, entries].
    experts = weight.shape[0] if axes.stacked_experts and position > 0 else 1
    leading, trailing = weight.shape[:position].numel() // experts, weight.shape[position + 1 :].numel()
    axis = leaf.axis or ""
    width, outer = after[axis], dim.segments if dim.parts else 1
    parted = weight.double().reshape(experts, leading, outer, -1, trailing)
    if dim.parts:
        sizes = dim.sizes(after)
        parted = parted.narrow(3, sum(sizes[:place]), sizes[place])
    parts = (width, leaf.segments) if leaf.interleaved else (leaf.segments, width)
    units = parted.reshape(experts, leading, outer, *parts, leaf.block * trailing)
    if leaf.interleaved:
        units = units.transpose(3, 4)
    units = units.permute(0, 2, 3, 4, 1, 5).flatten(4).flatten(1, 2)
    if units.shape[-1] < 2:
        return weight.new_empty(0, dtype=torch.float64)
    groups = leaf.group_count(before), leaf.group_count(after)
    old = old_units(before[axis], width, groups)
    made = ~old
    # Old units move apart where their groups grow.
    old_places = old.nonzero().flatten()
    source = old_places[source_units(before[axis], width, groups)[made]]
    new, twin = units[:, :, made.to(weight.device)], units[:, :, source.to(weight.device)]
    product, norm, twin_norm = ((a * b).sum(-1).flatten() for a, b in ((new, twin), (new, new), (twin, twin)))
    apart = (norm > 0) & (twin_norm > 0)
    return (product[apart] / (norm[apart] * twin_norm[apart]).sqrt()).clamp(-1.0, 1.0)


def twin_dimension(axes: ParamAxes, axis: str) -> int | None:
    """The dimension of a parameter that holds units of ``axis`` as the fan-out of a map; None if there is none."""
    for position, dim in enumerate(axes.dims):
        if _places_of_twins(dim, axis):
            return position
    return None


def _places_of_twins(dim: Dim, axis: str) -> list[int]:
    return [place for place, leaf in enumerate(dim.leaves) if leaf.axis == axis and leaf.role is Role.FAN_OUT]
