"""Unit maps against counting by hand, at every ratio above 1."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_sparkling.errors import PlanError
from ds_sparkling.growth.scaling import AxisGrowth
from ds_sparkling.growth.units import birth_of_units, check_widths, multiplicities, source_units

#: (width before, width after), integer ratios and others.
widenings = st.integers(1, 40).flatmap(lambda d: st.tuples(st.just(d), st.integers(d + 1, 6 * d + 7)))


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


def test_an_axis_that_shrank_has_no_births() -> None:
    with pytest.raises(PlanError, match=r"\(4, 8, 6\).*stage 2"):
        birth_of_units((4, 8, 6))
