"""The growth of a live engine: the old one is replaced by a wider one that goes on from the same state."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from ds_sparkling.engine import access
from ds_sparkling.engine.carry_over import preserved_rng
from ds_sparkling.engine.fail_together import FailTogether
from ds_sparkling.engine.growing_run import gradients_of, run_of
from ds_sparkling.engine.move_shards import make_room, move
from ds_sparkling.engine.new_engine import new_engine
from ds_sparkling.engine.transition import Growth, Rebuild, Transition, prepared
from ds_sparkling.engine.watch.tensorboard import close_writer
from ds_sparkling.errors import PlanError

logger = logging.getLogger(__name__)


def grow_if_due(engine: DeepSpeedEngine, *, client_state: Mapping[str, Any] | None = None) -> DeepSpeedEngine:
    """Grow as planned if a growth is due; the engine itself otherwise.

    Call it before the forward pass of every step. With gradient accumulation it may be called before each micro-batch;
    a growth then waits for the first one of a step.

    Args:
        engine: made by :func:`~ds_sparkling.initialize` or adopted.
        client_state: what ``save_checkpoint`` shall put into the checkpoint written before the growth. Without it, a
            run that has saved or loaded a client state gets that one, and a checkpoint that isn't named in ``latest``.

    Returns:
        The engine to go on with.

    Raises:
        GrowthError: if a growth is due and the call is between ``backward`` and ``step``, or a rank fails.
        PlanError: if the planned widths don't fit; the engine is untouched.
    """
    while (growth := run_of(engine).due(engine.global_steps)) is not None and not gradients_of(engine).waiting:
        if engine.global_steps > growth.at_step and engine.global_rank == 0:
            logger.warning("the growth planned at step %d happens at step %d", growth.at_step, engine.global_steps)
        engine = _replaced(engine, Growth(growth.widths, planned_step=growth.at_step, client_state=client_state))
    return engine


def grow(
    engine: DeepSpeedEngine, widths: Mapping[str, int], *, client_state: Mapping[str, Any] | None = None
) -> DeepSpeedEngine:
    """Widen ``engine`` now.

    Collective. The old engine is destroyed; parameters, optimizer state, counters, loss scale, schedule, random state
    and data loader carry over. An adopted engine is grown in place.

    Args:
        engine: made by :func:`~ds_sparkling.initialize` or adopted, after an optimizer step and before the next forward
            pass.
        widths: the axes that grow, and to what.
        client_state: as for :func:`grow_if_due`.

    Returns:
        The engine to go on with.

    Raises:
        GrowthError: the engine holds gradients that no optimizer step has used, or the call isn't the same on all ranks
            (it is untouched then); or a rank failed (every rank raises the same).
        PlanError: the widths don't fit; the engine is untouched.
    """
    if not widths:
        raise PlanError("no widths to grow to; to make the engine anew at the same widths, call rebuild")
    return _replaced(engine, Growth(widths, planned_step=None, client_state=client_state))


def rebuild(engine: DeepSpeedEngine) -> DeepSpeedEngine:
    """Replace ``engine`` by a fresh one at the same widths that goes on bit for bit as if nothing had happened.

    Args:
        engine: as for :func:`grow`, which refuses unchanged widths.

    Returns:
        The engine to go on with.

    Raises:
        GrowthError: as for :func:`grow`.
    """
    return _replaced(engine, Rebuild())


def _replaced(engine: DeepSpeedEngine, change: Rebuild) -> DeepSpeedEngine:
    """The engine to go on with after ``change``. Collective."""
    with preserved_rng():
        transition = prepared(engine, change)  # what can be refused is refused here
        change.announce(engine, transition)
        all_ranks = FailTogether("growing", transition.way_out)  # from here on there is no way back
        _let_go(engine, all_ranks)
        grown = _made(transition, all_ranks)
        _fill(grown, transition, all_ranks)
    return _handed_over(grown, transition)


def _let_go(engine: DeepSpeedEngine, all_ranks: FailTogether) -> None:
    """Free the old engine, of which the shards stay."""
    with all_ranks:
        close_writer(engine)
        access.strip(engine)
    all_ranks.settle()


def _made(transition: Transition, all_ranks: FailTogether) -> DeepSpeedEngine:
    """A fresh engine at the new widths, with room for what there was."""
    # The data loader is carried over, and not made anew.
    run = replace(transition.run, arguments={**transition.run.arguments, "training_data": None})
    with all_ranks.together():
        grown = new_engine(run, transition.group)
        transition.carried.check(grown, transition.plan)
        make_room(transition.plan, transition.old, grown)
    all_ranks.settle()
    return grown


def _fill(grown: DeepSpeedEngine, transition: Transition, all_ranks: FailTogether) -> None:
    """Move parameters, optimizer state, counters and all else into the fresh engine."""
    with all_ranks.together():
        move(transition.plan, transition.old, grown, all_ranks)
        transition.carried.restore(grown, transition.plan)
        transition.change.mark(grown, transition)
    all_ranks.settle()


def _handed_over(grown: DeepSpeedEngine, transition: Transition) -> DeepSpeedEngine:
    """The engine in the hands of whoever held the old one."""
    run = transition.run
    if transition.compiled and grown.global_rank == 0:
        logger.warning("the engine was compiled and the grown one isn't yet: call engine.compile() on it")
    if run.on_growth is None:
        transition.held.leave_word(grown)
        return grown
    grown = transition.held.become(grown)
    all_ranks = FailTogether("telling of the growth")
    with all_ranks.together():
        run.on_growth(grown)
    all_ranks.settle()
    return grown
