"""What each growth of a run takes: memory, bytes and the pause, which rests on assumptions."""

from __future__ import annotations

from dataclasses import dataclass

from ds_sparkling.errors import ConfigError
from ds_sparkling.planner.memory import Footprint, Traffic, built_whole, growing, traffic, training
from ds_sparkling.planner.subject import PlannedGrowth, PlannedRun


@dataclass(frozen=True)
class Assumptions:
    """What no config tells, and what the pause is made of.

    Attributes:
        bandwidth: that a rank receives with, in GB/s (1e9 bytes).
        write_bandwidth: that a rank writes a checkpoint with, in GB/s.
        engine_start: seconds that DeepSpeed takes to construct the wide engine, its broadcast apart.
    """

    bandwidth: float = 25.0
    write_bandwidth: float = 1.0
    engine_start: float = 30.0

    def __post_init__(self) -> None:
        if not (self.bandwidth > 0 and self.write_bandwidth > 0 and self.engine_start >= 0):
            raise ConfigError(
                "--bandwidth and --write-bandwidth must be positive and --engine-start not negative, got "
                f"{self.bandwidth}, {self.write_bandwidth} and {self.engine_start}"
            )


@dataclass(frozen=True)
class Pause:
    """Seconds that training stands still: by the checkpoint, the wide engine's start, and the state's move."""

    checkpoint: float
    engine_start: float
    move: float

    @property
    def total(self) -> float:
        return self.checkpoint + self.engine_start + self.move


@dataclass(frozen=True)
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
        training(before, setting),
        growing(before, after, setting),
        training(after, setting),
        built_whole(parameters, setting),
        sent,
        _pause(sent, assumed),
    )


def _pause(sent: Traffic, assumed: Assumptions) -> Pause:
    return Pause(
        sent.checkpoint / (assumed.write_bandwidth * 1e9),
        assumed.engine_start + sent.start / (assumed.bandwidth * 1e9),
        (sent.moved + sent.refreshed) / (assumed.bandwidth * 1e9),
    )
