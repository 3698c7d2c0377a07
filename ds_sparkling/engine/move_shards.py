"""Move one engine's state into a wider one: every rank gets what its part is made of, and makes it.

No rank ever holds more than its own shards and a few buckets. Expert parameters move within their
expert-data-parallel group.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from ds_sparkling.engine import access
from ds_sparkling.engine.exchange import Arrival, Exchange, Transfer
from ds_sparkling.engine.fail_together import FailTogether
from ds_sparkling.engine.logical_names import Logical, held_parameters, logical_parameters
from ds_sparkling.engine.optimizers import adapter_of
from ds_sparkling.engine.shard import Shard
from ds_sparkling.errors import GrowthError
from ds_sparkling.growth import GrowthPlan, GrowthTables, Widener
from ds_sparkling.growth.survey import Spread, Statistics, Survey
from ds_sparkling.progress import progress_bar
from ds_sparkling.spec.strategy import OptimizerState


def make_room(plan: GrowthPlan, old: dict[str, Shard], engine: DeepSpeedEngine) -> None:
    """Give the fresh ``engine`` the optimizer state to be filled from ``old``.

    Raises:
        GrowthError: if it isn't what was planned.
    """
    access.release_memory()
    adapter_of(engine).begin_writing()
    templates = {name: old[plan.source_of(name)] for name in held_parameters(engine)}
    access.make_states(engine, templates, drop=plan.strategy.optimizer_state is OptimizerState.DROP)
    _check_shapes(plan, access.shards(engine), logical_parameters(engine))


@torch.no_grad()
def move(plan: GrowthPlan, old: dict[str, Shard], engine: DeepSpeedEngine, all_ranks: FailTogether) -> None:
    """Fill the fresh ``engine``, which has room, with the grown contents of ``old``, which is emptied.

    Collective. A failure of one rank's own work is kept in ``all_ranks``, and its collectives go on.
    """
    new, tables = access.shards(engine), GrowthTables(plan)
    wideners = {
        name: Widener(plan, logical.name, logical.stack, tables=tables)
        for name, logical in held_parameters(engine).items()
    }
    sources = {name: old[plan.source_of(name)] for name in new}
    transfers = _transfers(wideners, sources, new)
    statistics = _statistics(transfers, engine.device, all_ranks)
    local = [transfer for transfer in transfers if transfer.local]
    exchanges = [Exchange(alike, engine.device) for alike in _alike(transfers)]
    with progress_bar(
        itertools.chain(([_arrived(transfer, engine.device)] for transfer in local), *exchanges),
        desc="growing",
        unit="part",
        total=len(local) + sum(exchange.buckets for exchange in exchanges),
        shown=engine.global_rank == 0,
    ) as parts:
        for part in parts:
            for arrival in part:
                with all_ranks:
                    _fill(arrival, statistics.get(arrival.transfer), engine.device)
    for name, source in sources.items():
        for key in source.wholes:
            whole = source.whole(key, engine.device)
            with all_ranks:
                _fill_whole(wideners[name], key, whole, new[name].wholes[key])
    sources.clear()
    old.clear()
    adapter_of(engine).finish_writing()


def _transfers(
    wideners: Mapping[str, Widener], sources: Mapping[str, Shard], new: Mapping[str, Shard]
) -> list[Transfer]:
    """Every parameter's weight and states.

    Args:
        wideners: by the parameter's name in the fresh engine.
        sources: what it comes from, by the same name.
        new: where it goes.
    """
    windows: dict[Hashable, int] = {}
    found = []
    for name, source in sources.items():
        target = new[name]
        for key in (None, *source.states):
            window = windows.setdefault((_window(target), key), len(windows))
            found.append(
                Transfer(
                    widener=wideners[name],
                    key=key,
                    group=target.group,
                    rank=target.rank,
                    source=source.part(key),
                    old=source.pieces,
                    target=target.part(key),
                    new=target.pieces,
                    window=window,
                )
            )
    return found


def _window(shard: Shard) -> Hashable:
    """The same for parameters whose pieces lie in one window of each rank."""
    if shard.master is not None and shard.master.numel() == shard.pieces.window:
        return id(shard.master)
    return shard.name


def _arrived(transfer: Transfer, device: torch.device) -> Arrival:
    """All of a tensor that needs nothing from other ranks."""
    there = replace(transfer, source=transfer.source.to(device))
    return Arrival(transfer=transfer, piece=transfer.new[transfer.rank], elements=there.elements)


def _alike(transfers: Iterable[Transfer]) -> list[list[Transfer]]:
    """The transfers between ranks, by process group and dtype."""
    found: dict[Hashable, list[Transfer]] = {}
    for transfer in transfers:
        if not transfer.local:
            found.setdefault((id(transfer.group), transfer.source.dtype), []).append(transfer)
    return list(found.values())


def _statistics(
    transfers: Iterable[Transfer], device: torch.device, all_ranks: FailTogether
) -> dict[Transfer, Statistics]:
    """What new entries need to know of whole tensors, which all ranks that hold them look at together. Collective."""
    surveys: dict[Hashable, list[tuple[Transfer, Survey]]] = {}
    for transfer in transfers:
        if transfer.key is None or transfer.widener.is_weights(transfer.key):
            survey = transfer.widener.survey(of_weight=transfer.key is None)
            surveys.setdefault(None if transfer.local else id(transfer.group), []).append((transfer, survey))
    found: dict[Transfer, Statistics] = {}
    spreads: dict[Widener, tuple[Spread, ...]] = {}
    for surveyed in surveys.values():
        largest = [torch.zeros(survey.sizes[0], dtype=torch.float64) for _, survey in surveyed]
        with all_ranks:
            for (transfer, survey), here in zip(surveyed, largest, strict=True):
                here.copy_(survey.largest(transfer.elements, transfer.held.start, transfer.held.stop))
        _reduce(largest, dist.ReduceOp.MAX, surveyed[0][0], device)
        sums = [torch.zeros(survey.sizes[1], dtype=torch.int64) for _, survey in surveyed]
        with all_ranks:
            for (transfer, survey), of_all, here in zip(surveyed, largest, sums, strict=True):
                here.copy_(survey.sums(transfer.elements, transfer.held.start, transfer.held.stop, of_all))
        _reduce(sums, dist.ReduceOp.SUM, surveyed[0][0], device)
        with all_ranks:
            for (transfer, survey), of_all, total in zip(surveyed, largest, sums, strict=True):
                statistics = survey.statistics(of_all, total)
                spread = spreads.setdefault(transfer.widener, statistics.spreads)  # the weight's comes first
                found[transfer] = replace(statistics, spreads=spread)
    return found


def _reduce(parts: Sequence[Tensor], how: Any, one: Transfer, device: torch.device) -> None:
    """Reduce numbers over all ranks of a group, in place; collective unless ``one`` of its transfers is local."""
    whole = torch.cat([*parts]).to(device)
    if one.local or not len(whole):
        return
    dist.all_reduce(whole, how, group=one.group)
    for part, reduced in zip(parts, whole.cpu().split([len(part) for part in parts]), strict=True):
        part.copy_(reduced)


def _fill(arrival: Arrival, statistics: Statistics | None, device: torch.device) -> None:
    """Make a piece of a grown tensor."""
    transfer, piece = arrival.transfer, arrival.piece
    out, widener = transfer.part(piece), transfer.widener
    made = out if out.device == device else torch.empty_like(out, device=device)
    if transfer.key is None:
        widener.weight(arrival.elements, made, piece.start, statistics)
    else:
        widener.state(transfer.key, arrival.elements, made, piece.start, statistics)
    if made is not out:
        out.copy_(made)


def _fill_whole(widener: Widener, key: str, whole: Tensor, out: Tensor) -> None:
    """Make all of a state that every rank with a part of its parameter holds; others have no room for it."""
    if out.numel():
        made = torch.empty_like(out, device=whole.device)
        widener.state(key, whole, made)
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
