"""The elements of one birth get a learning rate and an age of their own in an optimizer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ds_sparkling.growth import Block
from ds_sparkling.spec.birth_schedule import Birth


@dataclass(frozen=True)
class Treatment:
    """Learning rate and age of some elements in the step to be taken.

    Attributes:
        lr: their learning rate.
        age: steps they have behind them, if bias correction is to count those and not the tensor's; else None.
    """

    lr: float
    age: int | None


@dataclass(frozen=True, eq=False)
class Apart:
    """A tensor whose births are treated differently, or otherwise than its group.

    Attributes:
        group: its parameter group.
        param: the tensor.
        blocks: the births of its elements, end to end.
        by_birth: what each birth gets.
    """

    group: Mapping[str, Any]
    param: Tensor
    blocks: Sequence[Block]
    by_birth: tuple[Treatment, ...]


def treatments(
    births: Sequence[Birth], rates: Sequence[float], group: Mapping[str, Any], state: Mapping[str, Any]
) -> tuple[Treatment, ...]:
    """The treatment of every birth, the original elements first.

    Args:
        births: the growths so far.
        rates: the learning rates, one more than births.
        group: the parameter group; without ``betas`` its optimizer corrects no bias.
        state: the tensor's optimizer state; without ``step`` it counts no steps.
    """
    counts = "betas" in group and "step" in state
    ages = [birth.age if counts and birth.restart and not _settled(birth.age, group) else None for birth in births]
    return tuple(Treatment(rate, age) for rate, age in zip(rates, [None, *ages], strict=True))


def _settled(age: int, group: Mapping[str, Any]) -> bool:
    """Whether the next step's bias correction 1 - beta^t is 1 in double precision, whatever older elements' is."""
    return all(1.0 - float(beta) ** (age + 1) == 1.0 for beta in group["betas"])
