"""Unit maps against counting by hand, at every ratio above 1."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_sparkling.errors import PlanError
from ds_sparkling.growth.scaling import AxisGrowth
from ds_sparkling.growth.units import (
    birth_of_units,
    check_widths,
    multiplicities,
    old_units,
    paired_units,
    source_units,
)
from unit_maps import Groups, births, grown_units

#: (width before, width after), integer ratios and others.
widenings = st.integers(1, 40).flatmap(lambda d: st.tuples(st.just(d), st.integers(d + 1, 6 * d + 7)))


@st.composite
def grouped_widenings(draw: st.DrawFn) -> tuple[int, int, Groups]:
    """(width before, width after, (groups before, groups after)): more groups, more units in each, or both."""
    groups, per_group = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    more_groups, more_units = draw(st.tuples(st.integers(0, 8), st.integers(0, 8)).filter(any))
    after = groups + more_groups, per_group + more_units
    return groups * per_group, after[0] * after[1], (groups, after[0])


@given(widenings)
def test_sources_go_round_the_old_units_in_order(widening: tuple[int, int]) -> None:
    before, after = widening
    sources = source_units(before, after)
    assert sources.dtype == torch.int64
    assert sources.tolist() == list(itertools.islice(itertools.cycle(range(before)), after))


def test_at_twice_the_width_unit_d_plus_i_is_the_twin_of_unit_i() -> None:
    assert source_units(4, 8).tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert multiplicities(4, 8).tolist() == [2] * 8


def test_below_twice_the_width_only_the_first_units_get_a_copy() -> None:
    assert source_units(4, 6).tolist() == [0, 1, 2, 3, 0, 1]
    assert multiplicities(4, 6).tolist() == [2, 2, 1, 1, 2, 2]


@given(widenings)
def test_multiplicities_count_the_units_of_one_source(widening: tuple[int, int]) -> None:
    before, after = widening
    sources = source_units(before, after).tolist()
    counts = Counter(sources)
    m = multiplicities(before, after)
    assert m.dtype == torch.int64
    assert m.tolist() == [counts[source] for source in sources]
    assert sum(m[:before].tolist()) == after  # over the old units, each once
    assert sum(Fraction(1, count) for count in m.tolist()) == before
    assert max(m.tolist()) - min(m.tolist()) <= 1  # no unit gets a second copy before every one has its first


@given(grouped_widenings())
def test_units_in_groups_are_those_of_lists_of_groups(widening: tuple[int, int, Groups]) -> None:
    before, after, _ = widening
    expected = grown_units(*widening)
    assert len(expected) == after
    assert source_units(*widening).tolist() == [unit.source for unit in expected]
    assert old_units(*widening).tolist() == [unit.old for unit in expected]
    counts = Counter(unit.source for unit in expected)
    assert multiplicities(*widening).tolist() == [counts[unit.source] for unit in expected]
    assert sum(old_units(*widening).tolist()) == before
    assert source_units(*widening)[old_units(*widening)].tolist() == list(range(before))


@given(grouped_widenings())
def test_a_unit_stays_with_the_copy_of_its_group(widening: tuple[int, int, Groups]) -> None:
    """New query head j attends to key/value head j // (heads per group): a copy of the one that its source had."""
    before, after, (groups, groups_after) = widening
    of_group = source_units(groups, groups_after) if groups_after > groups else torch.arange(groups)
    sources = source_units(*widening)
    for unit in range(after):
        group, group_of_source = unit // (after // groups_after), int(sources[unit]) // (before // groups)
        assert int(of_group[group]) == group_of_source


@given(grouped_widenings(), st.integers(2, 3))
def test_whole_ratios_copy_units_in_groups_equally_often(widening: tuple[int, int, Groups], ratio: int) -> None:
    before, _, (groups, _) = widening
    for after_groups in (groups, groups * ratio):
        assert multiplicities(before, before * ratio, (groups, after_groups)).tolist() == [ratio] * before * ratio


def test_query_heads_by_hand() -> None:
    """Two key/value heads of two query heads each: 0 1 | 2 3."""
    assert source_units(4, 8, (2, 2)).tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert source_units(4, 8, (2, 4)).tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert old_units(4, 8, (2, 2)).tolist() == [True, True, False, False] * 2
    assert old_units(4, 8, (2, 4)).tolist() == [True] * 4 + [False] * 4
    assert source_units(4, 9, (2, 3)).tolist() == [0, 1, 0, 2, 3, 2, 0, 1, 0]
    assert multiplicities(4, 9, (2, 3)).tolist() == [4, 2, 4, 2, 1, 2, 4, 2, 4]


