"""Birth stages: in which growth each element of a parameter came to be.

An element is as young as the youngest of its indices. The sizes that its axes went through tell that, so no
checkpoint has to store it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ds_sparkling.axes import ParamAxes
from ds_sparkling.growth.units import birth_of_units


def birth_stages(axes: ParamAxes, shape: tuple[int, ...], widths: Mapping[str, tuple[int, ...]]) -> Tensor:
    """Birth stage of every element, uint8 of shape ``shape``.

    Args:
        axes: what the parameter's dimensions are.
        shape: its present shape.
        widths: per axis, its width at the start and after every stage; axes that never grew may be left out.
    """
    births = torch.zeros(shape, dtype=torch.uint8)
    for position, dim in enumerate(axes.dims):
        if dim.axis is not None and dim.axis in widths:
            per_unit = birth_of_units(widths[dim.axis])
            per_index = per_unit.repeat_interleave(dim.block).repeat(dim.segments)
            trailing = len(shape) - position - 1
            births = torch.maximum(births, per_index.view(-1, *[1] * trailing))
    return births
