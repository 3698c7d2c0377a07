"""Flat tensors of all ranks together hold every element of every parameter exactly once."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_sparkling.checkpoint.layout import Group, Layout, Param, Settings, make_layout, regrouped
from ds_sparkling.spec.partition import expert_groups, round_robin, sub_groups


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    stage = draw(st.sampled_from([1, 2, 3]))
    shared = draw(st.integers(1, 3))
    ranks = shared * draw(st.integers(1, 4))
    settings = Settings(
        stage=stage,
        ranks=ranks,
        expert_parallel=shared,
        sub_group_size=draw(st.integers(1, 60)),
        round_robin=stage < 3 and draw(st.booleans()),
        parameter_alignment=stage < 3 and draw(st.booleans()),
        apart=frozenset({"d1"}) if draw(st.booleans()) else frozenset(),
    )
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    params = {f"d{i}": Param(f"d{i}", (size,), dtype) for i, size in enumerate(sizes)}
    dense = Group({"lr": 1.0}, tuple(params))
    sizes = draw(st.lists(st.integers(1, 40), max_size=4))
    experts = {f"e{i}": Param(f"e{i}", (shared, size), dtype, expert=True) for i, size in enumerate(sizes)}
    groups = [
        dense,
        *([Group({"lr": 2.0, "moe": True, "name": f"ep_size_{shared}"}, tuple(experts))] if experts else []),
    ]
    return make_layout(settings, {**params, **experts}, groups)


@given(layouts())
def test_every_element_has_one_place(layout: Layout) -> None:
    seen: dict[str, list[int]] = defaultdict(list)
    taken: set[tuple[int, int, int]] = set()
    for rank in range(layout.settings.ranks):
        for index, flat in enumerate(layout.flats):
            for segment in layout.segments(flat, rank):
                count = segment.stop - segment.start
                assert 0 <= segment.offset <= segment.offset + count <= flat.size
                seen[segment.name] += range(segment.start, segment.stop)
                spots = {(rank, index, segment.offset + i) for i in range(count)}
                assert not spots & taken
                taken |= spots
                places = list(layout.places(segment.name, segment.start, segment.stop))
                assert [(p.rank, p.flat, p.offset, p.numel) for p in places] == [(rank, index, segment.offset, count)]
    for name, param in layout.params.items():
        assert sorted(seen[name]) == list(range(param.numel))


@given(layouts(), st.data())
def test_places_of_a_stretch_lie_end_to_end(layout: Layout, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(layout.params)))
    start = data.draw(st.integers(0, layout.params[name].numel - 1))
    stop = data.draw(st.integers(start + 1, layout.params[name].numel))
    spots = [(p.rank, p.flat, p.offset + i) for p in layout.places(name, start, stop) for i in range(p.numel)]
    expected = [
        (p.rank, p.flat, p.offset) for element in range(start, stop) for p in layout.places(name, element, element + 1)
    ]
    assert spots == expected


@given(layouts())
def test_padding_is_what_no_parameter_has(layout: Layout) -> None:
    for flat in layout.flats:
        if flat.window:
            assert flat.size * flat.ranks - flat.numel == sum(flat.padding(part) for part in range(flat.ranks))
            used = sum(flat.numels) + sum(flat.paddings)
            assert used == flat.numel
            assert all(offset % (16 // flat_dtype(layout, flat.names[0])) == 0 for offset in flat.offsets) or not (
                layout.settings.parameter_alignment
            )
        else:
            assert flat.size * flat.ranks - sum(flat.numels) < flat.ranks * len(flat.names)


def flat_dtype(layout: Layout, name: str) -> int:
    return layout.params[name].dtype.itemsize


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 60))
def test_sub_groups_are_closed_when_they_are_full(sizes: list[int], limit: int) -> None:
    counts = sub_groups(sizes, limit)
    assert sum(counts) == len(sizes)
    first = 0
    for number, count in enumerate(counts):
        filled = sum(sizes[first : first + count])
        assert filled - sizes[first + count - 1] < limit or limit >= sum(sizes)
        assert filled >= limit or number == len(counts) - 1
        first += count


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 60))
def test_expert_groups_are_as_deepspeed_splits_them(sizes: list[int], limit: int) -> None:
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    params = []
    for size in sizes:
        param = torch.nn.Parameter(torch.empty(size, device="meta"))
        param.allreduce, param.group_name = False, "ep_size_2"  # type: ignore[attr-defined]
        params.append(param)
    groups = split_params_into_different_moe_groups_for_optimizer({"params": params, "name": "all"}, limit)
    assert [len(group["params"]) for group in groups if group.get("moe")] == expert_groups(sizes, limit)


@given(st.integers(0, 20), st.integers(1, 7))
def test_round_robin_deals_every_parameter_once(count: int, ranks: int) -> None:
    order = round_robin(count, ranks)
    assert sorted(order) == list(range(count))
    assert order[: math.ceil(count / ranks)] == list(range(0, count, ranks))


@given(layouts())
def test_regrouping_for_the_same_sizes_changes_nothing(layout: Layout) -> None:
    groups, origins = regrouped(layout, layout.params, layout.settings.expert_parallel)
    assert groups == layout.groups
    assert origins == list(range(len(groups)))
