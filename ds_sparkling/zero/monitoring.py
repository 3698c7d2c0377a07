"""What a growth shows in the monitors: a marker and the plan, and from then on the curves of old and new elements."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from ds_sparkling.axes import Role
from ds_sparkling.diagnostics.twins import twin_cosine
from ds_sparkling.diagnostics.updates import UpdateMeter
from ds_sparkling.growth import GrowthPlan
from ds_sparkling.optim.step import BirthStep
from ds_sparkling.strategy import Init
from ds_sparkling.zero import access
from ds_sparkling.zero.naming import engine_axes
from ds_sparkling.zero.run import run_of


def hook_monitors(engine: DeepSpeedEngine, step: BirthStep) -> None:
    """After a growth, write every ``log_every`` steps: learning rate and update RMS of old and of new elements.

    ``new`` are the elements of the latest growth. The update's RMS is that of the change which the optimizer step made,
    over a sample of the elements of all ranks; adding them up is the one collective in it.
    """
    plain_step = engine.step
    every = run_of(engine).config.log_every
    meters: dict[int, UpdateMeter] = {}

    def stepped(*args: Any, **kwargs: Any) -> Any:
        growths, before = len(engine.lr_scheduler.births), engine.global_steps
        due = growths and every and engine.monitor.enabled and (before + 1) % every == 0
        if not due or (engine.managed_gradient_accumulation() and not engine.is_gradient_accumulation_boundary()):
            return plain_step(*args, **kwargs)
        if growths not in meters:
            meters[growths] = UpdateMeter(step.blocks, growths + 1)
        rates = engine.lr_scheduler.rates(0)
        meters[growths].start()
        result = plain_step(*args, **kwargs)
        sums = meters[growths].stop().to(engine.device)
        if engine.global_steps == before:
            return result
        dist.all_reduce(sums)
        rms = (sums[:, 0] / sums[:, 1].clamp(min=1)).sqrt().tolist()
        names = ("lr/old", "lr/new", "update_rms/old", "update_rms/new")
        values = (rates[0], rates[-1], rms[0], rms[-1])
        engine.monitor.write_events(
            [(name, value, engine.global_samples) for name, value in zip(names, values, strict=True)]
        )
        return result

    engine.step = stepped


@torch.no_grad()
def log_twin_cosine(engine: DeepSpeedEngine) -> float | None:
    """Write the mean cosine between the units that the latest growth copied and their sources; 1 is locked.

    Collective: gathers every parameter with copied units once, one at a time, in its own group.

    Returns:
        The mean over all copied units, this rank's experts only; None if the latest growth copied no units.
    """
    run = run_of(engine)
    stages = run.record.stages
    if not stages or stages[-1].strategy.fan_out is not Init.COPY:
        return None
    axes, history = engine_axes(engine, run.record.axes), run.record.width_history
    before = {axis: widths[-2] for axis, widths in history.items()}
    grown = stages[-1].widths
    cosines = []
    for name, shard in access.shards(engine).items():
        if any(dim.axis in grown and dim.role is Role.FAN_OUT for dim in axes[name].dims):
            weight = shard.gather(shard.weight, engine.device).view(shard.shape)
            cosines += [twin_cosine(weight, axes[name], axis, before, run.widths) for axis in grown]
    if not cosines:
        return None
    mean = float(torch.cat(cosines).mean())
    engine.monitor.write_events([("twins/cosine", mean, engine.global_samples)])
    return mean


def mark_growth(engine: DeepSpeedEngine, plan: GrowthPlan, text: str) -> None:
    """Write the growth's scalars and its plan at the engine's present sample count."""
    samples = engine.global_samples
    total, active = plan.parameters(), plan.parameters(active=True)
    engine.monitor.write_events(
        [
            ("Growth/stage", plan.stage, samples),
            ("Growth/parameters", total[1], samples),
            ("Growth/active_parameters", active[1], samples),
            *((f"Growth/{growth.axis}", growth.after, samples) for growth in plan.growths),
        ]
    )
    writer = _tensorboard(engine)
    if writer is not None:
        writer.add_text("Growth/plan", f"```\n{text}\n```", samples)
        writer.flush()


def close_monitors(engine: DeepSpeedEngine) -> None:
    """Close the engine's TensorBoard file; the grown engine opens the next one in the same directory."""
    writer = _tensorboard(engine)
    if writer is not None:
        writer.close()


def _tensorboard(engine: DeepSpeedEngine):  # type: ignore[no-untyped-def]  # SummaryWriter is an optional import
    return getattr(getattr(engine.monitor, "tb_monitor", None), "summary_writer", None)
