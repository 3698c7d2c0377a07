"""Birth stages of elements against looking at every index, and against the plans' counts of new elements."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_sparkling.axes import FIXED, Dim, ParamAxes, Role
from ds_sparkling.growth import Block, birth_blocks, make_plan
from ds_sparkling.growth.births import Run, join, stretch
from ds_sparkling.strategy import Strategy

History = dict[str, tuple[int, ...]]
Shape = tuple[int, ...]


@st.composite
def grown_parameters(draw: st.DrawFn) -> tuple[ParamAxes, list[Shape], History]:
    """A parameter, its shape after every stage (at the start first) and its axes' widths; every stage grows an axis."""
    stages = draw(st.integers(1, 4))
    names = draw(st.sampled_from([("h",), ("i",), ("h", "i")]))
    history: History = {}
    for name in names:
        steps = draw(st.lists(st.integers(0 if len(names) > 1 else 1, 3), min_size=stages, max_size=stages))
        history[name] = tuple(itertools.accumulate(steps, initial=draw(st.integers(1, 3))))
    if len(names) == 2:  # a stage in which neither axis moves isn't one
        first, second = history["h"], history["i"]
        moved = [0] + [s for s in range(1, stages + 1) if (first[s], second[s]) != (first[s - 1], second[s - 1])]
        history = {name: tuple(widths[s] for s in moved) for name, widths in history.items()}
    dims, sizes = [], []
    for _ in range(draw(st.integers(0, 3))):
        if draw(st.booleans()):
            axis = draw(st.sampled_from(names))
            role = draw(st.sampled_from([Role.FAN_OUT, Role.FAN_IN]))
            dim = Dim(axis, role, block=draw(st.integers(1, 3)), segments=draw(st.integers(1, 3)))
            dims.append(dim)
            sizes.append([dim.segments * width * dim.block for width in history[axis]])
        else:
            dims.append(FIXED)
            sizes.append([draw(st.integers(1, 3))] * len(history[names[0]]))
    shapes = [tuple(size[stage] for size in sizes) for stage in range(len(history[names[0]]))]
    return ParamAxes(tuple(dims)), shapes, history


def naive_birth(axes: ParamAxes, shape: Shape, history: History, index: Shape) -> int:
    """The youngest of an element's indices; an index is as old as the first stage whose width holds its unit."""
    births = [0]
    for dim, size, i in zip(axes.dims, shape, index, strict=True):
        if dim.axis is not None:
            unit = i % (size // dim.segments) // dim.block
            births.append(next(stage for stage, width in enumerate(history[dim.axis]) if unit < width))
    return max(births)


def expand(blocks: list[Block], numel: int) -> Tensor:
    """The birth stage of every element; the blocks must lie end to end and tell runs apart."""
    births: list[int] = []
    for block in blocks:
        assert block.start == len(births)
        assert block.rows > 0
        row: list[int] = []
        for run in block.runs:
            assert run.stop > len(row)
            assert not row or row[-1] != run.stage
            row += [run.stage] * (run.stop - len(row))
        births += row * block.rows
        assert block.stop == len(births)
        assert block.uniform == (births[-1] if len(set(row)) == 1 else None)
    assert len(births) == numel
    return torch.tensor(births, dtype=torch.uint8)


def all_births(axes: ParamAxes, shape: Shape, history: History) -> Tensor:
    numel = math.prod(shape)
    return expand(birth_blocks(axes, shape, history, 0, numel), numel).view(shape)


@given(grown_parameters())
def test_births_are_those_of_the_youngest_index(case: tuple[ParamAxes, list[Shape], History]) -> None:
    axes, shapes, history = case
    births = all_births(axes, shapes[-1], history)
    for index in itertools.product(*map(range, shapes[-1])):
        assert int(births[index]) == naive_birth(axes, shapes[-1], history, index)


@given(grown_parameters(), st.data())
def test_a_piece_has_the_births_of_its_elements(
    case: tuple[ParamAxes, list[Shape], History], data: st.DataObject
) -> None:
    axes, shapes, history = case
    numel = math.prod(shapes[-1])
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    whole = all_births(axes, shapes[-1], history).flatten()
    piece = expand(birth_blocks(axes, shapes[-1], history, start, stop), stop - start)
    assert torch.equal(piece, whole[start:stop])


def test_blocks_go_with_the_pattern_and_not_with_the_rows() -> None:
    axes = ParamAxes((FIXED, Dim("i", Role.FAN_OUT), Dim("h", Role.FAN_IN)), stacked_experts=True)
    history = {"i": (512, 1024, 1024), "h": (1024, 1024, 2048)}
    blocks = birth_blocks(axes, (16, 1024, 2048), history, 5, 16 * 1024 * 2048 - 7)
    assert len(blocks) <= 2 * 16 + 2
    assert sum(len(block.runs) for block in blocks) <= 4 * 16 + 4
    rows = birth_blocks(axes, (16, 1024, 1024), {"i": (512, 1024)}, 0, 16 * 1024 * 1024)
    assert rows == [Block(0, 16, (Run(512 * 1024, 0), Run(1024 * 1024, 1)))]


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 2)), max_size=8))
def test_joined_neighbours_say_the_same(pieces: list[tuple[int, int]]) -> None:
    ends = list(itertools.accumulate(size for size, _ in pieces))
    blocks = [stretch(end - size, end, stage) for end, (size, stage) in zip(ends, pieces, strict=True)]
    births = [stage for size, stage in pieces for _ in range(size)]
    joined = join(blocks)
    assert expand(joined, len(births)).tolist() == births
    assert all(first.uniform != second.uniform for first, second in itertools.pairwise(joined))


@given(grown_parameters())
@settings(max_examples=50)
def test_a_stage_bears_as_many_elements_as_its_plan_counts(case: tuple[ParamAxes, list[Shape], History]) -> None:
    axes, shapes, history = case
    births = all_births(axes, shapes[-1], history)
    # The plan needs a parameter for every axis that grows.
    others = {f"{axis}.weight": ParamAxes((Dim(axis, Role.FAN_OUT),)) for axis in history}
    for stage in range(1, len(shapes)):
        before = {axis: widths[stage - 1] for axis, widths in history.items()}
        after = {axis: widths[stage] for axis, widths in history.items() if widths[stage] > before[axis]}
        if not after:
            continue
        now = {"w": shapes[stage - 1], **{f"{axis}.weight": (width,) for axis, width in before.items()}}
        plan = make_plan(now, {"w": axes, **others}, before, after, Strategy(), stage=stage)
        assert plan.param("w").after == shapes[stage]
        assert int((births == stage).sum()) == plan.param("w").new_elements


def test_three_quarters_of_a_weight_doubled_on_both_sides_are_new() -> None:
    axes = ParamAxes((Dim("h", Role.FAN_OUT), Dim("i", Role.FAN_IN)))
    births = all_births(axes, (8, 6), {"h": (4, 8), "i": (3, 6)})
    assert float(births.float().mean()) == 0.75
    assert not births[:4, :3].any()


def test_axes_that_never_grew_may_be_left_out() -> None:
    axes = ParamAxes((Dim("h", Role.FAN_OUT), Dim("i", Role.FAN_IN)))
    assert not all_births(axes, (2, 3), {}).any()
    births = all_births(axes, (2, 3), {"i": (1, 1, 3)})
    assert births.tolist() == [[0, 2, 2], [0, 2, 2]]
