"""Estimate what each growth of a run takes: memory, bytes and the pause, which rests on assumptions."""

from __future__ import annotations

from dataclasses import dataclass

from ds_sparkling.planner.assumptions import Assumptions
from ds_sparkling.planner.memory import Footprint, Traffic, built_whole, growing, traffic, training
from ds_sparkling.planner.subject import PlannedGrowth, PlannedRun


@dataclass(frozen=True)
class Pause:
    """Seconds that training stands still: by the checkpoint, the wide engine's start, and the state's move."""

    checkpoint: float
    engine_start: float
    move: float

    @property
    def total(self) -> float:
        return self.checkpoint + self.engine_start + self.move


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one growth, on the rank that has most.

    Attributes:
        before: bytes held while the narrow model trains.
        during: bytes held at the peak of the growth.
        after: bytes held while the wide model trains.
        built: bytes of host memory for the model as it is built, before DeepSpeed divides it.
        traffic: bytes received and written.
        pause: seconds, assumed.
    """

    before: Footprint
    during: Footprint
    after: Footprint
    built: int
    traffic: Traffic
    pause: Pause


def cost(subject: PlannedRun, growth: PlannedGrowth, assumed: Assumptions) -> Cost:
    """What ``growth`` takes."""
    model, setting = subject.model, subject.setting
    before = model.tensors(growth.before, setting.expert_parallel)
    after = model.tensors(growth.widths, setting.expert_parallel)
    parameters = model.parameters(growth.widths)
    sent = traffic(before, after, parameters, setting, checkpoint=subject.checkpoint)
    return Cost(
        before=training(before, setting),
        during=growing(before, after, setting),
        after=training(after, setting),
        built=built_whole(parameters, setting),
        traffic=sent,
        pause=_pause(sent, assumed),
    )


def _pause(sent: Traffic, assumed: Assumptions) -> Pause:
    return Pause(
        sent.checkpoint / (assumed.write_bandwidth * 1e9),
        assumed.engine_start + sent.start / (assumed.bandwidth * 1e9),
        (sent.moved + sent.refreshed) / (assumed.bandwidth * 1e9),
    )
