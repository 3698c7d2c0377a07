"""What a dimension's entries are, against lists of them, and axes as JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_sparkling.errors import PlanError
from ds_sparkling.growth.units import source_units
from ds_sparkling.spec.axes import FIXED, Dim, Norm, ParamAxes, Role
from unit_maps import entries, grown_units

layouts = st.builds(
    Dim,
    st.just("h"),
    st.sampled_from(Role),
    block=st.integers(1, 3),
    segments=st.integers(1, 3),
    interleaved=st.booleans(),
)
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=5)
plain = st.builds(
    Dim,
    names,
    st.sampled_from(Role),
    block=st.integers(1, 9),
    segments=st.just(3),
    alive=st.lists(st.integers(0, 2), max_size=3).map(tuple),
    interleaved=st.booleans(),
    groups=st.integers(1, 9) | names,
    power=st.floats(-2, 2),
)
parted = st.builds(
    lambda first, parts, segments, power: Dim(parts=(first, *parts), segments=segments, power=power),
    plain,
    st.lists(plain | st.builds(Dim, fixed=st.integers(1, 9)), max_size=2),
    st.integers(1, 4),
    st.floats(-2, 2),
)
dims = st.just(FIXED) | plain | parted


def no_gain(dims: tuple[Dim, ...]) -> bool:
    return all(leaf.role is not Role.GAIN for dim in dims for leaf in dim.leaves)


param_axes = st.builds(
    ParamAxes,
    st.lists(dims, max_size=4).map(tuple),
    stacked_experts=st.booleans(),
    head_gain=st.booleans(),
    norm=st.sampled_from(Norm),
    offset=st.floats(-2, 2),
) | st.builds(ParamAxes, st.lists(dims, max_size=4).map(tuple).filter(no_gain))


# -- entries -------------------------------------------------------------------------------------------------------


@given(layouts, st.integers(1, 6))
def test_every_entry_has_its_unit_and_segment(dim: Dim, width: int) -> None:
    expected = entries(width, dim.segments, dim.block, interleaved=dim.interleaved)
    assert dim.size(width) == len(expected)
    for found, wanted in (
        (dim.units(width), [entry.unit for entry in expected]),
        (dim.segment(width), [entry.segment for entry in expected]),
    ):
        assert found.dtype == torch.int64
        assert found.tolist() == wanted


@given(layouts, st.integers(1, 3), st.integers(1, 3), st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(any))
def test_an_entry_comes_from_that_of_its_source_unit_in_its_own_segment(
    dim: Dim, groups: int, per_group: int, more: tuple[int, int]
) -> None:
    before, counts = groups * per_group, (groups, groups + more[0])
    after = counts[1] * (per_group + more[1])
    units = grown_units(before, after, counts)
    old = entries(before, dim.segments, dim.block, interleaved=dim.interleaved)
    new = entries(after, dim.segments, dim.block, interleaved=dim.interleaved)
    index = {(entry.segment, entry.unit, entry.place): i for i, entry in enumerate(old)}
    found = dim.sources(source_units(before, after, counts), before)
    assert found.tolist() == [index[entry.segment, units[entry.unit].source, entry.place] for entry in new]


def test_layouts_by_hand() -> None:
    """Two units, two segments, two entries each."""
    end_to_end = Dim("h", Role.FAN_OUT, block=2, segments=2)
    in_turns = Dim("h", Role.FAN_OUT, block=2, segments=2, interleaved=True)
    assert end_to_end.units(2).tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert end_to_end.segment(2).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert in_turns.units(2).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert in_turns.segment(2).tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    sources = torch.tensor([0, 1, 1])
    assert end_to_end.sources(sources, 2).tolist() == [0, 1, 2, 3, 2, 3, 4, 5, 6, 7, 6, 7]
    assert in_turns.sources(sources, 2).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]


@pytest.mark.parametrize(("groups", "count"), [(1, 1), (4, 4), ("kv", 2)])
def test_groups_are_a_number_or_an_axis(groups: int | str, count: int) -> None:
    assert Dim("q", Role.FAN_OUT, groups=groups).group_count({"q": 8, "kv": 2}) == count


def test_groups_by_an_axis_of_unknown_width_are_refused_by_name() -> None:
    with pytest.raises(PlanError, match=r"q is grouped by 'kv'.*width"):
        Dim("q", Role.FAN_OUT, groups="kv").group_count({"q": 8})


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"axis": "h"}, "both an axis and a role"),
        ({"role": Role.GAIN}, "both an axis and a role"),
        ({"block": 0}, "block must be positive, got 0"),
        ({"block": -1}, "block must be positive, got -1"),
        ({"axis": "h", "role": Role.GAIN, "segments": 0}, "segments must be positive"),
        ({"axis": "h", "role": Role.GAIN, "groups": 0}, "at least 1"),
        ({"block": 2}, "block can't be said of a dimension without an axis"),
        ({"fixed": -1}, "fixed must not be negative"),
        ({"axis": "h", "role": Role.FAN_IN, "fixed": 2}, "fixed can't be said of a dimension with an axis"),
        ({"parts": (Dim("h", Role.FAN_IN),), "block": 2}, "block can't be said of a dimension made of parts"),
        ({"parts": (Dim("h", Role.FAN_IN),), "axis": "h", "role": Role.FAN_IN}, "axis can't be said"),
        ({"parts": (FIXED, Dim("h", Role.FAN_IN))}, "an axis and a role or fixed entries"),
        ({"parts": (Dim(fixed=3),)}, "must carry an axis"),
        ({"parts": (Dim(parts=(Dim("h", Role.FAN_IN),)),)}, "no parts of its own"),
    ],
)
def test_a_dimension_that_means_nothing_is_refused(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(PlanError, match=named):
        Dim(**arguments)


# -- parameters ----------------------------------------------------------------------------------------------------


def test_a_shape_follows_the_widths_that_are_given() -> None:
    axes = ParamAxes((FIXED, Dim("i", Role.FAN_OUT, block=2, segments=3), Dim("h", Role.FAN_IN)))
    assert axes.axes == {"i", "h"}
    assert axes.shape((7, 1, 4), {"i": 5}) == (7, 30, 4)
    assert axes.shape((7, 1, 4), {"i": 5, "h": 6}) == (7, 30, 6)


def test_a_dimension_of_parts_follows_the_widths_of_all_its_axes() -> None:
    parts = Dim(parts=(Dim("q", Role.FAN_OUT, block=3), Dim(fixed=4), Dim("k", Role.FAN_OUT)), segments=2)
    axes = ParamAxes((parts, FIXED))
    assert axes.axes == {"q", "k"}
    assert axes.shape((26, 5), {"q": 3, "k": 5}) == (36, 5)
    assert axes.shape((26, 5), {"h": 3}) == (26, 5)
    with pytest.raises(PlanError, match=r"2 of \(q \(fan_out\) \+ - \+ k \(fan_out\)\).*width of 'k'"):
        axes.shape((26, 5), {"q": 3})


def test_a_gain_of_no_norm_is_refused() -> None:
    """What a norm divides by decides what its units' growth may do."""
    with pytest.raises(PlanError, match="kind of norm"):
        ParamAxes((FIXED, Dim("h", Role.GAIN)))
    assert ParamAxes((Dim("h", Role.GAIN),), norm=Norm.LAYER).axes == {"h"}


