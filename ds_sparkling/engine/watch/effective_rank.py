"""The effective rank of the matrices that gain units, over all ranks of an engine."""

from __future__ import annotations

import torch
from deepspeed import comm as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from ds_sparkling.engine import access
from ds_sparkling.engine.growing_run import run_of
from ds_sparkling.engine.logical_names import Logical, engine_axes, logical_parameters, replicas
from ds_sparkling.engine.shard import Shard
from ds_sparkling.monitoring.sampling import Grid, chosen
from ds_sparkling.monitoring.spectrum import effective_rank
from ds_sparkling.monitoring.twin_distance import twin_dimension

#: Matrices looked at, and the rows and columns of each that are, evenly spaced.
MATRICES, SIDE = 4, 1024


class RankProbe:
    """Looks at a sample of the matrices that gain units, by a growth that has happened or is planned, so that it is the
    same sample before and after. Of stacked experts it is the first expert, of other tensors dimension 0 against the
    rest.

    The matrices are gathered one at a time, and their singular values taken by turns on the ranks that have them.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        run = run_of(engine)
        growths = [growth.widths for growth in run.record.growths] + [growth.widths for growth in run.config.growths]
        grown = {axis for widths in growths for axis in widths}
        axes, shards = engine_axes(engine, run.record.axes), access.shards(engine)
        self._parameters = logical_parameters(engine)
        shapes = {name: shards[logical.like].shape for name, logical in self._parameters.items()}
        matrices = [
            name
            for name, shape in shapes.items()
            if len(shape) - axes[name].stacked_experts > 1
            and any(twin_dimension(axes[name], axis) is not None for axis in grown)
        ]
        self._engine = engine
        self._grids: dict[str, Grid] = {}
        self._rows: dict[str, int] = {}
        for name in chosen(matrices, MATRICES):
            stacked = axes[name].stacked_experts
            counts = tuple(min(size, SIDE) for size in shapes[name])
            self._grids[name] = Grid(shapes[name], (1, *counts[1:]) if stacked else counts)
            self._rows[name] = counts[1] if stacked else counts[0]

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Effective rank by parameter. Collective."""
        engine = self._engine
        found = torch.zeros(len(self._grids), dtype=torch.float64, device=engine.device)
        if not self._grids:
            return {}
        shards = access.shards(engine)
        for turn, (name, grid) in enumerate(self._grids.items()):
            logical = self._parameters[name]
            if not logical.here or (logical.stack is not None and logical.stack[0] > 0):
                continue  # other ranks have the expert
            shard = shards[logical.like]
            sample = shard.sampled(shard.held(shard.weight, grid), grid, engine.device)
            share = self._share(shard, logical, turn)
            if share:
                found[turn] = share * effective_rank(sample.reshape(self._rows[name], -1))
        dist.all_reduce(found)
        return dict(zip(self._grids, found.tolist(), strict=True))

    def _share(self, shard: Shard, logical: Logical, turn: int) -> float:
        """What this rank adds of what is found; 1 in all over the ranks."""
        if shard.group is not None:
            return float(shard.rank == turn % len(shard.pieces))
        if logical.ranks == 1:
            return float(self._engine.global_rank == 0)
        return 1 / replicas(shard, logical)
