"""Read off a run's curves, as numbers: the end, the jump at a growth, twins, drift, experts. No words here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ds_sparkling.monitoring.alarms import DEAD_LOAD, OLDER
from ds_sparkling.report.events import ReadGrowth, ReadRun, TagCurve

if TYPE_CHECKING:
    from ds_sparkling.report.events import FloatArray

VALIDATION = "Validation/loss"
TOKENS, COMPUTE = "Train/tokens", "Train/compute_flops"
#: The main job's training loss, over all ranks; else the first rank's, which there is in any loop.
TRAINING = ("Train/loss", "Train/Samples/train_loss")

#: Validations at the end whose scatter about a parabola is taken for noise, at most and at least.
_LAST, _LEAST = 6, 5
#: Points in a row, up to the end, that make an expert dead.
_DEAD_POINTS = 3


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a run stands at its last validation.

    Attributes:
        loss: the last validation loss.
        scatter: standard deviation of the last validations about a parabola through them; None with fewer than five.
        tokens, compute: spent by then; None if not recorded.
        parameters, active_parameters: None if not recorded.
        active_derived: whether the active ones are computed from compute and tokens.
        seconds: training time; None if the run left no summary.
    """

    loss: float | None
    scatter: float | None
    tokens: float | None
    compute: float | None
    parameters: int | None
    active_parameters: int | None
    active_derived: bool
    seconds: float | None


@dataclass(frozen=True)
class Jump:
    """Validation loss right before and right after a growth, at the same sample count; None where it wasn't taken."""

    growth: ReadGrowth
    before: float | None
    after: float | None

    @property
    def size(self) -> float | None:
        """After less before."""
        return None if self.before is None or self.after is None else self.after - self.before


@dataclass(frozen=True)
class Span:
    """A curve since the latest growth.

    Attributes:
        first, last: values.
        earlier: the last value before two thirds of the way; None if there is none.
        points: how many.
    """

    first: float
    last: float
    earlier: float | None
    points: int


def ending(run: ReadRun) -> Ending:
    """Where the run ended, as far as it is recorded."""
    losses = run.curve(VALIDATION)
    last = run.curve(VALIDATION, *TRAINING)
    spent = {tag: None if last is None else _value(run.spent(tag, last.samples[-1:])) for tag in (TOKENS, COMPUTE)}
    parameters, active, derived = _parameters(run)
    return Ending(
        loss=None if losses is None else float(losses.values[-1]),
        scatter=None if losses is None else scatter(losses.since(int(losses.growths[-1]))),
        tokens=spent[TOKENS],
        compute=spent[COMPUTE],
        parameters=parameters,
        active_parameters=active,
        active_derived=derived,
        seconds=None if run.summary is None else run.summary.seconds,
    )


def scatter(losses: TagCurve) -> float | None:
    """Standard deviation of the last points about a parabola through them, which takes out the curve's own course."""
    x, y = losses.samples[-_LAST:], losses.values[-_LAST:]
    if len(y) < _LEAST:
        return None
    scaled = (x - x.mean()) / max(float(np.ptp(x)), 1.0)
    residual = y - np.polyval(np.polyfit(scaled, y, 2), scaled)
    return float(np.sqrt((residual**2).sum() / (len(y) - 3)))


def jumps(run: ReadRun) -> list[Jump]:
    """The change of validation loss at every growth."""
    losses = run.curve(VALIDATION)
    found = []
    for growth in run.growths:
        before = after = None
        if losses is not None:
            here = losses.samples == growth.samples
            before = _last(losses.values[here & (losses.growths < growth.number)])
            after = _last(losses.values[here & (losses.growths >= growth.number)])
        found.append(Jump(growth, before, after))
    return found


@dataclass(frozen=True)
class Bump:
    """A rise of the validation loss after a growth, up to the next growth.

    Attributes:
        peak: the highest validation loss after it.
        tokens: from the growth to the first validation that isn't above the loss before the growth again; None if
            there is none, or tokens aren't recorded.
        back: whether there is one.
    """

    peak: float
    tokens: float | None
    back: bool


