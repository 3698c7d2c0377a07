"""Show a growth in the monitors: a marker and the plan, and from then on the curves of old and new elements."""

from __future__ import annotations

from deepspeed import comm as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from ds_sparkling.engine import access
from ds_sparkling.engine.growing_run import run_of
from ds_sparkling.engine.logical_names import held_parameters, replicas
from ds_sparkling.engine.watch.step_callbacks import MonitorEvent
from ds_sparkling.engine.watch.tensorboard import writer_of
from ds_sparkling.engine.watch.token_meter import spent_events
from ds_sparkling.monitoring.updates import UpdateMeter
from ds_sparkling.optim.step import BirthStep


class GrowthCurves:
    """Every ``log_every`` steps of a run that grows: how wide the model is, and after a growth each birth's learning
    rate and the update RMS of old and of new elements.

    ``new`` are the elements of the latest growth. The update's RMS is that of the change which the optimizer step made,
    over a sample of the elements of all ranks; adding them up is the one collective in it.
    """

    def __init__(self, engine: DeepSpeedEngine, step: BirthStep) -> None:
        self._engine = engine
        self._step = step
        self._meter: tuple[int, UpdateMeter] | None = None
        self._rates: list[float] = []
        self._due = False

    def before_step(self) -> None:
        engine, run = self._engine, run_of(self._engine)
        every = run.config.log_every
        growths = len(engine.lr_scheduler.births)
        self._rates = []
        self._due = bool(every) and run.monitored and (engine.global_steps + 1) % (every or 1) == 0
        if not growths or not self._due:
            return
        self._rates = engine.lr_scheduler.rates(0)
        if self._meter is None or self._meter[0] != growths:
            self._meter = growths, UpdateMeter(self._step.blocks, growths + 1, _copies(engine))
        self._meter[1].start()

    def after_step(self) -> None:
        if self._due:
            self._engine.monitor.write_events(_size(self._engine))
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


def _size(engine: DeepSpeedEngine) -> list[MonitorEvent]:
    """How many growths there were and how wide the model is; nothing of a run that neither has grown nor means to.

    Written all along, it is a staircase in the monitor; at the growths alone it would be dots.
    """
    run, samples = run_of(engine), engine.global_samples
    if not run.record.growths and not run.config.growths:
        return []
    total, active = run.parameters
    values = {"number": len(run.record.growths), "parameters": total, "active_parameters": active, **run.widths}
    return [(f"Growth/{name}", float(value), samples) for name, value in values.items()]


def _copies(engine: DeepSpeedEngine) -> dict[Tensor, int]:
    """On how many ranks the tensors that are stepped are, where ranks hold them whole (stage 0)."""
    held = held_parameters(engine)
    return {
        shard.master: replicas(shard, held[shard.name])
        for shard in access.shards(engine).values()
        if shard.master is not None and shard.group is None
    }


def mark_growth(engine: DeepSpeedEngine, text: str) -> None:
    """Write the grown engine's size and the growth's plan at the engine's present sample count.

    Args:
        engine: the grown one.
        text: the plan in words, where the first rank writes it; anything on others.
    """
    samples = engine.global_samples
    engine.monitor.write_events([*_size(engine), *spent_events(engine)])
    writer = writer_of(engine)
    if writer is not None:
        writer.add_text("Growth/plan", f"```\n{text}\n```", samples)
        writer.flush()
