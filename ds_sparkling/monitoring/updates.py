"""Measure how far an optimizer step moves the elements of each birth, on a random sample of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ds_sparkling.growth import Block

#: Elements looked at per tensor.
_SAMPLE = 1 << 16


class UpdateMeter:
    """Call :meth:`start` before a step and :meth:`stop` after it.

    Args:
        blocks: the births of the elements of every tensor that is stepped.
        births: how many births there are, the original elements' included.
        copies: on how many ranks a tensor is held whole, where that is more than one.
    """

    def __init__(
        self, blocks: Mapping[Tensor, Sequence[Block]], births: int, copies: Mapping[Tensor, int] | None = None
    ) -> None:
        self._births = births
        self._copies = copies or {}
        self._samples = [(tensor, *_sample(tensor, parts)) for tensor, parts in blocks.items()]
        self._before: list[Tensor] = []

    @torch.no_grad()
    def start(self) -> None:
        """Keep the sampled values."""
        self._before = [tensor.data.view(-1)[indices] for tensor, indices, _ in self._samples]

    @torch.no_grad()
    def stop(self) -> Tensor:
        """Sum of squared changes and number of elements by birth, as the samples tell; fp64 [births, 2], CPU.

        Added up over ranks, every element counts once.
        """
        sums = torch.zeros(self._births, 2, dtype=torch.float64)
        for (tensor, indices, births), before in zip(self._samples, self._before, strict=True):
            stand_for = tensor.numel() / max(len(indices), 1) / self._copies.get(tensor, 1)
            squares = stand_for * (tensor.data.view(-1)[indices] - before).double().square().cpu()
            sums[:, 0].index_add_(0, births, squares)
            sums[:, 1].index_add_(0, births, torch.full_like(squares, stand_for))
        self._before = []
        return sums


def _sample(tensor: Tensor, blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
    """Indices of the sampled elements, on the tensor's device, and their births, int64 on the CPU."""
    if tensor.numel() <= _SAMPLE:
        indices = torch.arange(tensor.numel())
    else:
        generator = torch.Generator().manual_seed(tensor.numel())
        indices = torch.randint(tensor.numel(), (_SAMPLE,), generator=generator).sort().values
    births = torch.empty(len(indices), dtype=torch.int64)
    bounds = torch.searchsorted(indices, torch.tensor([block.stop for block in blocks])).tolist()
    for block, first, last in zip(blocks, [0, *bounds], bounds, strict=False):
        columns = (indices[first:last] - block.start) % block.row
        run = torch.searchsorted(torch.tensor([run.stop for run in block.runs]), columns, right=True)
        births[first:last] = torch.tensor([run.birth for run in block.runs])[run]
    return indices.to(tensor.device), births
