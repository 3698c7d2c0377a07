"""The plain way around a live growth: save, convert on one rank, load into a wide engine.

It isn't clever: the rank that converts joins every parameter and its moments in its own memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from ds_sparkling.engine import access
from ds_sparkling.engine.logical_names import engine_axes, held_parameters, logical_shapes
from ds_sparkling.engine.optimizers import adapter_of
from ds_sparkling.engine.shard import Shard
from ds_sparkling.growth import GrowthPlan, Widener, make_plan
from ds_sparkling.spec.partition import Piece, whole_piece

_WEIGHT = "weight"
_STATES = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Place:
    """Where a rank's optimizer file holds its piece of a parameter: from ``offset`` on in flat tensor ``flat``."""

    flat: int
    offset: int
    piece: Piece
    experts: tuple[int, int] | None


def through_files(
    engine: DeepSpeedEngine,
    narrow: Mapping[str, int],
    wide: Mapping[str, int],
    start: Callable[[], DeepSpeedEngine],
    directory: Path,
) -> DeepSpeedEngine:
    """Carry the state of ``engine`` (ZeRO-3, AdamW) over into the wide engine that ``start`` makes, through files.

    Collective.

    Args:
        engine: at widths ``narrow``; it is destroyed.
        directory: for the files, which are removed at the end; seen by all ranks.
    """
    run = engine.sparkling
    axes = engine_axes(engine, run.record.axes)
    plan = make_plan(logical_shapes(engine), axes, narrow, wide, run.config.strategy, number=1)
    places: list[Any] = [None] * dist.get_world_size()
    torch.distributed.all_gather_object(places, _places(engine))
    engine.save_checkpoint(str(directory), tag="narrow")
    access.strip(engine)
    dist.barrier()
    if dist.get_rank() == 0:
        _convert(directory / "narrow", places, plan, directory / "wide.pt")
    dist.barrier()
    engine = start()
    _load(engine, directory / "wide.pt")
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(directory)
    return engine


def _places(engine: DeepSpeedEngine) -> dict[str, _Place]:
    """Where this rank's optimizer file will hold which parameter."""
    held = held_parameters(engine)
    order = [id(master) for master in access.master_groups(engine)]
    return {
        shard.name: _Place(
            order.index(id(shard.master)), int(shard.weight.storage_offset()), shard.piece, held[shard.name].stack
        )
        for shard in access.shards(engine).values()
    }


@torch.no_grad()
def _convert(checkpoint: Path, places: Sequence[Mapping[str, _Place]], plan: GrowthPlan, path: Path) -> None:
    """Join what the ranks saved, widen it, and save it as parameter -> weight or kind of state -> tensor."""
    whole = {param.name: {key: torch.empty(param.before) for key in (_WEIGHT, *_STATES)} for param in plan.params}
    steps: dict[str, Any] = {}
    for rank, held in enumerate(places):
        (file,) = checkpoint.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        saved = torch.load(file, mmap=True, weights_only=False, map_location="cpu")["optimizer_state_dict"]
        for name, place in held.items():
            state = saved["optimizer_state_dict"]["state"][place.flat]
            steps[name] = state["step"]
            parts = {_WEIGHT: saved["fp32_flat_groups"][place.flat], **{key: state[key] for key in _STATES}}
            for key, flat in parts.items():
                target = _of_slice(whole[name][key], place.experts)[place.piece.start : place.piece.stop]
                target.copy_(flat[place.offset : place.offset + place.piece.numel])
    wide = {name: _widened(Widener(plan, name), parts) for name, parts in whole.items()}
    torch.save({"steps": steps, "tensors": wide}, path)


def _of_slice(tensor: Tensor, experts: tuple[int, int] | None) -> Tensor:
    """A view of ``tensor``, flattened; of stacked experts only those that a rank holds."""
    return (tensor if experts is None else tensor[slice(*experts)]).view(-1)


def _widened(widener: Widener, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    wide = {key: torch.empty(widener.numel) for key in parts}
    for key, out in wide.items():
        if key == _WEIGHT:
            widener.weight(parts[key], out)
        else:
            widener.state(key, parts[key], out)
    return {key: out.view(widener.after) for key, out in wide.items()}


@torch.no_grad()
def _load(engine: DeepSpeedEngine, path: Path) -> None:
    """Copy this rank's pieces out of the file that :func:`_convert` wrote."""
    saved = torch.load(path, mmap=True)
    held = held_parameters(engine)
    adapter_of(engine).begin_writing()
    access.make_states(engine, _templates(saved), drop=False)
    for name, shard in access.shards(engine).items():
        piece = shard.piece
        for key, part in {_WEIGHT: shard.weight, **shard.states}.items():
            whole = _of_slice(saved["tensors"][name][key], held[name].stack)
            part[: piece.numel].copy_(whole[piece.start : piece.stop])
    adapter_of(engine).finish_writing()


def _templates(saved: Mapping[str, Any]) -> dict[str, Shard]:
    """Shards without contents, which tell ``make_states`` what state there is of every parameter."""
    nothing = torch.empty(0)
    states = dict.fromkeys(_STATES, nothing)
    return {
        name: Shard(
            name=name,
            shape=tuple(tensors[_WEIGHT].shape),
            pieces=whole_piece(0),
            rank=0,
            group=None,
            weight=nothing,
            states=states,
            scalars={"step": saved["steps"][name]},
        )
        for name, tensors in saved["tensors"].items()
    }
