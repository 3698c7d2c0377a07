"""Parameters that have grown, of all layouts, and the births of their elements one by one."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from ds_sparkling.growth import Block
from ds_sparkling.spec.axes import FIXED, Dim, ParamAxes, Role

History = dict[str, tuple[int, ...]]
Shape = tuple[int, ...]


def groupings(history: History, name: str) -> st.SearchStrategy[int | str]:
    """What may part an axis into groups: a number that divides all its widths, or for ``h`` the axis ``g``."""
    common = math.gcd(*history[name])
    fixed = [count for count in range(1, common + 1) if common % count == 0]
    return st.sampled_from([*fixed, "g"] if name == "h" else fixed)


@st.composite
def grown_parameters(draw: st.DrawFn) -> tuple[ParamAxes, list[Shape], History]:
    """A parameter, its shape after every stage (at the start first) and its axes' widths; every stage grows an axis."""
    stages = draw(st.integers(1, 4))
    names = draw(st.sampled_from([("h",), ("i",), ("h", "i")]))
    history: History = {}
    for name in names:
        steps = draw(st.lists(st.integers(0 if len(names) > 1 else 1, 2), min_size=stages, max_size=stages))
        history[name] = tuple(itertools.accumulate(steps, initial=draw(st.integers(1, 2))))
    if len(names) == 2:  # a stage in which neither axis moves isn't one
        first, second = history["h"], history["i"]
        moved = [0] + [s for s in range(1, stages + 1) if (first[s], second[s]) != (first[s - 1], second[s - 1])]
        history = {name: tuple(widths[s] for s in moved) for name, widths in history.items()}
    groups = {name: draw(groupings(history, name)) for name in names}
    if groups.get("h") == "g":  # as many in each group as the axis had units
        one_more = draw(st.integers(1, len(history["h"])))
        history["g"] = tuple(1 + (stage >= one_more) for stage in range(len(history["h"])))
        history["h"] = tuple(width * count for width, count in zip(history["h"], history["g"], strict=True))
    dims: list[Dim] = []
    sizes: list[list[int]] = []
    for _ in range(draw(st.integers(0, 3))):
        if len(dims) < 2 and draw(st.booleans()):
            axis = draw(st.sampled_from(names))
            role = draw(st.sampled_from([Role.FAN_OUT, Role.FAN_IN]))
            block, segments = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (1, 3)]))
            dim = Dim(axis, role, block=block, segments=segments, interleaved=draw(st.booleans()), groups=groups[axis])
            dims.append(dim)
            sizes.append([dim.segments * width * dim.block for width in history[axis]])
        else:
            dims.append(FIXED)
            sizes.append([draw(st.integers(1, 3))] * len(history[names[0]]))
    shapes = [tuple(size[stage] for size in sizes) for stage in range(len(history[names[0]]))]
    return ParamAxes(tuple(dims)), shapes, history


def expand(blocks: list[Block], numel: int) -> Tensor:
    """The birth of every element; the blocks must lie end to end and tell runs apart."""
    births: list[int] = []
    for block in blocks:
        assert block.start == len(births)
        assert block.rows > 0
        row: list[int] = []
        for run in block.runs:
            assert run.stop > len(row)
            assert not row or row[-1] != run.birth
            row += [run.birth] * (run.stop - len(row))
        births += row * block.rows
        assert block.stop == len(births)
        assert block.uniform == (births[-1] if len(set(row)) == 1 else None)
    assert len(births) == numel
    return torch.tensor(births, dtype=torch.uint8)
