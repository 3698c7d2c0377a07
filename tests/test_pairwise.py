"""Pairs of values, counted out."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest

from pairwise import pairwise, shares

VALUES: dict[str, list[Any]] = {"pair": list("abcdef"), "scaling": [1, 2, 3], "axes": ["h", "i", "hi"], "ratio": [2, 3]}


@pytest.mark.parametrize("possible", [lambda **_: True, lambda pair, scaling, **_: pair < "d" or scaling != 3])
def test_any_two_values_that_can_meet_do(possible: Any) -> None:
    chosen = pairwise(VALUES, possible)
    every = [dict(zip(VALUES, case, strict=True)) for case in itertools.product(*VALUES.values())]
    for first, second in itertools.combinations(VALUES, 2):
        expected = {(case[first], case[second]) for case in every if possible(**case)}
        assert {(case[first], case[second]) for case in chosen} == expected
    assert all(possible(**case) for case in chosen)
    assert len(chosen) <= 21  # of 108


def test_each_kind_has_a_case_that_takes_every_step_and_others_share_them_out() -> None:
    cases = [f"{letter}{number}" for number in range(9) for letter in "abc"]
    dealt = shares(cases, 8, lambda case: case[0])
    assert [case for case, _ in dealt] == cases
    assert [case for case, steps in dealt if steps == tuple(range(8))] == ["a0", "b0", "c0"]
    others = [steps for case, steps in dealt if not case.endswith("0")]
    assert all(len(steps) == 3 and list(steps) == sorted(steps) for steps in others)
    taken = Counter(step for steps in others for step in steps)
    assert taken.keys() == set(range(8))
    assert max(taken.values()) - min(taken.values()) <= 2
