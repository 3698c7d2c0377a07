"""Whether copied units have parted from their sources."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_sparkling.axes import ParamAxes, Role
from ds_sparkling.growth.units import source_units


def twin_cosine(weight: Tensor, axes: ParamAxes, axis: str, before: int, after: int) -> Tensor:
    """Cosine between every unit that ``axis`` gained and its source, in what the parameter holds of them.

    Twins are parted when it falls below 1 (Sec. 4.1); at 1 they are locked.

    Args:
        weight: a whole parameter, at widths with ``axis`` at ``after``.
        axes: what its dimensions are.
        axis: the axis whose units are compared.
        before, after: its width before and after the growth that made the copies.

    Returns:
        One cosine per new unit, segment and slice along the leading (experts) dimension; empty if the parameter has no
        fan-out dimension along ``axis``.
    """
    for position, dim in enumerate(axes.dims):
        if dim.axis != axis or dim.role is not Role.FAN_OUT:
            continue
        # [leading, segments, units, block * trailing]: a unit's rows, per expert and segment
        leading, trailing = weight.shape[:position].numel(), weight.shape[position + 1 :].numel()
        units = weight.double().reshape(leading, dim.segments, after, dim.block * trailing)
        made = units[:, :, before:after]
        sources = units[:, :, source_units(before, after)[before:].to(weight.device)]
        return torch.cosine_similarity(made, sources, dim=-1).flatten()
    return weight.new_empty(0, dtype=torch.float64)
