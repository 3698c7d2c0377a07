"""The counter-based normal generator: its bits against plain integers and single operations, and its statistics."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ds_sparkling.growth import random
from ds_sparkling.growth.random import add_normal, standard_normal, stream_key

#: The stream of (seed 0, stage 1, "layers.0.mlp.experts.down_proj") and its row 3, columns 0, 1 and 10^6.
PINNED_KEY = 3290128533922617351
PINNED = [-0.6773386597633362, -0.1979203075170517, -1.3646434545516968]

keys = st.integers(-(2**63), 2**63 - 1)
#: Parameters have far fewer rows than 2^62, but an index near it shows an arithmetic instead of a logical shift.
row_lists = st.lists(st.integers(0, 2**62), min_size=1, max_size=5)
column_lists = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=40)
factors = st.floats(-4, 4, allow_subnormal=False)

f = np.float32


def splitmix64(state: int) -> int:
    """SplitMix64's output function, as published, on unsigned Python integers."""
    z = state % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def hash_of(key: int, row: int, column: int) -> int:
    of_row = splitmix64(key + row * 0x9E3779B97F4A7C15)
    x = (column + of_row) % 2**32
    x = (x ^ (x >> 17)) * 0xED5AD4BB % 2**32 ^ (of_row >> 32)
    x = (x ^ (x >> 11)) * 0xAC4C1B51 % 2**32
    x = (x ^ (x >> 15)) * 0x31848BAB % 2**32
    return x ^ (x >> 14)


def polynomial(coefficients: tuple[float, ...], x: np.float32) -> np.float32:
    y = f(0.0)
    for coefficient in coefficients:
        y = y * x + f(coefficient)
    return y


def reference(key: int, row: int, column: int) -> float:
    """A deviate by numpy's scalars, which round every operation by itself."""
    bits = hash_of(key, row, column)
    beyond = f(bits % 2**31) + f(0.5)
    mantissa, exponent = math.frexp(beyond)
    s = f(2 * mantissa - 1)
    straight = f((31 - (exponent - 1)) * 2**23 - int(s * 2**23)) * f(2.0**-23)
    r = straight - s * (f(1.0) - s) * polynomial(random._BEND, s)
    size = r * polynomial(random._ABOVE, r) / polynomial(random._BELOW, r)
    return float(-size if bits >= 2**31 else size)


