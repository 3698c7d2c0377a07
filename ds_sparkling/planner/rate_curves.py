"""The learning rates that a planned run gives its births, step by step, and an account of them in text.

They come out of the scheduler that trains, driven as the engine drives it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ds_sparkling.errors import ConfigError
from ds_sparkling.optim.scheduler import RewarmupScheduler
from ds_sparkling.spec.birth_schedule import Birth
from ds_sparkling.spec.config import BLOCK, GrowthConfig, SparklingConfig
from ds_sparkling.spec.strategy import Scope
from ds_sparkling.text_tables import text_table

#: A rate this close to the base rate, as a share of it, counts as having met it.
_CLOSE = 0.01
#: Steps of the longest run whose curves are drawn; they take minutes.
_MOST_STEPS = 10_000_000


@dataclass(frozen=True)
class RateCurves:
    """Learning rates by optimizer step; step t is the one taken when t steps are done, as in ``at_step``.

    Attributes:
        growths: all planned growths.
        births: the schedules of those that happen within the steps, as they are at the growth.
        base: fp64 [steps], the base schedule.
        rates: fp64 [1 + births, steps], of the original elements, then of each growth's; NaN before it.
    """

    growths: tuple[GrowthConfig, ...]
    births: tuple[Birth, ...]
    base: NDArray[np.float64]
    rates: NDArray[np.float64]

    @property
    def steps(self) -> int:
        return len(self.base)

    @property
    def together(self) -> bool:
        """Whether a re-warm-up takes all elements along, so that all have one rate."""
        return any(birth.rewarmup.scope is Scope.ALL for birth in self.births)

    @property
    def shown(self) -> dict[str, NDArray[np.float64]]:
        """What there is to see besides the base schedule, which the original elements follow unless all go together."""
        if self.together:
            return {"all elements": self.rates[0]}
        return {f"growth {number}": self.rates[number] for number in range(1, len(self.births) + 1)}

    def span(self, number: int) -> range:
        """The steps that growth ``number``'s curve is for: to the end, or to the next growth if all go together."""
        ends = [growth.at_step for growth in self.growths[number : len(self.births)]] if self.together else []
        return range(self.growths[number - 1].at_step, min([*ends, self.steps]))

    def rewarmed(self, number: int) -> int | None:
        """The step at which growth ``number``'s re-warm-up is over; None if there is none or its span ends before."""
        span, rewarmup = self.span(number), self.births[number - 1].rewarmup
        step = span.start + rewarmup.steps
        return step if rewarmup.scope is not Scope.NONE and step in span else None

    def landmarks(self) -> dict[int, list[str]]:
        """The steps that matter, and what happens there: growths, turns of the curves, and some in between."""
        notes: dict[int, list[str]] = defaultdict(list)
        notes[0].append("start")
        for eighth in range(1, 8):
            notes[self.steps * eighth // 8] += []
        if self.base.min() < self.base.max():
            # Not argmax: a plateau may be uneven in its last bits.
            highest = np.flatnonzero(self.base >= self.base.max() * (1 - 1e-9))[0]
            notes[int(highest)].append("peak of the base schedule")
        for number in range(1, len(self.births) + 1):
            born = self.span(number).start
            if born > 0:
                notes[born - 1].append(f"before growth {number}")
            notes[born].append(f"growth {number}")
            rewarmed = self.rewarmed(number)
            if rewarmed is not None:
                notes[rewarmed].append(f"growth {number} re-warmed")
        notes[self.steps - 1].append("end")
        return notes


def simulate(
    config: SparklingConfig,
    steps: int,
    lr: float,
    make_scheduler: Callable[[torch.optim.Optimizer], Any],
) -> RateCurves:
    """Step the schedulers through a run without a model.

    Args:
        config: says when growths happen and how their elements are treated.
        steps: optimizer steps in all; none of them is skipped.
        lr: the optimizer's rate. The optimizer's kind doesn't matter to a schedule, so a stand-in does.
        make_scheduler: makes the base scheduler; None for a constant rate.

    Raises:
        ConfigError: if no growth is planned, there are too many steps, or a scheduler doesn't get through.
    """
    if not config.growths:
        raise ConfigError(f"no growth is planned: {BLOCK}.{config.growths_key} is missing or empty")
    if steps > _MOST_STEPS:
        raise ConfigError(
            f"{steps:,} steps are too many to be gone through one by one, at most {_MOST_STEPS:,}; pass --steps N"
        )
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=lr)
    scheduler = RewarmupScheduler(make_scheduler(optimizer), optimizer)
    optimizer.step()  # torch's schedulers warn if the optimizer never steps
    growing = {growth.at_step for growth in config.growths}
    base = np.empty(steps)
    rates = np.full((1 + sum(step < steps for step in growing), steps), np.nan)
    births: tuple[Birth, ...] = ()
    for step in range(steps):
        if step in growing:
            scheduler.born(config.strategy)
            births = (*births, scheduler.births[-1])
        base[step] = optimizer.param_groups[0]["lr"]
        for birth, rate in enumerate(scheduler.rates(0)):
            rates[birth, step] = rate
        try:
            scheduler.step()
        except (TypeError, ValueError) as error:
            name = type(scheduler.base).__name__
            raise ConfigError(f"{name} can't be stepped through {steps} steps, it fails at {step}: {error}") from error
    return RateCurves(config.growths, births, base, rates)


