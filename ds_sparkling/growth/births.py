"""Birth stages: in which growth each element of a parameter came to be.

An element is as young as the youngest of its indices. The sizes that its axes went through tell that, so no
checkpoint has to store it.
"""

from __future__ import annotations

import math
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
    return births_of_piece(axes, shape, widths, 0, math.prod(shape)).view(shape)


def births_of_piece(
    axes: ParamAxes, shape: tuple[int, ...], widths: Mapping[str, tuple[int, ...]], start: int, stop: int
) -> Tensor:
    """Birth stage of the elements ``start`` to ``stop`` of the flattened parameter, uint8 of shape [stop - start].

    Memory goes with the piece, plus at most two slices along the first dimension.

    Args:
        axes, shape, widths: as in :func:`birth_stages`.
        start, stop: indices into the flattened parameter.
    """
    if not shape or stop <= start:
        return torch.zeros(max(stop - start, 0), dtype=torch.uint8)
    below = math.prod(shape[1:])
    first, last = start // below, -(-stop // below)
    births = torch.zeros((last - first, *shape[1:]), dtype=torch.uint8)
    for position, dim in enumerate(axes.dims):
        if dim.axis is not None and dim.axis in widths:
            per_unit = birth_of_units(widths[dim.axis])
            per_index = per_unit.repeat_interleave(dim.block).repeat(dim.segments)
            if position == 0:
                per_index = per_index[first:last]
            trailing = len(shape) - position - 1
            torch.maximum(births, per_index.view(-1, *[1] * trailing), out=births)
    return births.view(-1)[start - first * below : stop - first * below]
