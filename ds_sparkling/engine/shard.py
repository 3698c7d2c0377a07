"""A shard is what one rank holds of one parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from ds_sparkling.monitoring.sampling import Grid
from ds_sparkling.spec.partition import Piece, Pieces


@dataclass(kw_only=True)
class Shard:
    """What this rank holds of one parameter.

    Attributes:
        name: the parameter's name in the engine's module.
        shape: its shape on this rank's expert-parallel slice, before partitioning.
        pieces: which elements each rank of ``group`` owns.
        rank: this rank's index in ``group``.
        group: the process group the parameter is partitioned over; None if every rank holds all of it.
        weight: 1-D, the master weights of this rank's piece; there may be padding behind them.
        master: the tensor the base optimizer steps, which ``weight`` is a part of; None for a frozen parameter.
        states: per-element optimizer state, 1-D like ``weight``, by the optimizer's own key.
        wholes: per-element state of the whole parameter, 1-D, on every rank that holds a part of it; empty on others.
        scalars: the rest of the optimizer state (step counters).
    """

    name: str
    shape: tuple[int, ...]
    pieces: Pieces
    rank: int
    group: Any
    weight: Tensor
    master: Tensor | None = None
    states: dict[str, Tensor] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)
    wholes: dict[str, Tensor] = field(default_factory=dict)

    @property
    def piece(self) -> Piece:
        return self.pieces[self.rank]

    def part(self, key: str | None) -> Tensor:
        """This rank's elements of the weight, or of a state, without padding."""
        return (self.weight if key is None else self.states[key])[: self.piece.numel]

    @property
    def offset(self) -> int:
        """Where ``weight`` begins in the master tensor."""
        assert self.master is not None
        return int(self.weight.storage_offset()) - int(self.master.storage_offset())

    def held(self, part: Tensor, grid: Grid) -> Tensor:
        """The elements of ``grid`` that are in this rank's ``part``, 1-D; a view of it if the grid has all."""
        if grid.whole:
            return part[: self.piece.numel]
        indices = grid.flat()
        return part[(indices[self._among(indices)] - self.piece.start).to(part.device)]

    def sampled(self, held: Tensor, grid: Grid, device: torch.device) -> Tensor:
        """The elements of ``grid``, in its shape, from what every rank has :meth:`held` of them.

        Collective over ``group``; takes no more memory than the grid has elements.
        """
        sample = torch.zeros(grid.numel, dtype=held.dtype, device=device)
        own = slice(self.piece.start, self.piece.stop) if grid.whole else self._among(grid.flat())
        sample[own] = held.to(device)
        if self.group is not None and len(self.pieces) > 1:
            dist.all_reduce(sample, group=self.group)
        return sample.view(grid.counts)

    def _among(self, indices: Tensor) -> slice:
        """Where ascending indices into the flattened parameter lie in this rank's piece."""
        first, stop = torch.searchsorted(indices, torch.tensor([self.piece.start, self.piece.stop])).tolist()
        return slice(first, stop)

    def whole(self, key: str, device: torch.device) -> Tensor:
        """The whole of ``wholes[key]``, from the first rank that holds it. Collective over ``group``."""
        held = self.wholes[key]
        source = next(rank for rank, piece in enumerate(self.pieces) if piece.numel)
        if self.rank == source:
            whole = held.to(device)
        else:
            whole = torch.empty(math.prod(self.shape), dtype=held.dtype, device=device)
        if len(self.pieces) > 1:
            dist.broadcast(whole, dist.get_global_rank(self.group, source), group=self.group)
        return whole
