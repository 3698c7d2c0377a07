"""Whether copied units have parted from their sources."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ds_sparkling.axes import ParamAxes, Role
from ds_sparkling.growth.units import old_units, source_units


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
    dim = axes.dims[position]
    # A unit's entries, by expert and segment: [experts, segments, units, entries].
    experts = weight.shape[0] if axes.stacked_experts and position > 0 else 1
    leading, trailing = weight.shape[:position].numel() // experts, weight.shape[position + 1 :].numel()
    width = after[axis]
    parts = (width, dim.segments) if dim.interleaved else (dim.segments, width)
    units = weight.double().reshape(experts, leading, *parts, dim.block * trailing)
    if dim.interleaved:
        units = units.transpose(2, 3)
    units = units.permute(0, 2, 3, 1, 4).flatten(3)
    if units.shape[-1] < 2:
        return weight.new_empty(0, dtype=torch.float64)
    groups = dim.group_count(before), dim.group_count(after)
    old = old_units(before[axis], width, groups)
    made = ~old
    # Old units move apart where their groups grow.
    place = old.nonzero().flatten()
    source = place[source_units(before[axis], width, groups)[made]]
    new, twin = units[:, :, made.to(weight.device)], units[:, :, source.to(weight.device)]
    product, norm, twin_norm = ((a * b).sum(-1).flatten() for a, b in ((new, twin), (new, new), (twin, twin)))
    apart = (norm > 0) & (twin_norm > 0)
    return (product[apart] / (norm[apart] * twin_norm[apart]).sqrt()).clamp(-1.0, 1.0)


def twin_dimension(axes: ParamAxes, axis: str) -> int | None:
    """The dimension of a parameter that holds units of ``axis`` as the fan-out of a map; None if there is none."""
    for position, dim in enumerate(axes.dims):
        if dim.axis == axis and dim.role is Role.FAN_OUT:
            return position
    return None
