"""How far an optimizer step moves the elements of each birth stage, measured on a random sample of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ds_sparkling.optim.segments import Segment

#: Elements looked at per tensor.
_SAMPLE = 1 << 16


class UpdateMeter:
    """Call :meth:`start` before a step and :meth:`stop` after it.

    Args:
        segments: the birth stages of the elements of every tensor that is stepped.
        stages: how many birth stages there are, the original elements' included.
    """

    def __init__(self, segments: Mapping[Tensor, Sequence[Segment]], stages: int) -> None:
        self._stages = stages
        self._samples = [(tensor, *_sample(tensor, parts)) for tensor, parts in segments.items()]
        self._before: list[Tensor] = []

    @torch.no_grad()
    def start(self) -> None:
        """Keep the sampled values."""
        self._before = [tensor.data.view(-1)[indices] for tensor, indices, _ in self._samples]

    @torch.no_grad()
    def stop(self) -> Tensor:
        """Sum of squared changes and number of samples by birth stage; fp64 [stages, 2] on the CPU."""
        sums = torch.zeros(self._stages, 2, dtype=torch.float64)
        for (tensor, indices, births), before in zip(self._samples, self._before, strict=True):
            squares = (tensor.data.view(-1)[indices] - before).double().square().cpu()
            sums[:, 0].index_add_(0, births, squares)
            sums[:, 1].index_add_(0, births, torch.ones_like(squares))
        self._before = []
        return sums


def _sample(tensor: Tensor, segments: Sequence[Segment]) -> tuple[Tensor, Tensor]:
    """Indices of the sampled elements, on the tensor's device, and their birth stages, int64 on the CPU."""
    generator = torch.Generator().manual_seed(tensor.numel())
    if tensor.numel() <= _SAMPLE:
        indices = torch.arange(tensor.numel())
    else:
        indices = torch.randint(tensor.numel(), (_SAMPLE,), generator=generator).sort().values
    births = torch.empty(len(indices), dtype=torch.int64)
    bounds = torch.searchsorted(indices, torch.tensor([segment.stop for segment in segments]))
    first = 0
    for segment, last in zip(segments, bounds.tolist(), strict=True):
        if isinstance(segment.births, int):
            births[first:last] = segment.births
        else:
            local = (indices[first:last] - segment.start).to(segment.births.device)
            births[first:last] = segment.births[local].cpu().long()
        first = last
    return indices.to(tensor.device), births