@given(param_axes)
def test_axes_survive_json(axes: ParamAxes) -> None:
    assert ParamAxes.from_dict(json.loads(json.dumps(axes.to_dict()))) == axes


def test_json_says_only_what_is_no_default() -> None:
    assert FIXED.to_dict() == {}
    assert Dim("h", Role.FAN_IN).to_dict() == {"axis": "h", "role": "fan_in"}
    fused = Dim("i", Role.FAN_OUT, segments=2, alive=(0,), interleaved=True)
    assert fused.to_dict() == {
        "axis": "i",
        "role": "fan_out",
        "segments": 2,
        "alive": [0],
        "interleaved": True,
    }
    assert Dim(parts=(Dim(fixed=3), Dim("h", Role.FAN_IN)), segments=2).to_dict() == {
        "segments": 2,
        "parts": [{"fixed": 3}, {"axis": "h", "role": "fan_in"}],
    }
    assert ParamAxes((FIXED,)).to_dict() == {"dims": [{}]}
    gain = ParamAxes((Dim("h", Role.GAIN),), head_gain=True, norm=Norm.RMS, offset=1.0)
    assert gain.to_dict() == {
        "dims": [{"axis": "h", "role": "gain"}],
        "head_gain": True,
        "norm": "rms",
        "offset": 1.0,
    }
    scaled = ParamAxes((FIXED,), powers=(("h", 0.5),))
    assert scaled.to_dict() == {"dims": [{}], "powers": {"h": 0.5}}
    assert ParamAxes.from_dict(scaled.to_dict()) == scaled
    with pytest.raises(PlanError, match="the power of h belongs to the dimension"):
        ParamAxes((Dim("h", Role.FAN_IN),), powers=(("h", 0.5),))
    with pytest.raises(PlanError, match="have a dimension"):
        ParamAxes((), powers=(("h", 0.5),))


@pytest.mark.parametrize(
    ("data", "named"),
    [
        pytest.param(
            {"dims": [{"axis": "h", "role": "fan_in", "blocks": 2}]},
            r"dims\[0\]\.blocks: unknown key; did you mean 'block'",
            id="of a dimension",
        ),
        pytest.param(
            {"dims": [{}], "head_gains": True}, "head_gains: unknown key; did you mean 'head_gain'", id="of a parameter"
        ),
        pytest.param({"dims": [{"axis": "h", "role": "fan_inn"}]}, "fan_inn", id="a role"),
        pytest.param({"dims": [{}], "norm": "batch"}, "batch", id="a norm"),
        pytest.param({"dims": [{"axis": "h"}]}, "role", id="no role"),
        pytest.param({"dims": [{"segments": 2}]}, "without an axis", id="segments of no axis"),
        pytest.param({"dims": [{"parts": [{"axis": "h"}]}]}, "role", id="a part of no role"),
        pytest.param({}, "dims", id="no dimensions"),
        pytest.param({"dims": [{"axis": "h", "role": "gain"}]}, "kind of norm", id="a gain of no norm"),
    ],
)
def test_json_that_is_none_of_ours_is_refused(data: dict[str, Any], named: str) -> None:
    with pytest.raises((ValueError, KeyError), match=named):
        ParamAxes.from_dict(data)


def test_a_gain_without_its_kind_of_norm_is_refused() -> None:
    with pytest.raises(PlanError, match="kind of norm"):
        ParamAxes((Dim("h", Role.GAIN),))
