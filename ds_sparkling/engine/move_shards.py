"""Move one engine's state into a wider one: gather, grow, repartition, parameter by parameter.

No rank ever holds more than its own shards and one whole parameter of one state kind. Expert parameters move within
their expert-data-parallel group.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from ds_sparkling.engine import access
from ds_sparkling.engine.fail_together import FailTogether
from ds_sparkling.engine.logical_names import Logical, held_parameters, logical_parameters
from ds_sparkling.engine.optimizers import adapter_of
from ds_sparkling.engine.shard import Shard
from ds_sparkling.errors import GrowthError
from ds_sparkling.growth import GrowthPlan, GrowthTables, Widener
from ds_sparkling.growth.widen import Statistics
from ds_sparkling.progress import progress_bar
from ds_sparkling.spec.strategy import OptimizerState


def make_room(plan: GrowthPlan, old: dict[str, Shard], engine: DeepSpeedEngine) -> None:
    """Give the fresh ``engine`` the optimizer state to be filled from ``old``.

    Raises:
        GrowthError: if it isn't what was planned.
    """
    access.release_memory()
    adapter_of(engine).begin_writing()
    access.make_states(engine, old, drop=plan.strategy.optimizer_state is OptimizerState.DROP)
    _check_shapes(plan, access.shards(engine), logical_parameters(engine))


@torch.no_grad()
def move(plan: GrowthPlan, old: dict[str, Shard], engine: DeepSpeedEngine, all_ranks: FailTogether) -> None:
    """Fill the fresh ``engine``, which has room, with the grown contents of ``old``, which is emptied on the way.

    Collective. A failure of one rank's own work is kept in ``all_ranks``, and its collectives go on.
    """
    new, held, tables = access.shards(engine), held_parameters(engine), GrowthTables(plan)
    with progress_bar(list(old), desc="growing", unit="tensor", shown=engine.global_rank == 0) as names:
        for name in names:
            _move_one(tables, held[name], old.pop(name), new.pop(name), engine.device, all_ranks)
    adapter_of(engine).finish_writing()


def _move_one(
    tables: GrowthTables,
    logical: Logical,
    source: Shard,
    target: Shard,
    device: torch.device,
    all_ranks: FailTogether,
) -> None:
    """Fill one parameter's shard and states; collective."""
    widener: Widener | None = None
    weights: Statistics | None = None
    with all_ranks:
        widener = Widener(tables.plan, logical.name, logical.stack, tables=tables)
    gathers: list[tuple[str | None, Callable[[torch.device], Tensor]]] = [
        (None, partial(source.gather, source.weight)),
        *((key, partial(source.gather, part)) for key, part in source.states.items()),
        *((key, partial(source.whole, key)) for key in source.wholes),
    ]
    for key, gather in gathers:
        whole = gather(device)
        with all_ranks:
            if widener is not None:
                if key is None:
                    weights = widener.statistics(whole)
                _fill(widener, key, whole, *_room(target, key), weights)
        del whole  # before the next one is gathered


def _room(target: Shard, key: str | None) -> tuple[Tensor, int]:
    """Where the weight (or state ``key``) goes, and the index of its first element in the whole tensor."""
    if key is not None and key in target.wholes:
        return target.wholes[key], 0
    part = target.weight if key is None else target.states[key]
    return part[: target.piece.numel], target.piece.start


def _fill(
    widener: Widener, key: str | None, whole: Tensor, out: Tensor, start: int, weights: Statistics | None
) -> None:
    """Write the elements from ``start`` on of the grown weight (or state ``key``) into ``out``.

    Args:
        weights: statistics of the weight.
    """
    made = out if out.device == whole.device else torch.empty_like(out, device=whole.device)
    if key is None:
        widener.weight(whole, made, start, weights)
    elif widener.is_weights(key):
        widener.state(key, whole, made, start, widener.statistics(whole, weights))
    else:
        widener.state(key, whole, made, start)
    if made is not out:
        out.copy_(made)


def _check_shapes(plan: GrowthPlan, new: dict[str, Shard], logical: dict[str, Logical]) -> None:
    """The engine that build_model gave must have exactly the planned shapes."""
    planned = {param.name: param.after for param in plan.params}
    if planned.keys() != logical.keys():
        raise GrowthError(
            f"the grown engine has other parameters than planned: {sorted(planned.keys() ^ logical.keys())[:3]}"
        )
    for name, shape in planned.items():
        expected, found = logical[name].part(shape), new[logical[name].like].shape
        if found != expected:
            raise GrowthError(f"{name}: the grown engine has shape {found}, planned was {expected}")
