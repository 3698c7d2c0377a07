"""Learning rates before and after a growth (method, Sec. 4.2.2): pure functions of the number of steps.

Old elements stay on the base schedule. Each growth gives its elements a curve of their own, which starts at the
base rate of that moment.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from ds_sparkling.spec.birth_schedule import Birth, CosineBase
from ds_sparkling.spec.strategy import Rewarmup, RewarmupCurve, Scope


def warmup_cosine(t: float, *, warmup: int, total: int, start: float, peak: float, end: float) -> float:
    """f(t; T_w, T, eta_0, eta_max, eta_min): a linear warm-up, then a cosine (Eq. 25-26).

    Args:
        t: steps done.
        warmup: T_w, steps from ``start`` to ``peak``.
        total: T, the step at which the cosine reaches ``end``; the rate stays there afterwards.
        start, peak, end: eta_0, eta_max and eta_min.
    """
    if t >= total:
        return end
    if t < warmup:
        return start + (peak - start) * (t / warmup)
    return end + 0.5 * (peak - end) * (1.0 + math.cos(math.pi * (t - warmup) / (total - warmup)))


class Curve(ABC):
    """The learning rate of the elements of one growth."""

    #: Whether the rate is further multiplied by a ratio of weight norms, parameter by parameter.
    follows_norms = False

    @abstractmethod
    def rate(self, age: int, group: int, base_rate: float) -> float:
        """eta_new of a parameter group.

        Args:
            age: steps done since the growth, t - t_e.
            group: the parameter group's index.
            base_rate: its base rate now.
        """


class BaseRate(Curve):
    """No re-warm-up: the base schedule."""

    def rate(self, age: int, group: int, base_rate: float) -> float:
        return base_rate


class WeightNormRewarmup(BaseRate):
    """The base schedule, times ||W_new|| / ||W_old|| of each parameter (Yuan et al. 2023, arXiv:2306.12700)."""

    follows_norms = True


@dataclass(frozen=True)
class FactorRewarmup(Curve):
    """The base rate times a factor that goes from 1 to rho in tau_w steps, and stays there or goes back to 1 along half
    a cosine."""

    rewarmup: Rewarmup

    def rate(self, age: int, group: int, base_rate: float) -> float:
        ratio, steps, decay = self.rewarmup.ratio, self.rewarmup.steps, self.rewarmup.decay_steps
        if decay is not None:
            return base_rate * warmup_cosine(age, warmup=steps, total=steps + decay, start=1.0, peak=ratio, end=1.0)
        return base_rate * (1.0 + (ratio - 1.0) * (age / steps if age < steps else 1.0))


@dataclass(frozen=True)
class CosineRewarmup(Curve):
    """f(t - t_e; tau_w, T - t_e, eta_e, rho eta_e, eta_min) (Eq. 27-28) until the base's end, and the base rate from
    there on. A faster decay has less than T - t_e steps for it."""

    rewarmup: Rewarmup
    starts: tuple[float, ...]
    base: CosineBase

    def rate(self, age: int, group: int, base_rate: float) -> float:
        if age >= self.base.remaining:
            return base_rate
        start = self.starts[group]
        return warmup_cosine(
            age,
            warmup=self.rewarmup.steps,
            total=round(self.base.remaining * (1.0 - self.rewarmup.faster_decay)),
            start=start,
            peak=self.rewarmup.ratio * start,
            end=self.base.ends[group],
        )


@dataclass(frozen=True)
class OtherStepRewarmup(Curve):
    """The base schedule from another step t_s on: f(t_s + t - t_e; T_w, T, 0, eta_max, eta_min), which may not come to
    its end by T."""

    from_step: int
    starts: tuple[float, ...]
    base: CosineBase

    def rate(self, age: int, group: int, base_rate: float) -> float:
        return warmup_cosine(
            self.from_step + age,
            warmup=self.base.warmup,
            total=self.base.total,
            start=0.0,
            peak=_peak(self.base, group, self.starts[group]),
            end=self.base.ends[group],
        )


def curve_of(birth: Birth) -> Curve:
    """What the rate of a birth's elements follows: the curve that ``auto`` came to when the growth happened, too."""
    rewarmup, base = birth.rewarmup, birth.base
    if rewarmup.scope is Scope.NONE:
        return BaseRate()
    if rewarmup.curve is RewarmupCurve.WEIGHT_NORM:
        return WeightNormRewarmup()
    if base is None:
        return FactorRewarmup(rewarmup)
    if rewarmup.from_step is not None:
        return OtherStepRewarmup(rewarmup.from_step, birth.starts, base)
    return CosineRewarmup(rewarmup, birth.starts, base)


def _peak(base: CosineBase, group: int, start: float) -> float:
    """eta_max of a group, by the rate ``start`` at which it now stands."""
    done = (base.total - base.remaining - base.warmup) / (base.total - base.warmup)
    end = base.ends[group]
    return end + 2.0 * (start - end) / (1.0 + math.cos(math.pi * done))


def rates_by_birth(births: Sequence[Birth], group: int, base_rate: float) -> list[float]:
    """The learning rate of every birth's elements: the original ones first, then birth by birth.

    Args:
        births: one per growth so far.
        group: the parameter group's index.
        base_rate: its base rate now.
    """
    rates = [base_rate]
    for birth in births:
        rate = curve_of(birth).rate(birth.age, group, base_rate)
        if birth.rewarmup.scope is Scope.ALL:
            rates = [rate] * len(rates)
        rates.append(rate)
    return rates
