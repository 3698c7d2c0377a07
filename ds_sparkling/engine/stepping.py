"""The engine's optimizer step and scheduler, made to tell births apart."""

from __future__ import annotations

from dataclasses import replace

from deepspeed import comm as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from ds_sparkling.engine import access, hooks
from ds_sparkling.engine.growing_run import run_of
from ds_sparkling.engine.logical_names import engine_axes, logical_parameters
from ds_sparkling.engine.optimizers import adapter_of
from ds_sparkling.errors import UnsupportedError
from ds_sparkling.growth import Block, birth_blocks
from ds_sparkling.growth.births import join, stretch
from ds_sparkling.optim.elementwise import steps_elementwise
from ds_sparkling.optim.optimizer_trial import what_is_kept
from ds_sparkling.optim.scheduler import RewarmupScheduler
from ds_sparkling.optim.step import BirthStep
from ds_sparkling.optim.weight_norm import NormRatios, Part, Parts
from ds_sparkling.spec.layers import birth_in
from ds_sparkling.spec.strategy import BiasCorrection, Scope, Strategy


def hook_step(engine: DeepSpeedEngine) -> BirthStep:
    """Put a :class:`RewarmupScheduler` into the engine's slot and a :class:`BirthStep` into its base optimizer.

    Returns:
        The step.
    """
    optimizer = adapter_of(engine).base
    hooks.LR_SCHEDULER.install(engine, RewarmupScheduler(engine.lr_scheduler, optimizer))
    norms = NormRatios(lambda: _parts_of(engine), lambda squares: _add_up(engine, squares))
    step = BirthStep(optimizer, engine.lr_scheduler, access.master_groups(engine), lambda: blocks_of(engine), norms)
    hooks.until_unhooked(engine, step.give_back)
    return step


def check_optimizer(engine: DeepSpeedEngine, strategy: Strategy) -> None:
    """Refuse a base optimizer whose state can't grow, or that can't treat births differently where it has to.

    Raises:
        UnsupportedError: if it keeps state other than numbers and a tensor's elements, updates an element by looking at
            others, or keeps more numbers per tensor than a step count; names what to change.
        PlanError: if the kind of a state isn't known.
    """
    optimizer = adapter_of(engine).base
    name = type(optimizer).__name__
    for shard in access.shards(engine).values():
        for key in (*shard.states, *shard.wholes):
            strategy.state_kind(key)
    apart = strategy.rewarmup.scope is Scope.NEW or strategy.bias_correction is BiasCorrection.RESTART
    one_each = {(index, min(master.dim(), 2)): master for master, index in access.master_groups(engine).items()}
    for (index, _), master in one_each.items():
        group = optimizer.param_groups[index]
        kept = what_is_kept(optimizer, group, master)
        kept.check(name, strategy)
        others = kept.numbers - {"step"}
        if apart and others:
            raise UnsupportedError(
                f"{name} keeps {sorted(others)} per tensor, which can't differ between its elements; set "
                'rewarmup.scope to "none" and bias_correction to "inherit"'
            )
        if apart and not steps_elementwise(optimizer, group, master):
            raise UnsupportedError(
                f"{name} updates an element by looking at others, or counts in its groups, so new "
                "elements can't have a learning rate of their own: use an elementwise optimizer like AdamW, or set "
                'rewarmup.scope to "none" and bias_correction to "inherit"'
            )


def blocks_of(engine: DeepSpeedEngine) -> dict[Tensor, list[Block]]:
    """The births in every tensor that the base optimizer steps, by what the growth record tells."""
    _, parts = _parts_of(engine)
    return {
        master: _padded([block for part in found for block in part.blocks], master.numel())
        for master, found in parts.items()
    }


def _parts_of(engine: DeepSpeedEngine) -> Parts:
    """Which parameters' elements lie where in the tensors that the base optimizer steps, and when they were born."""
    record = run_of(engine).record
    axes, history, layers = engine_axes(engine, record.axes), record.width_history, record.layer_births
    shards, parameters = access.shards(engine), logical_parameters(engine)
    parts: dict[Tensor, list[Part]] = {}
    for number, (name, logical) in enumerate(parameters.items()):
        shard = shards[logical.like]
        if logical.here and shard.master is not None:
            piece, layer = shard.piece, birth_in(name, layers)
            blocks = birth_blocks(axes[name], shard.shape, history, piece.start, piece.stop, layer=layer)
            placed = tuple(replace(block, start=block.start + shard.offset) for block in blocks)
            parts.setdefault(shard.master, []).append(Part(number, placed))
    return len(parameters), parts


def _add_up(engine: DeepSpeedEngine, squares: Tensor) -> None:
    """Add up over all ranks. Every element of a parameter is on equally many of them, so ratios come out right."""
    total = squares.to(engine.device)
    dist.all_reduce(total)
    squares.copy_(total)


def _padded(blocks: list[Block], numel: int) -> list[Block]:
    """Blocks of a flat tensor of ``numel`` elements, end to end; padding counts as original elements."""
    filled: list[Block] = []
    end = 0
    for block in [*sorted(blocks, key=lambda block: block.start), stretch(numel, numel, 0)]:
        if block.start > end:
            filled.append(stretch(end, block.start, 0))
        if block.stop > block.start:
            filled.append(block)
        end = block.stop
    return join(filled)