def describe(curves: RateCurves) -> str:
    """The growths, a line each, and a table of the rates at the steps that matter."""
    lines = [f"{curves.steps} optimizer steps; step t is the one taken when t steps are done", ""]
    lines += [_account(curves, number) for number in range(1, len(curves.growths) + 1)]
    return "\n".join([*lines, "", *_table(curves)])


def _account(curves: RateCurves, number: int) -> str:
    """One growth in one line."""
    head = f"growth {number} at step {curves.growths[number - 1].at_step}: "
    if number > len(curves.births):
        return f"{head}doesn't happen within {curves.steps} steps"
    birth, rate, span = curves.births[number - 1], curves.rates[number], curves.span(number)
    if birth.rewarmup.scope is Scope.NONE:
        return f"{head}new elements follow the base schedule"
    text = f"{head}{rate[span.start]:.3e}"
    rewarmed = curves.rewarmed(number)
    if rewarmed is None:
        text += f", not re-warmed by step {span[-1]} (takes {birth.rewarmup.steps} steps)"
    else:
        of_start, of_base = _times(rate[rewarmed], rate[span.start]), _times(rate[rewarmed], curves.base[rewarmed])
        text += f" -> {rate[rewarmed]:.3e} at step {rewarmed} ({of_start} its start, {of_base} the base rate)"
    curve = "factor on the base rate" if birth.base is None else "own cosine"
    return f"{text}; {curve}, {_course(curves, number)}"


def _course(curves: RateCurves, number: int) -> str:
    """How far growth ``number``'s curve leaves the base schedule, and where it comes back."""
    span = curves.span(number)
    rate, base = curves.rates[number, span.start : span.stop], curves.base[span.start : span.stop]
    ratio = np.divide(rate, base, out=np.ones_like(rate), where=base > 0)
    highest = int(ratio.argmax())
    apart = np.flatnonzero(np.abs(ratio - 1) > _CLOSE)
    met = int(apart[-1]) + 1 if len(apart) else 0
    if met == len(span):
        end = f"{ratio[-1]:.2f}x the base rate at step {span[-1]}"
    else:
        end = f"within {_CLOSE:.0%} of the base rate from step {span[met]} on"
    if ratio[highest] <= ratio[-1] * (1 + 1e-9):
        return end
    return f"at most {ratio[highest]:.2f}x at step {span[highest]}, {end}"


def _table(curves: RateCurves) -> list[str]:
    """Step, base rate, the other rates with their ratio to it, and what happens there."""
    rows = [["step", "base schedule", *curves.shown, ""]]
    for step, notes in sorted(curves.landmarks().items()):
        base = curves.base[step]
        rates = [curve[step] for curve in curves.shown.values()]
        cells = ["" if np.isnan(rate) else f"{rate:.3e} {_times(rate, base):>6}" for rate in rates]
        rows.append([str(step), f"{base:.3e}", *cells, ", ".join(notes)])
    return text_table(rows, left=[len(rows[0]) - 1])


def _times(rate: float, base: float) -> str:
    """A rate as a multiple of another; a dash where that is zero."""
    return f"{rate / base:.2f}x" if base else "-"
