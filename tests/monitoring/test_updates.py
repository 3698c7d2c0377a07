"""The sampled size of an update, against looking at every element."""

from __future__ import annotations

import pytest
import torch

from ds_sparkling.growth.births import BirthRun, Block, stretch
from ds_sparkling.monitoring.updates import UpdateMeter

BLOCKS = [stretch(0, 7, 0), Block(7, 20, (BirthRun(2, 0), BirthRun(5, 1))), stretch(107, 110, 2)]


def test_small_tensors_are_measured_whole() -> None:
    births = torch.tensor([0] * 7 + [0, 0, 1, 1, 1] * 20 + [2] * 3)
    tensor, other = torch.randn(110), torch.randn(11, 10)
    meter = UpdateMeter({tensor: BLOCKS, other: [stretch(0, 110, 1)]}, 3)
    meter.start()
    change, other_change = torch.randn(110), torch.randn(11, 10)
    tensor += change
    other += other_change
    sums = meter.stop()
    squares = [change[births == stage].double().square().sum() for stage in range(3)]
    squares[1] += other_change.double().square().sum()
    assert sums[:, 0].tolist() == pytest.approx([float(square) for square in squares], rel=1e-4)
    assert sums[:, 1].tolist() == [47, 60 + 110, 3]


def test_what_several_ranks_hold_counts_once() -> None:
    tensor, expert = torch.zeros(4), torch.zeros(4)
    meter = UpdateMeter({tensor: [stretch(0, 4, 0)], expert: [stretch(0, 4, 0)]}, 1, {tensor: 4, expert: 2})
    meter.start()
    tensor += 1.0
    expert += 3.0
    assert meter.stop().tolist() == [[1 + 9 * 2, 3]]


def test_of_large_tensors_a_sample_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ds_sparkling.monitoring.updates._SAMPLE", 4000)
    tensor = torch.zeros(100_000)
    rows = Block(0, 1000, (BirthRun(60, 0), BirthRun(100, 1)))  # a row length that a strided sample would alias with
    small = torch.zeros(1000)  # counts for a hundredth, sampled or not
    meter = UpdateMeter({tensor: [rows], small: [stretch(0, 1000, 0)]}, 2)
    meter.start()
    small += 11.0
    tensor.view(1000, 100)[:, :60] += 1.0
    tensor.view(1000, 100)[:, 60:] += 3.0
    sums = meter.stop()
    assert float(sums[:, 1].sum()) == pytest.approx(101_000)
    assert float(sums[0, 1]) == pytest.approx(61_000, rel=0.1)
    assert float(sums[1, 0] / sums[1, 1]) == pytest.approx(9.0)
    assert float(sums[0, 0] / sums[0, 1]) == pytest.approx((60.0 + 121.0) / 61.0, rel=0.1)
