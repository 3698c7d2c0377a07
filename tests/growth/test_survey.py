"""Mean and root mean square that don't depend on the order of summation."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ds_sparkling.growth.survey import Spread, Statistics, Survey

#: Weights of very different sizes, so that a floating-point sum would depend on its order.
entries = st.lists(st.floats(-100, 100, width=32) | st.floats(-(2.0**-10), 2.0**-10, width=32), min_size=1, max_size=60)


def spread(matrix: Tensor) -> Spread:
    return surveyed(Survey(numel=matrix.numel(), matrices=1), matrix).spreads[0]


def surveyed(survey: Survey, matrix: Tensor) -> Statistics:
    flat = matrix.reshape(-1)
    return survey.of(lambda start, stop: flat[start:stop])


def exact(values: list[float]) -> tuple[Fraction, Fraction]:
    """Mean and mean square without any rounding."""
    fractions = [Fraction(value) for value in values]
    return sum(fractions) / Fraction(len(values)), sum(f * f for f in fractions) / Fraction(len(values))


def tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


@given(entries)
def test_mean_and_rms_are_exact_to_24_bits_of_the_largest_entry(values: list[float]) -> None:
    mean, mean_square = exact(values)
    found = spread(tensor(values))
    largest = max(abs(value) for value in values)
    rounding = 2.0**-24 * largest  # each entry is rounded to 2^-24 of a power of two, which is at most 2 x largest
    assert abs(found.mean - float(mean)) <= rounding * 1.0001
    # The root mean square is a norm: rounding entries by at most r moves it by at most r.
    assert abs(found.rms - math.sqrt(mean_square)) <= rounding * 1.0001 + 1e-15 * largest


@given(entries, st.randoms(use_true_random=False))
def test_the_order_of_the_entries_does_not_matter(values: list[float], rng: random.Random) -> None:
    shuffled = rng.sample(values, len(values))
    assert spread(tensor(shuffled)) == spread(tensor(values))


@given(entries, st.integers(-20, 20))
def test_a_power_of_two_scales_exactly(values: list[float], power: int) -> None:
    old, scaled = spread(tensor(values)), spread(tensor(values).double() * 2.0**power)
    assert scaled == Spread(old.mean * 2.0**power, old.rms * 2.0**power)


def test_entries_are_rounded_to_the_nearest_unit_and_not_cut_off() -> None:
    """Cutting off would make small weights of both signs smaller, and the spread of what is drawn after them."""
    unit = 2.0**-23  # of a largest entry of 1
    found = spread(tensor([1.0, *[0.9 * unit] * 9, *[-0.9 * unit] * 6]))
    assert found == Spread((1 + 3 * unit) / 16, math.sqrt((1 + 15 * unit**2) / 16))


def test_shape_and_strides_do_not_matter() -> None:
    matrix = torch.randn(7, 5)
    assert spread(matrix) == spread(matrix.T) == spread(matrix.flatten().view(5, 7, 1))


def test_a_matrix_of_several_chunks_counts_every_entry() -> None:
    """2^20 entries are summed at a time; the last entry, alone in the second chunk, must count."""
    n = (1 << 20) + 1
    matrix = torch.zeros(n)
    matrix[-1] = 1024.0
    assert spread(matrix) == Spread(1024.0 / n, math.sqrt(1024.0**2 / n))
    matrix[0] = -1024.0
    assert spread(matrix) == Spread(0.0, math.sqrt(2 * 1024.0**2 / n))
    # To the last bit: entries that use all of theirs, summed in another split.
    matrix = torch.randn((1 << 20) + 1000, generator=torch.Generator().manual_seed(0))
    assert spread(matrix) == spread(matrix.flip(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_dtype_is_measured_at_its_values(dtype: torch.dtype) -> None:
    matrix = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=dtype)
    found = spread(matrix)
    assert found.mean == 0.625
    assert found.rms == math.sqrt((1 + 4 + 9 + 0.25) / 4)
    assert found.std == pytest.approx(float(matrix.double().std(correction=0)))


def test_the_std_of_a_constant_is_zero_and_not_nan() -> None:
    """The mean's square can exceed the mean square by a rounding; a square root of that would be NaN."""
    for value in (0.0, 0.1, 1 / 3, 1e-30, -7.3):
        found = spread(torch.full((7,), value))
        assert found.std == pytest.approx(0.0, abs=1e-7 * abs(value))
        assert found.mean == pytest.approx(value, rel=1e-6)
    assert Spread(mean=0.1, rms=math.nextafter(0.1, 0)).std == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_entries_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or Inf"):
        spread(torch.tensor([1.0, bad, 2.0]))


