"""Births of elements against looking at every index, and against the plans' counts of new elements."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_sparkling.growth import Block, birth_blocks, make_plan
from ds_sparkling.growth.births import BirthRun, join, stretch
from ds_sparkling.spec.axes import FIXED, Dim, ParamAxes, Role
from ds_sparkling.spec.strategy import Strategy
from grown_parameters import History, Shape, expand, grown_parameters
from unit_maps import births as births_of_units
from unit_maps import entries


def naive_births(dim: Dim, size: int, history: History) -> list[int]:
    """The birth of every index of a dimension: that of its unit."""
    if dim.axis is None:
        return [0] * size
    widths = history[dim.axis]
    groups = history[dim.groups] if isinstance(dim.groups, str) else [dim.groups] * len(widths)
    units = births_of_units(widths, groups)
    return [units[e.unit] for e in entries(widths[-1], dim.segments, dim.block, interleaved=dim.interleaved)]


def all_births(axes: ParamAxes, shape: Shape, history: History) -> Tensor:
    numel = math.prod(shape)
    return expand(birth_blocks(axes, shape, history, 0, numel), numel).view(shape)


@given(grown_parameters())
def test_births_are_those_of_the_youngest_index(case: tuple[ParamAxes, list[Shape], History]) -> None:
    axes, shapes, history = case
    births = all_births(axes, shapes[-1], history)
    per_dim = [naive_births(dim, size, history) for dim, size in zip(axes.dims, shapes[-1], strict=True)]
    expected = [max(youngest, default=0) for youngest in itertools.product(*per_dim)]
    assert births.flatten().tolist() == expected


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
    assert rows == [Block(0, 16, (BirthRun(512 * 1024, 0), BirthRun(1024 * 1024, 1)))]


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
    groups = {dim.axis: dim.groups for dim in axes.dims}
    others = {f"{axis}.weight": ParamAxes((Dim(axis, Role.FAN_OUT, groups=groups.get(axis, 1)),)) for axis in history}
    for stage in range(1, len(shapes)):
        before = {axis: widths[stage - 1] for axis, widths in history.items()}
        after = {axis: widths[stage] for axis, widths in history.items() if widths[stage] > before[axis]}
        if not after:
            continue
        now = {"w": shapes[stage - 1], **{f"{axis}.weight": (width,) for axis, width in before.items()}}
        plan = make_plan(now, {"w": axes, **others}, before, after, Strategy(), number=stage)
        assert plan.param("w").after == shapes[stage]
        assert int((births == stage).sum()) == plan.param("w").new_elements


def test_three_quarters_of_a_weight_doubled_on_both_sides_are_new() -> None:
    axes = ParamAxes((Dim("h", Role.FAN_OUT), Dim("i", Role.FAN_IN)))
    births = all_births(axes, (8, 6), {"h": (4, 8), "i": (3, 6)})
    assert float(births.float().mean()) == 0.75
    assert not births[:4, :3].any()


def test_new_query_heads_stand_between_old_ones() -> None:
    """Two key/value heads with one query head each get a second one each, then a third key/value head."""
    axes = ParamAxes((Dim("heads", Role.FAN_OUT, block=2, groups="shared"), FIXED))
    history: History = {"heads": (2, 4, 6), "shared": (2, 2, 3)}
    rows = all_births(axes, (12, 1), history).flatten().tolist()
    assert rows == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 2, 2]


def test_axes_that_never_grew_may_be_left_out() -> None:
    axes = ParamAxes((Dim("h", Role.FAN_OUT), Dim("i", Role.FAN_IN)))
    assert not all_births(axes, (2, 3), {}).any()
    births = all_births(axes, (2, 3), {"i": (1, 1, 3)})
    assert births.tolist() == [[0, 2, 2], [0, 2, 2]]