@pytest.mark.parametrize(
    ("before", "after", "groups", "complaint"),
    [
        (4, 8, (3, 3), "parted"),
        (4, 9, (2, 2), "parted"),
        (4, 8, (2, 3), "parted"),
        (4, 8, (2, 1), "fewer"),
        (4, 5, (2, 5), "fewer"),
    ],
)
def test_groups_that_do_not_fit_are_refused(before: int, after: int, groups: Groups, complaint: str) -> None:
    with pytest.raises(PlanError, match=complaint) as refused:
        check_widths("num_attention_heads", before, after, groups)
    assert f"num_attention_heads: {before} -> {after} units" in str(refused.value)
    assert f"{groups[0]} -> {groups[1]} groups" in str(refused.value)
    with pytest.raises(PlanError, match=complaint):
        AxisGrowth("num_attention_heads", before, after, normed=False, groups=groups)


@given(grouped_widenings())
def test_every_widening_in_groups_is_accepted(widening: tuple[int, int, Groups]) -> None:
    check_widths("num_attention_heads", *widening)


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        (4, 4, "changes nothing"),
        (4, 3, "shrinks"),
        (0, 4, "positive"),
        (-1, 4, "positive"),
        (4, 0, "positive"),
        (4, -8, "positive"),
    ],
)
def test_anything_but_a_widening_is_refused(before: int, after: int, complaint: str) -> None:
    with pytest.raises(PlanError, match=complaint) as refused:
        check_widths("hidden_size", before, after)
    assert "hidden_size" in str(refused.value)
    assert f"{before} -> {after}" in str(refused.value)
    with pytest.raises(PlanError, match=complaint):
        AxisGrowth("hidden_size", before, after, normed=False)


@given(widenings)
def test_every_widening_is_accepted(widening: tuple[int, int]) -> None:
    check_widths("hidden_size", *widening)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(1, 10))
def test_a_unit_is_born_in_the_stage_that_first_reached_it(steps: list[int], start: int) -> None:
    widths = tuple(itertools.accumulate(steps, initial=start))
    births = birth_of_units(widths)
    assert births.dtype == torch.uint8
    assert births.tolist() == [
        next(stage for stage, width in enumerate(widths) if unit < width) for unit in range(widths[-1])
    ]


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=5),
)
def test_births_in_groups_are_those_of_growing_lists_of_groups(
    groups: int, per_group: int, steps: list[tuple[int, int]]
) -> None:
    """Over several stages, in each of which groups, units per group, both or another axis grow."""
    counts = list(itertools.accumulate((more for more, _ in steps), initial=groups))
    sizes = list(itertools.accumulate((more for _, more in steps), initial=per_group))
    widths = [count * size for count, size in zip(counts, sizes, strict=True)]
    found = birth_of_units(widths, counts)
    assert found.dtype == torch.uint8
    assert found.tolist() == births(widths, counts)
    if len(widths) > 1 and widths[-1] > widths[-2]:
        last = old_units(widths[-2], widths[-1], (counts[-2], counts[-1]))
        assert ((found < len(steps)) == last).all()
    if counts[0] == counts[-1]:
        assert torch.equal(birth_of_units(widths, counts[0]), found)


@pytest.mark.parametrize(("widths", "groups"), [((4, 8, 6), 1), ((4, 8, 4), 2), ((4, 8, 9), (2, 4, 3))])
def test_groups_that_shrank_have_no_births(widths: tuple[int, ...], groups: int | tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match="growth 2"):
        birth_of_units(widths, groups)


def test_an_axis_that_shrank_has_no_births() -> None:
    with pytest.raises(PlanError, match=r"\(4, 8, 6\).*growth 2"):
        birth_of_units((4, 8, 6))


@pytest.mark.parametrize(
    ("sizes", "first", "sign"),
    [
        ((4, 8), [0, 1, 2, 3, 4, 5, 4, 5], [1, 1, 1, 1, 1, 1, -1, -1]),
        ((4, 7), [0, 1, 2, 3, 4, 4, 6], [1, 1, 1, 1, 1, -1, 0]),
        # Within groups, which are fed differently.
        ((4, 8, (2, 2)), [0, 1, 2, 2, 4, 5, 6, 6], [1, 1, 1, -1, 1, 1, 1, -1]),
        ((4, 6, (2, 2)), [0, 1, 2, 3, 4, 5], [1, 1, 0, 1, 1, 0]),
        # New groups with new groups, whose feed is paired in the same way; one that is left over in itself.
        ((4, 8, (2, 4)), [0, 1, 2, 3, 4, 5, 4, 5], [1, 1, 1, 1, 1, 1, -1, -1]),
        ((4, 12, (2, 4)), [0, 1, 2, 3, 4, 5, 6, 7, 8, 6, 7, 8], [1, 1, 0, 1, 1, 0, 1, 1, 1, -1, -1, -1]),
        ((4, 6, (2, 3)), [0, 1, 2, 3, 4, 4], [1, 1, 1, 1, 1, -1]),
    ],
)
def test_units_are_paired_with_units_that_are_fed_alike(
    sizes: tuple[Any, ...], first: list[int], sign: list[int]
) -> None:
    found, signs = paired_units(*sizes)
    assert found.tolist() == first
    assert signs.tolist() == sign