# -- means over rows and columns -----------------------------------------------------------------------------------


def means(matrix: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = (
        surveyed(Survey(numel=matrix.numel(), columns=matrix.shape[1], mean_of=mean_of), matrix).mean
        for mean_of in ("rows", "columns")
    )
    assert rows is not None
    assert columns is not None
    return rows, columns


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    values = draw(entries)
    columns = draw(st.integers(1, len(values)))
    return tensor(values[: len(values) // columns * columns]).view(-1, columns)


@given(matrices())
def test_means_are_exact_to_24_bits_of_the_largest_entry(matrix: Tensor) -> None:
    over_rows, over_columns = means(matrix)
    assert over_rows.dtype == over_columns.dtype == torch.float64
    rounding = 2.0**-24 * float(matrix.abs().max()) * 1.0001
    for found, vectors in ((over_rows, matrix.T), (over_columns, matrix)):
        assert found.shape == (len(vectors),)
        for value, vector in zip(found.tolist(), vectors.tolist(), strict=True):
            assert abs(value - float(exact(vector)[0])) <= rounding


@given(matrices(), st.randoms(use_true_random=False))
def test_means_do_not_depend_on_the_order_of_what_they_are_over(matrix: Tensor, rng: random.Random) -> None:
    rows, columns = (rng.sample(range(size), size) for size in matrix.shape)
    over_rows, over_columns = means(matrix)
    assert torch.equal(means(matrix[rows])[0], over_rows)
    assert torch.equal(means(matrix[:, columns])[1], over_columns)
    assert torch.equal(means(matrix[:, columns])[0], over_rows[columns])
    assert torch.equal(means(matrix.T.contiguous())[0], over_columns)


def test_means_of_several_chunks_count_every_row() -> None:
    """2^20 entries are summed at a time, or as many whole rows as fit."""
    matrix = torch.zeros(1100, 1001)
    matrix[-1, -1] = 1024.0
    over_rows, over_columns = means(matrix)
    assert over_rows[-1] == 1024.0 / 1100
    assert over_columns[-1] == 1024.0 / 1001
    assert not over_rows[:-1].any()
    assert not over_columns[:-1].any()
    matrix = torch.randn(3, 1 << 20, generator=torch.Generator().manual_seed(0))
    over_rows, over_columns = means(matrix)
    torch.testing.assert_close(over_rows, matrix.double().mean(0), rtol=0, atol=2.0**-21)
    torch.testing.assert_close(over_columns, matrix.double().mean(1), rtol=0, atol=2.0**-21)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_means_of_entries_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or Inf"):
        means(torch.tensor([[1.0, bad]]))


# -- pieces --------------------------------------------------------------------------------------------------------


@given(matrices(), st.sampled_from([None, "rows", "columns"]), st.data())
def test_pieces_add_up_to_the_statistics_of_the_whole(matrix: Tensor, mean_of: str | None, data: st.DataObject) -> None:
    numel = matrix.numel()
    cuts = data.draw(st.lists(st.integers(0, numel), max_size=4).map(sorted))
    count = data.draw(st.sampled_from([n for n in (0, 1, 2, 3) if n == 0 or numel % n == 0]))
    survey = Survey(numel=numel, matrices=count, columns=matrix.shape[1], mean_of=mean_of)
    flat = matrix.flatten()
    ends = list(itertools.pairwise([0, *cuts, numel]))

    def held(start: int, stop: int) -> Callable[[int, int], Tensor]:
        def elements(first: int, last: int) -> Tensor:
            assert start <= first <= last <= stop  # nothing but the own piece is asked for
            return flat[first:last]

        return elements

    largest = torch.stack([survey.largest(held(*piece), *piece) for piece in ends]).amax(0)
    sums = torch.stack([survey.sums(held(*piece), *piece, largest) for piece in ends]).sum(0)
    found, expected = survey.statistics(largest, sums), surveyed(survey, matrix)
    assert found.spreads == expected.spreads
    torch.testing.assert_close(found.mean, expected.mean, rtol=0, atol=0)
