"""What a growth shows in the monitors: a marker and the plan, and from then on the curves of old and new elements."""

from __future__ import annotations

from deepspeed import comm as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from ds_sparkling.engine import access
from ds_sparkling.engine.growing_run import run_of
from ds_sparkling.engine.logical_names import held_parameters, replicas
from ds_sparkling.engine.watch.tensorboard import writer_of
from ds_sparkling.engine.watch.token_meter import spent_events
from ds_sparkling.growth import GrowthPlan
from ds_sparkling.monitoring.updates import UpdateMeter
from ds_sparkling.optim.step import BirthStep


class GrowthCurves:
    """After a growth, every ``log_every`` steps: each birth's learning rate, old and new elements' update RMS.

    ``new`` are the elements of the latest growth. The update's RMS is that of the change which the optimizer step made,
    over a sample of the elements of all ranks; adding them up is the one collective in it.
    """

    def __init__(self, engine: DeepSpeedEngine, step: BirthStep) -> None:
        self._engine = engine
        self._step = step
        self._meter: tuple[int, UpdateMeter] | None = None
        self._rates: list[float] = []

    def before_step(self) -> None:
        engine, run = self._engine, run_of(self._engine)
        every = run.config.log_every
        growths = len(engine.lr_scheduler.births)
        self._rates = []
        if not growths or not every or not run.monitored or (engine.global_steps + 1) % every:
            return
        self._rates = engine.lr_scheduler.rates(0)
        if self._meter is None or self._meter[0] != growths:
            self._meter = growths, UpdateMeter(self._step.blocks, growths + 1, _copies(engine))
        self._meter[1].start()

    def after_step(self) -> None:
        if not self._rates or self._meter is None:
            return
        sums = self._meter[1].stop().to(self._engine.device)
        if not self._engine.was_step_applied():
            return  # for infinite gradients, on all ranks
        dist.all_reduce(sums)
        rms = (sums[:, 0] / sums[:, 1].clamp(min=1)).sqrt().tolist()
        values = {
            "lr/old": self._rates[0],
            "lr/new": self._rates[-1],
            "update_rms/old": rms[0],
            "update_rms/new": rms[-1],
        }
        values |= {f"lr/birth_{birth}": rate for birth, rate in enumerate(self._rates)}
        samples = self._engine.global_samples
        self._engine.monitor.write_events([(name, value, samples) for name, value in values.items()])


def _copies(engine: DeepSpeedEngine) -> dict[Tensor, int]:
    """On how many ranks the tensors that are stepped are, where ranks hold them whole (stage 0)."""
    held = held_parameters(engine)
    return {
        shard.master: replicas(shard, held[shard.name])
        for shard in access.shards(engine).values()
        if shard.master is not None and shard.group is None
    }


def mark_growth(engine: DeepSpeedEngine, plan: GrowthPlan, text: str) -> None:
    """Write the growth's scalars and its plan at the engine's present sample count."""
    samples = engine.global_samples
    total, active = plan.parameters(), plan.parameters(active=True)
    engine.monitor.write_events(
        [
            ("Growth/number", plan.number, samples),
            ("Growth/parameters", total[1], samples),
            ("Growth/active_parameters", active[1], samples),
            *((f"Growth/{growth.axis}", growth.after, samples) for growth in plan.growths),
            *spent_events(engine),
        ]
    )
    writer = writer_of(engine)
    if writer is not None:
        writer.add_text("Growth/plan", f"```\n{text}\n```", samples)
        writer.flush()
