"""Pairs of values, counted out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from pairwise import pairwise

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
