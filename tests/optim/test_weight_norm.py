"""Rates that follow weight norms, in a tensor that holds several parameters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ds_sparkling.growth import Block
from ds_sparkling.growth.births import BirthRun, stretch
from ds_sparkling.optim.scheduler import RewarmupScheduler
from ds_sparkling.optim.step import BirthStep
from ds_sparkling.optim.weight_norm import NormRatios, Part
from ds_sparkling.spec.birth_schedule import Birth
from ds_sparkling.spec.strategy import Rewarmup, RewarmupCurve

#: A matrix of 3 x 4 whose last column stage 1 made and whose last row stage 2, then a vector of stages 0 and 2.
MATRIX = (Block(0, 2, (BirthRun(3, 0), BirthRun(4, 1))), Block(8, 1, (BirthRun(4, 2),)))
VECTOR = (Block(12, 1, (BirthRun(2, 0), BirthRun(3, 2))),)
NUMBERS = [0, 0, 0, 1, 0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 5, 0]


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_every_parameter_has_its_own_ratio(make: Callable[..., torch.optim.Optimizer]) -> None:
    weights = torch.tensor([3.0, 0, 0, 1, 4, 0, 0, 2, 1, 1, 1, 1, 2.0, 0, 6.0, 0])
    param = torch.nn.Parameter(weights.clone())
    plain = torch.nn.Parameter(weights.clone())
    optimizer, reference = make([param], lr=0.1, weight_decay=0.0), make([plain], lr=0.1, weight_decay=0.0)
    scheduler = RewarmupScheduler(None, optimizer)
    adapted = Birth(Rewarmup(ratio=1.0, steps=0, curve=RewarmupCurve.WEIGHT_NORM), (0.1,), None, restart=False)
    scheduler.births = (adapted, adapted)
    norms = NormRatios(lambda: (2, {param: [Part(0, MATRIX), Part(1, VECTOR)]}))
    blocks = [*MATRIX, *VECTOR, stretch(15, 16, 0)]
    BirthStep(optimizer, scheduler, {param: 0}, lambda: {param: blocks}, norms)
    gradient = torch.arange(1.0, 17.0)
    gradient[15] = 0.0  # padding, which belongs to no parameter
    param.grad, plain.grad = gradient.clone(), gradient.clone()
    optimizer.step()
    reference.step()
    # Norms of the matrix: 5, sqrt(5), 2; of the vector: 2, nothing, 6.
    ratios = torch.tensor([1.0, 5**0.5 / 5, 2 / 5, 1.0, 0.0, 3.0])[NUMBERS]
    torch.testing.assert_close(param.detach() - weights, ratios * (plain.detach() - weights))


def test_without_original_weights_the_base_rate_holds() -> None:
    """Nothing to compare with, or nothing but zeros."""
    tensor = torch.tensor([0.0, 0.0, 2.0])
    norms = NormRatios(lambda: (1, {tensor: [Part(0, (Block(0, 1, (BirthRun(2, 0), BirthRun(3, 1))),))]}))
    norms.measure([tensor], 2)
    assert norms._ratios == [[1.0, 1.0]]


def test_new_elements_that_are_zero_yet_are_not_held_there() -> None:
    tensor = torch.tensor([3.0, 4.0, 0.0])
    norms = NormRatios(lambda: (1, {tensor: [Part(0, (Block(0, 1, (BirthRun(2, 0), BirthRun(3, 1))),))]}))
    norms.measure([tensor], 2)
    assert norms._ratios == [[1.0, 1.0]]