def bump(run: ReadRun, jump: Jump) -> Bump | None:
    """How the validation loss went on after a growth; None if it wasn't taken before it, or not any more after it."""
    losses = run.curve(VALIDATION)
    if losses is None or jump.before is None:
        return None
    later = (losses.growths == jump.growth.number) & (losses.samples > jump.growth.samples)
    values, samples = losses.values[later], losses.samples[later]
    if not len(values):
        return None
    high = int(values.argmax())
    back = samples[high:][values[high:] <= jump.before]
    tokens = run.spent(TOKENS, np.array([jump.growth.samples, back[0]])) if len(back) else None
    return Bump(float(values[high]), None if tokens is None else float(tokens[1] - tokens[0]), bool(len(back)))


def loss_at(run: ReadRun, compute: float) -> float | None:
    """Validation loss when so much compute was spent, between two validations; None beyond them."""
    losses = run.curve(VALIDATION)
    spent = None if losses is None else run.spent(COMPUTE, losses.samples)
    if losses is None or spent is None or np.isnan(spent).any() or not spent[0] <= compute <= spent[-1]:
        return None
    return float(np.interp(compute, spent, losses.values))


def since_growth(run: ReadRun, tag: str) -> Span | None:
    """A curve since the latest growth; None if nothing has grown or nothing is recorded."""
    curve = run.curve(tag)
    if curve is None or not run.growths:
        return None
    curve = curve.since(run.growths[-1].number)
    if not len(curve):
        return None
    age = curve.samples - run.growths[-1].samples
    earlier = _last(curve.values[OLDER * age <= age[-1]])
    return Span(float(curve.values[0]), float(curve.values[-1]), earlier, len(curve))


def at_growth(curve: TagCurve, growth: ReadGrowth) -> float | None:
    """The last value before a growth over which the first after it is looked at; None if either is missing."""
    before, after = curve.values[curve.growths < growth.number], curve.values[curve.growths >= growth.number]
    if not len(before) or not len(after) or before[-1] == 0:
        return None
    return float(after[0] / before[-1])


def reference(runs: Sequence[ReadRun], family: str) -> float:
    """The sample count at which all runs are taken for 1: that of the earliest growth; without one, where the last of
    them begins to be measured."""
    growths = [growth.samples for run in runs for growth in run.growths]
    begins = [min(curve.samples[0] for curve in curves.values()) for run in runs if (curves := run.family(family))]
    return float(min(growths) if growths else max(begins, default=0.0))


def relative(curve: TagCurve, samples: float) -> TagCurve | None:
    """A curve over its last value up to ``samples``, before a growth there; over its first if there is none."""
    before = curve.values[curve.samples <= samples]
    unit = before[-1] if len(before) else curve.values[0]
    return None if unit == 0 else replace(curve, values=curve.values / unit)


def dead_blocks(run: ReadRun) -> list[str]:
    """Blocks in which the least loaded expert got next to nothing at each of the last points."""
    return [
        block
        for block, curve in run.family("router/load_min").items()
        if len(curve) >= _DEAD_POINTS and (curve.values[-_DEAD_POINTS:] < DEAD_LOAD).all()
    ]


def last_values(run: ReadRun, prefix: str) -> dict[str, float]:
    """The last value of each curve of a family, by block or parameter."""
    return {name: float(curve.values[-1]) for name, curve in run.family(prefix).items()}


def _parameters(run: ReadRun) -> tuple[int | None, int | None, bool]:
    """Parameters at the end, active ones, and whether the latter are derived from compute and tokens."""
    if run.summary is not None:
        return run.summary.parameters, run.summary.active_parameters, False
    latest = run.growths[-1] if run.growths else None
    if latest is not None and latest.active_parameters is not None:
        return latest.parameters, latest.active_parameters, False
    tokens, compute = run.curve(TOKENS), run.curve(COMPUTE)
    if tokens is None or compute is None or latest is not None or run.grown_elsewhere or not tokens.values[-1]:
        return None, None, False
    return None, round(float(compute.values[-1] / tokens.values[-1] / 6)), True


def _value(values: FloatArray | None) -> float | None:
    return None if values is None or np.isnan(values[0]) else float(values[0])


def _last(values: FloatArray) -> float | None:
    return float(values[-1]) if len(values) else None
