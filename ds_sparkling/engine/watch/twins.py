"""Measure how far the units that a growth copied have parted from their sources, over all ranks of an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from deepspeed import comm as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from ds_sparkling.engine import access
from ds_sparkling.engine.growing_run import run_of
from ds_sparkling.engine.logical_names import Logical, engine_axes, logical_parameters, replicas
from ds_sparkling.engine.shard import Shard
from ds_sparkling.monitoring.sampling import Grid, chosen, thinned
from ds_sparkling.monitoring.twin_distance import twin_cosine, twin_dimension
from ds_sparkling.spec.axes import ParamAxes
from ds_sparkling.spec.strategy import Init

#: Parameters looked at, and entries of each: what is gathered at a time, and at most, whatever the model's size.
PARAMETERS, ENTRIES = 16, 1 << 20


@dataclass(frozen=True)
class TwinCosines:
    """Cosines of the copied units of the latest growth with their sources.

    Attributes:
        mean, largest: over all units of the parameters looked at, each counted once however many ranks hold it.
        by_parameter: the mean by parameter.
        own: those that this rank has seen: all but other ranks' experts.
    """

    mean: float
    largest: float
    by_parameter: dict[str, float]
    own: Tensor


class TwinProbe:
    """Looks at a sample of the trained parameters that the latest growth gave copied units.

    Of a parameter larger than :data:`ENTRIES` every unit is looked at through evenly spaced entries, of fewer experts
    first.
    Ranks send each other those entries alone, one parameter at a time. The axes are those of one engine, which never
    change.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        run = run_of(engine)
        growths, history = run.record.growths, run.record.width_history
        self._engine = engine
        self._after = run.widths
        self._before = {axis: widths[-2] for axis, widths in history.items()} if growths else {}
        self._parameters: dict[str, Logical] = {}
        self._axes: dict[str, ParamAxes] = {}
        self._grids: dict[str, Grid] = {}
        self._gradients: dict[str, Tensor] | None = None
        self._seen: dict[str, Shard] | None = None
        self._grown: list[str] = []
        if not growths or growths[-1].strategy.fan_out is not Init.COPY:
            return
        self._grown = sorted(growths[-1].widths)
        axes, shards = engine_axes(engine, run.record.axes), access.shards(engine)
        parameters = logical_parameters(engine)
        alike = {name: shards[logical.like] for name, logical in parameters.items()}
        matrices = {name for name, shard in alike.items() if len(shard.shape) - axes[name].stacked_experts > 1}
        names = [
            name
            for name, shard in alike.items()
            if name in matrices and shard.master is not None and self._twins(axes[name])
        ]
        for name in chosen(names, PARAMETERS):
            self._axes[name] = axes[name]
            self._grids[name] = thinned(alike[name].shape, ENTRIES, self._twins(axes[name]))
            self._parameters[name] = parameters[name]

    @property
    def empty(self) -> bool:
        """Whether there are no copied units to look at."""
        return not self._grids

    def keep_gradients(self, masters: Sequence[Tensor]) -> None:
        """Keep this rank's part of the sampled gradients that the optimizer is about to get. Local.

        A step may come in parts, of which each calls this.
        """
        if self._seen is None or self._gradients is None:
            self._seen, self._gradients = self._shards(), {}
        for name, shard in self._seen.items():
            master = shard.master
            if master is not None and master.grad is not None and any(master is other for other in masters):
                gradient = master.grad.reshape(-1)[shard.offset : shard.offset + shard.weight.numel()]
                self._gradients[name] = shard.held(gradient, self._grids[name]).to(torch.float32, copy=True)

    @torch.no_grad()
    def measure(self) -> tuple[TwinCosines | None, TwinCosines | None]:
        """Cosines in the weights, and in the gradients that were kept since the last call; None where there are none.

        Collective.
        """
        shards, self._seen = self._seen or self._shards(), None
        weights = {name: shard.held(shard.weight, self._grids[name]) for name, shard in shards.items()}
        gradients, self._gradients = self._gradients, None
        # A step is skipped, and so has no gradients, on every rank or on none.
        found = [self._cosines(shards, held) for held in (weights, gradients) if held is not None]
        copies = {name: replicas(shard, self._parameters[name]) for name, shard in shards.items()}
        summed = _over_ranks(found, list(self._grids), copies, self._engine.device)
        return (summed[0], summed[1] if len(summed) > 1 else None)

    def _cosines(self, shards: Mapping[str, Shard], held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's cosines by parameter; a part that isn't held counts as zeros."""
        found = {}
        for name, shard in shards.items():
            grid, axes = self._grids[name], self._axes[name]
            part = held.get(name)
            if part is None:
                part = shard.held(torch.zeros_like(shard.weight), grid).float()
            sample = shard.sampled(part, grid, self._engine.device)
            cosines = [twin_cosine(sample, axes, axis, self._before, self._after) for axis in self._grown]
            found[name] = torch.cat(cosines)
        return found

    def _shards(self) -> dict[str, Shard]:
        """Of the parameters looked at, those that this rank holds."""
        shards = access.shards(self._engine)
        return {name: shards[logical.like] for name, logical in self._parameters.items() if logical.here}

    def _twins(self, axes: ParamAxes) -> list[int]:
        """The parameter's dimensions that hold copied units."""
        found = (twin_dimension(axes, axis) for axis in self._grown)
        return [position for position in found if position is not None]


def _over_ranks(
    found: Sequence[Mapping[str, Tensor]], names: Sequence[str], copies: Mapping[str, int], device: torch.device
) -> list[TwinCosines | None]:
    """The statistics of several sets of cosines by parameter, over all ranks. Collective.

    Args:
        found: what this rank has seen.
        names: of the parameters that all ranks look at, together.
        copies: how many ranks see the same, by parameter.
    """
    sums = torch.zeros(len(found), len(names), 2, dtype=torch.float64, device=device)
    largest = torch.full((len(found), len(names)), -torch.inf, dtype=torch.float64, device=device)
    for kind, cosines in enumerate(found):
        for index, name in enumerate(names):
            values = cosines.get(name)
            if values is not None and values.numel():
                sums[kind, index] = torch.stack([values.sum(), values.new_tensor(values.numel())]) / copies[name]
                largest[kind, index] = values.max()
    dist.all_reduce(sums)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return [
        _statistics(cosines, dict(zip(names, totals, strict=True)), peaks)
        for cosines, totals, peaks in zip(found, sums.tolist(), largest.tolist(), strict=True)
    ]


def _statistics(
    cosines: Mapping[str, Tensor], totals: Mapping[str, tuple[float, float]], peaks: Sequence[float]
) -> TwinCosines | None:
    counted = {name: (total, count) for name, (total, count) in totals.items() if count > 0}
    if not counted:
        return None
    mean = sum(total for total, _ in counted.values()) / sum(count for _, count in counted.values())
    by_parameter = {name: total / count for name, (total, count) in counted.items()}
    return TwinCosines(
        mean, max(peaks), by_parameter, torch.cat([torch.empty(0), *(own.cpu() for own in cosines.values())])
    )
