"""Sets of elements as stretches, against Python's own sets."""

from __future__ import annotations

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ds_sparkling.growth.stretches import Packed, Stretches

pairs = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 8)), max_size=8)


def stretches(given_pairs: list[tuple[int, int]]) -> tuple[Stretches, set[int]]:
    starts = torch.tensor([start for start, _ in given_pairs], dtype=torch.int64)
    sizes = torch.tensor([size for _, size in given_pairs], dtype=torch.int64)
    elements = {element for start, size in given_pairs for element in range(start, start + size)}
    return Stretches.union(starts, starts + sizes), elements


def elements_of(found: Stretches) -> list[int]:
    return [element for start, stop in found for element in range(start, stop)]


@given(pairs)
def test_a_union_has_every_element_once_and_its_stretches_lie_apart(
    given_pairs: list[tuple[int, int]],
) -> None:
    found, expected = stretches(given_pairs)
    assert elements_of(found) == sorted(expected)
    assert found.numel == len(expected)
    assert all(int(stop) < int(start) for stop, start in zip(found.stops, found.starts[1:], strict=False))


@given(pairs, st.integers(0, 50), st.integers(0, 50))
@example([(0, 2)], 1, 1)
def test_within_a_window_are_its_elements(given_pairs: list[tuple[int, int]], start: int, stop: int) -> None:
    found, expected = stretches(given_pairs)
    inside = found.within(start, stop)
    assert elements_of(inside) == sorted(element for element in expected if start <= element < stop)
    assert all(first < last for first, last in inside)


def evenly(rows: int, size: int, step: int, first: int) -> list[tuple[int, int]]:
    return [(first + row * step, size) for row in range(rows)]


@given(pairs | st.builds(evenly, st.integers(3, 6), st.integers(1, 4), st.integers(5, 9), st.integers(0, 9)))
def test_packed_elements_are_found_again(given_pairs: list[tuple[int, int]]) -> None:
    found, expected = stretches(given_pairs)
    first = min(expected, default=0)
    values = torch.arange(100)[max(first - 2, 0) :]  # held from a little before the first one on
    out = torch.empty(found.numel, dtype=torch.int64)
    found.packed(values, max(first - 2, 0), out)
    assert out.tolist() == sorted(expected)
    packed = Packed(found, out)
    for start, stop in found:
        for at in range(start, stop):
            assert packed(at, stop).tolist() == list(range(at, stop))


def test_of_nothing_there_is_nothing() -> None:
    assert len(Stretches.none()) == len(Stretches.one(3, 3)) == 0
    assert elements_of(Stretches.one(3, 5)) == [3, 4]
