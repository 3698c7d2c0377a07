"""Tell a run, on its first rank: at the start what it hasn't planned, and at a growth the plan."""

from __future__ import annotations

import logging

from deepspeed.runtime.engine import DeepSpeedEngine

from ds_sparkling.engine.growing_run import GrowingRun, run_of
from ds_sparkling.growth import GrowthPlan
from ds_sparkling.growth.plan_in_words import plan_in_words
from ds_sparkling.optim.scheduler import planned_end
from ds_sparkling.spec.config import BLOCK, GrowthConfig, value_at

logger = logging.getLogger(__name__)


def notice_plans(engine: DeepSpeedEngine, *, loop_saves: bool = False) -> None:
    """Warn of growths that won't happen, or not as one may think.

    Args:
        engine: fitted out, at the start of its run.
        loop_saves: whether the loop around the engine saves before a growth.
    """
    run = run_of(engine)
    if engine.global_rank != 0:
        return
    if BLOCK not in run.ds_config:
        logger.warning(
            'the DeepSpeed config has no "%s" block: no growth is planned, and only grow(engine, widths) makes one',
            BLOCK,
        )
    if run.config.growths and run.config.checkpoint_before_growth and run.checkpoint_dir is None and not loop_saves:
        logger.warning("no checkpoint directory is known, so none is written before a growth; pass checkpoint=DIR")
    notice_end(run, _steps_in_all(run), "the run (training.steps)")
    notice_end(run, planned_end(engine.lr_scheduler.base), f"its {type(engine.lr_scheduler.base).__name__}")


def notice_end(run: GrowingRun, end: int | None, whose: str) -> None:
    """Warn of the growths still to come that are planned for a step at which something has ended.

    Args:
        run: with the plans.
        end: the number of steps after which it has; None if nobody knows.
        whose: end that is.
    """
    late = [growth for growth in _to_come(run) if end is not None and growth.at_step >= end]
    if late:
        logger.warning(
            "the growth planned at step %d comes too late: %s ends after %s steps; plan it earlier (%s.growths)",
            late[0].at_step,
            whose,
            end,
            BLOCK,
        )


def notice_growth(run: GrowingRun, plan: GrowthPlan, step: int) -> str:
    """Show the plan of a growth that happens now, once, in any script.

    It is a warning, which is what Python shows of a library's messages where nobody has set logging up; a growth is
    rare, and changes the model under its user's hands.

    Returns:
        The plan in words.
    """
    steps = _steps_in_all(run)
    fraction = step / steps if steps is not None and step < steps else None
    words = plan_in_words(plan, fraction=fraction)
    logger.warning("growing at step %d\n%s", step, words)
    return words


def _to_come(run: GrowingRun) -> list[GrowthConfig]:
    happened = {growth.planned_step for growth in run.record.growths}
    return [growth for growth in run.config.growths if growth.at_step not in happened]


def _steps_in_all(run: GrowingRun) -> int | None:
    """How many steps the run has, where its config is one of the main job's."""
    steps = value_at(run.ds_config, "training.steps")
    return steps if isinstance(steps, int) and not isinstance(steps, bool) else None
