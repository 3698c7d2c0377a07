"""Learning rates adapted to weight norms: new elements follow the base rate times ||W_new|| / ||W_old||.

That is Yuan et al. 2023 (arXiv:2306.12700): eta_t = eta_0 ||W_t|| / ||W_0||, with the Frobenius norms of what growth
growth t made of a parameter and of what it began with, as they are at each step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ds_sparkling.growth import Block
from ds_sparkling.growth.schedule import curve_of
from ds_sparkling.optim.element_rates import Treatment
from ds_sparkling.spec.birth_schedule import Birth


@dataclass(frozen=True)
class Part:
    """The elements of one parameter in a tensor that is stepped.

    Attributes:
        parameter: its number, the same on all ranks.
        blocks: their births; ``start`` counts in the tensor.
    """

    parameter: int
    blocks: tuple[Block, ...]


#: How many parameters there are, and whose elements lie in each tensor.
Parts = tuple[int, Mapping[Tensor, Sequence[Part]]]


class NormRatios:
    """The norms of what every growth made of a parameter over that of its original elements.

    Args:
        parts: tells how many parameters there are, and whose elements lie in each tensor; called when first needed.
        add_up: adds a tensor up over all ranks, in place; does nothing in one process.
    """

    def __init__(self, parts: Callable[[], Parts], add_up: Callable[[Tensor], object] = lambda _: None) -> None:
        self._make_parts = parts
        self._parts: Parts | None = None
        self._blocks: dict[Tensor, list[Block]] = {}
        self._add_up = add_up
        self._ratios: list[list[float]] = []

    @property
    def parts(self) -> Parts:
        """How many parameters there are, and whose elements lie in each tensor."""
        if self._parts is None:
            self._parts = self._make_parts()
        return self._parts

    def forget(self) -> None:
        """The births may have changed."""
        self._parts = None
        self._blocks.clear()

    def measure(self, tensors: Sequence[Tensor], births: int) -> None:
        """Measure the parameters in ``tensors``; collective.

        Args:
            tensors: those that are stepped now.
            births: how many births there are, the original elements' included.
        """
        count, parts = self.parts
        squares = torch.zeros(count, births, dtype=torch.float64, device=tensors[0].device if tensors else None)
        for tensor in tensors:
            for part in parts.get(tensor, ()):
                for block in part.blocks:
                    _add_squares(squares[part.parameter], tensor, block)
        self._add_up(squares)
        # Nothing original to compare with, or nothing but zeros: as if the norms were equal.
        known = (squares > 0) & (squares[:, :1] > 0)
        ratios = torch.where(known, squares / squares[:, :1].clamp(min=1e-300), 1.0).sqrt()
        self._ratios = ratios.tolist()

    def blocks(self, tensor: Tensor, births: int) -> list[Block]:
        """The births of a tensor's elements by parameter: birth b of the k-th is number ``k * births + b``."""
        if tensor not in self._blocks:
            found = []
            for place, part in enumerate(self.parts[1][tensor]):
                for block in part.blocks:
                    runs = tuple(replace(run, birth=place * births + run.birth) for run in block.runs)
                    found.append(replace(block, runs=runs))
            self._blocks[tensor] = found
        return self._blocks[tensor]

    def treatments(
        self, tensor: Tensor, by_birth: Sequence[Treatment], births: Sequence[Birth]
    ) -> tuple[Treatment, ...]:
        """What the births of :meth:`blocks` get, by what births get where norms don't matter."""
        adapted = [False, *(curve_of(birth).follows_norms for birth in births)]
        return tuple(
            replace(each, lr=each.lr * self._ratios[part.parameter][number]) if adapted[number] else each
            for part in self.parts[1][tensor]
            for number, each in enumerate(by_birth)
        )


def _add_squares(sums: Tensor, tensor: Tensor, block: Block) -> None:
    """Add the squares of a block's elements to ``sums``, by birth."""
    rows = tensor.detach().view(-1)[block.start : block.stop].view(block.rows, block.row)
    column = 0
    for run in block.runs:
        sums[run.birth] += rows[:, column : run.stop].double().square().sum()
        column = run.stop
