"""The cosine between copied units and their sources, against loops over units."""

from __future__ import annotations

import pytest
import torch

from ds_sparkling.monitoring.twin_distance import twin_cosine
from ds_sparkling.spec.axes import FIXED, Dim, ParamAxes, Role
from unit_maps import entries, grown_units

UP = ParamAxes((FIXED, Dim("i", Role.FAN_OUT, segments=2), Dim("h", Role.FAN_IN)), stacked_experts=True)


def test_every_copied_unit_is_compared_with_its_source() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 2 * 5, 4)  # 3 experts, gate and up of 5 units, of which 2 are copies
    found = twin_cosine(weight, UP, "i", {"i": 3}, {"i": 5})
    expected = [
        torch.cosine_similarity(weight[expert, 5 * half + new], weight[expert, 5 * half + source], dim=0)
        for expert in range(3)
        for half in range(2)
        for new, source in ((3, 0), (4, 1))
    ]
    assert found.tolist() == pytest.approx([float(cosine) for cosine in expected], abs=1e-6)


def test_units_of_several_rows_and_of_a_last_dimension() -> None:
    torch.manual_seed(0)
    heads = torch.randn(4 * 2, 3)  # 4 units of 2 rows, of which 2 are copies
    found = twin_cosine(heads, ParamAxes((Dim("a", Role.FAN_OUT, block=2), FIXED)), "a", {"a": 2}, {"a": 4})
    pairs = [(heads[4:6], heads[0:2]), (heads[6:8], heads[2:4])]
    expected = [float(torch.cosine_similarity(new.flatten(), old.flatten(), dim=0)) for new, old in pairs]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    embedding = torch.randn(7, 4)
    columns = ParamAxes((FIXED, Dim("h", Role.FAN_OUT)))
    (cosine,) = twin_cosine(embedding, columns, "h", {"h": 3}, {"h": 4}).tolist()
    assert cosine == pytest.approx(float(torch.cosine_similarity(embedding[:, 3], embedding[:, 0], dim=0)), abs=1e-6)


def test_copies_are_at_one_and_other_parameters_have_no_twins() -> None:
    weight = torch.randn(3, 2)
    axes = ParamAxes((Dim("i", Role.FAN_OUT), Dim("h", Role.FAN_IN)))
    assert twin_cosine(torch.zeros(6, 2), axes, "i", {"i": 3}, {"i": 6}).numel() == 0  # of zeros there is no cosine
    bias = ParamAxes((Dim("i", Role.FAN_OUT),))
    assert twin_cosine(torch.randn(6), bias, "i", {"i": 3}, {"i": 6}).numel() == 0  # nor, to any use, of numbers
    assert twin_cosine(torch.cat([weight, weight]), axes, "i", {"i": 3}, {"i": 6}).tolist() == pytest.approx([1.0] * 3)
    assert twin_cosine(weight, axes, "h", {"h": 1}, {"h": 2}).numel() == 0
    assert twin_cosine(weight, axes, "other", {"h": 1}, {"h": 2}).numel() == 0


def test_twins_in_groups_and_in_segments_that_take_turns() -> None:
    """Query heads in groups, of interleaved rows (here two of a kind each), against a loop over new units."""
    torch.manual_seed(0)
    before, after = {"q": 4, "kv": 2}, {"q": 9, "kv": 3}
    weight = torch.randn(9 * 2 * 2, 3)
    axes = ParamAxes((Dim("q", Role.FAN_OUT, block=2, segments=2, interleaved=True, groups="kv"), FIXED))
    units = grown_units(4, 9, (2, 3))
    place = {unit.source: index for index, unit in enumerate(units) if unit.old}
    rows = {
        (segment, unit): [
            row
            for row, entry in enumerate(entries(9, 2, 2, interleaved=True))
            if (entry.segment, entry.unit) == (segment, unit)
        ]
        for segment in range(2)
        for unit in range(9)
    }
    expected = [
        float(
            torch.cosine_similarity(
                weight[rows[segment, new]].flatten(), weight[rows[segment, place[unit.source]]].flatten(), dim=0
            )
        )
        for segment in range(2)
        for new, unit in enumerate(units)
        if not unit.old
    ]
    assert twin_cosine(weight, axes, "q", before, after).tolist() == pytest.approx(expected, abs=1e-6)


def test_twins_in_a_part_are_those_of_the_part_alone() -> None:
    """Two heads of three key entries, which stay, and values of two entries, of which one becomes two."""
    torch.manual_seed(0)
    weight = torch.randn(2 * (3 + 3 * 2), 4)
    value = Dim("v", Role.FAN_OUT, block=2)
    axes = ParamAxes((Dim(parts=(Dim(fixed=3), value), segments=2), FIXED))
    found = twin_cosine(weight, axes, "v", {"v": 2}, {"v": 3})
    expected = [
        float(
            torch.cosine_similarity(weight[start + 4 : start + 6].flatten(), weight[start : start + 2].flatten(), dim=0)
        )
        for start in (3, 12)
    ]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert twin_cosine(weight, axes, "other", {"v": 2}, {"v": 3}).numel() == 0