def test_the_reference_is_splitmix64() -> None:
    """The generator's published outputs for seed 1234567, so that the tests below compare with the real thing."""
    outputs = [splitmix64(1234567 + step * 0x9E3779B97F4A7C15) for step in (1, 2, 3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(keys, row_lists, column_lists)
def test_deviates_are_the_references_bit_for_bit(key: int, rows: list[int], columns: list[int]) -> None:
    drawn = standard_normal(key, torch.tensor(rows), torch.tensor(columns))
    assert drawn.dtype is torch.float32
    assert drawn.tolist() == [[reference(key, row, column) for column in columns] for row in rows]


@given(keys, row_lists, column_lists, st.data())
def test_the_kernel_adds_what_pytorchs_operations_do_bit_for_bit(
    key: int, rows: list[int], columns: list[int], data: st.DataObject
) -> None:
    """At any place of a vector, into rows that lie apart."""
    columns = columns * data.draw(st.sampled_from([1, 1, 9]))
    given_ = [
        torch.tensor(rows),
        torch.tensor(columns),
        torch.tensor(data.draw(st.lists(factors, min_size=len(rows), max_size=len(rows))), dtype=torch.float64),
        torch.tensor(data.draw(factors)) * torch.ones(len(columns)),
    ]
    out = torch.full((len(rows), len(columns) + 2), 0.25)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random, "library", lambda source, without: None)
        expected = out.clone()
        add_normal(expected[:, :-2], key, *given_)
    add_normal(out[:, :-2], key, *given_)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("shape", [(1, 40_000), (3, 9_000), (70_000, 1)])
def test_threads_do_not_show(shape: tuple[int, int]) -> None:
    rows, columns = torch.arange(shape[0]), torch.arange(shape[1])
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(torch.zeros(shape))
            add_normal(found[-1], 7, rows, columns, torch.ones(len(rows)), torch.ones(len(columns)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
    assert torch.equal(found[0], standard_normal(7, rows, columns))


class _Moves(TorchDispatchMode):
    """Copies between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        tensors = [tensor for tensor in args if isinstance(tensor, Tensor)]
        if isinstance(out, Tensor) and tensors and tensors[-1].device != out.device:
            self.seen.append((tensors[-1].device.type, out.device.type))
        return out


def test_on_another_device_only_indices_and_factors_go_there_and_nothing_comes_back() -> None:
    """The meta device refuses to give values back."""
    out = torch.zeros(3, 5, device="meta")
    with _Moves() as moves:
        add_normal(out, 1, torch.arange(3), torch.arange(5), torch.ones(3), torch.ones(5))
    assert moves.seen == [("cpu", "meta")] * 4


@pytest.fixture(scope="module")
def many() -> Tensor:
    """Of a weight as wide as real ones."""
    x = torch.zeros(256, 4096)
    add_normal(x, stream_key(0, 1, "w"), torch.arange(256), torch.arange(4096), torch.ones(256), torch.ones(4096))
    return x.double()


def test_the_deviates_are_normal(many: Tensor) -> None:
    n, x = many.numel(), many.flatten()
    band = 5 / math.sqrt(n)  # five standard errors of a mean of unit-variance terms
    assert abs(float(x.mean())) < band
    assert abs(float((x**2).mean()) - 1) < band * math.sqrt(2)
    assert abs(float((x**3).mean())) < band * math.sqrt(15)
    assert abs(float((x**4).mean()) - 3) < band * math.sqrt(96)
    cdf = torch.special.ndtr(x.sort().values)
    steps = torch.arange(1, n + 1) / n
    assert float((cdf - steps).abs().max()) < 2 / math.sqrt(n)  # Kolmogorov-Smirnov at about 1e-3
    for beyond in (2, 3, 4):
        expected = 2 * n * NormalDist().cdf(-beyond)
        assert abs(int((x.abs() > beyond).sum()) - expected) < 5 * math.sqrt(expected)


def test_deviates_follow_the_normal_distribution_into_the_tails() -> None:
    """From the middle to one hash in 2^32, against the inverse CDF; the two signs mirror each other."""
    rare = torch.tensor([int(2 ** (eighth / 8)) for eighth in range(31 * 8)], dtype=torch.int32)
    found = random._deviates(rare)
    expected = [NormalDist().inv_cdf((hash_ + 0.5) / 2**32) for hash_ in rare.tolist()]
    torch.testing.assert_close(found.double(), -torch.tensor(expected, dtype=torch.float64), rtol=0, atol=3e-5)
    assert torch.equal(random._deviates(rare | -(2**31)), -found)
    assert float(random._deviates(torch.tensor([0], dtype=torch.int32))) == pytest.approx(6.338, abs=1e-3)


def test_the_distribution_itself_has_the_normal_ones_moments() -> None:
    """By quadrature over all hashes of a sign, finer for the rarest."""
    total = torch.zeros(2, dtype=torch.float64)
    borders = [0, *(2**power for power in range(12, 32))]
    for low, high in pairwise(borders):
        count = min(high - low, 1 << 16)
        step = (high - low) // count
        x = random._deviates((low + step * torch.arange(count) + step // 2).int()).double()
        total += torch.stack([x**2, x**4]).sum(1) * step
    second, fourth = (total / 2**31).tolist()
    assert second == pytest.approx(1, abs=1e-5)
    assert fourth == pytest.approx(3, abs=1e-4)


def test_neighbours_rows_and_streams_are_unrelated(many: Tensor) -> None:
    """Along a row and down a column, where weak hashes show stripes, and in the sizes of a matrix's directions."""
    n = many.numel()
    others = {
        "next columns": (many[:, 1:], many[:, :-1]),
        "next rows": (many[1:], many[:-1]),
        "diagonal": (many[1:, 1:], many[:-1, :-1]),
        "far columns": (many[:, 1024:], many[:, :-1024]),
        "half of the rows": (many[128:], many[:128]),
    }
    for name, (x, y) in others.items():
        assert abs(float((x * y).mean())) < 5 / math.sqrt(x.numel()), name
        assert abs(float(((x**2 - 1) * (y**2 - 1)).mean())) < 5 * 2 / math.sqrt(x.numel()), name
    # Marchenko and Pastur: singular values of a random matrix end at sqrt(columns) +- sqrt(rows).
    sizes = torch.linalg.eigvalsh(many @ many.T).sqrt()
    assert float(sizes.min()) == pytest.approx(64 - 16, rel=0.03)
    assert float(sizes.max()) == pytest.approx(64 + 16, rel=0.03)
    assert n == 256 * 4096


@given(keys, st.integers(0, 2**40), st.integers(0, 2**20))
@settings(max_examples=20)
def test_every_bit_of_key_row_and_column_changes_half_of_the_hash(key: int, row: int, column: int) -> None:
    """On the average over all single bits; the worst single change is that of 3 of 32 bits once in 10^7."""
    own = hash_of(key, row, column)
    changed = [
        *(hash_of(key ^ (1 << bit), row, column) for bit in range(64)),
        *(hash_of(key, row ^ (1 << bit), column) for bit in range(40)),
        *(hash_of(key, row, column ^ (1 << bit)) for bit in range(20)),
    ]
    counts = [(own ^ other).bit_count() for other in changed]
    assert min(counts) >= 1
    assert abs(sum(counts) / len(counts) - 16) < 6 * math.sqrt(8 / len(counts))


@pytest.mark.parametrize("other", [(1, 1, "w"), (0, 2, "w"), (0, 1, "v"), (0, 1, "w ")])
def test_streams_of_other_seeds_stages_and_names_are_unrelated(other: tuple[int, int, str]) -> None:
    place = torch.arange(16), torch.arange(1024)
    x, y = (standard_normal(stream_key(*stream), *place).double() for stream in ((0, 1, "w"), other))
    assert not bool((x == y).any())
    assert abs(float((x * y).mean())) < 5 / math.sqrt(x.numel())


def test_digits_of_seed_stage_and_name_do_not_run_together() -> None:
    assert len({stream_key(1, 12, "w"), stream_key(11, 2, "w"), stream_key(1, 1, "2/w"), stream_key(112, 0, "w")}) == 4


def test_the_streams_are_the_same_in_every_version() -> None:
    """Checkpoints grown offline must match engines grown by another release: a change here is a break."""
    assert stream_key(0, 1, "layers.0.mlp.experts.down_proj") == PINNED_KEY
    assert standard_normal(PINNED_KEY, torch.tensor([3]), torch.tensor([0, 1, 10**6])).tolist() == [PINNED]
