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

    Twins are parted when it falls below 1 (Sec. 4.1); at 1 they are locked.

    Args:
        weight: a whole parameter, at widths with ``axis`` at ``after``.
        axes: what its dimensions are.
        axis: the axis whose units are compared.
        before, after: the widths before and after the growth that made the copies.

    Returns:
        One cosine per new unit, segment and slice along the leading (experts) dimension; empty if the parameter has no
        fan-out dimension along ``axis``.
    """
    for position, dim in enumerate(axes.dims):
        if dim.axis != axis or dim.role is not Role.FAN_OUT:
            continue
        # A unit's rows, per expert and segment: [leading, segments, units, block * trailing].
        leading, trailing = weight.shape[:position].numel(), weight.shape[position + 1 :].numel()
        width = after[axis]
        parts = (width, dim.segments) if dim.interleaved else (dim.segments, width)
        units = weight.double().reshape(leading, *parts, dim.block * trailing)
        if dim.interleaved:
            units = units.transpose(1, 2)
        groups = dim.group_count(before), dim.group_count(after)
        old = old_units(before[axis], width, groups)
        made = ~old
        # Old units move apart where their groups grow.
        place = old.nonzero().flatten()
        sources = units[:, :, place[source_units(before[axis], width, groups)[made]].to(weight.device)]
        return torch.cosine_similarity(units[:, :, made.to(weight.device)], sources, dim=-1).flatten()
    return weight.new_empty(0, dtype=torch.float64)
