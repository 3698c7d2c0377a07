"""Learning rates before and after a growth (method, Sec. 4.2.2): pure functions of the number of steps.

Old elements stay on the base schedule. Each growth stage gives its elements a curve of their own, which starts at the
base rate of that moment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ds_sparkling.strategy import Rewarmup, Scope


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


@dataclass(frozen=True)
class CosineBase:
    """What is left of a base schedule in its cosine phase.

    Attributes:
        remaining: T - t_e, steps until it reaches its end.
        ends: eta_min of every parameter group.
    """

    remaining: int
    ends: tuple[float, ...]


@dataclass(frozen=True)
class Birth:
    """The schedule of the elements that one growth stage made.

    Attributes:
        rewarmup: ratio rho, steps tau_w and scope.
        starts: eta_e = eta(t_e), the base rate of every parameter group at the growth.
        base: the rest of the base's cosine, if the curve is the paper's; None for a factor on the base rate.
        restart: whether Adam's bias correction counts from the birth.
        age: steps done since the growth, t - t_e.
    """

    rewarmup: Rewarmup
    starts: tuple[float, ...]
    base: CosineBase | None
    restart: bool
    age: int = 0

    def older(self) -> Birth:
        """The same one step later."""
        return replace(self, age=self.age + 1)

    def rate(self, group: int, base_rate: float) -> float:
        """eta_new of parameter group ``group``, whose base rate is now ``base_rate``.

        With a cosine base, f(t - t_e; tau_w, T - t_e, eta_e, rho eta_e, eta_min) (Eq. 27-28) until the base's end, and
        the base rate from there on. Otherwise the base rate times a factor that goes from 1 to rho in tau_w steps.
        """
        ratio, steps = self.rewarmup.ratio, self.rewarmup.steps
        if self.rewarmup.scope is Scope.NONE or (self.base is not None and self.age >= self.base.remaining):
            return base_rate
        if self.base is None:
            return base_rate * (1.0 + (ratio - 1.0) * (self.age / steps if self.age < steps else 1.0))
        start = self.starts[group]
        return warmup_cosine(
            self.age,
            warmup=steps,
            total=self.base.remaining,
            start=start,
            peak=ratio * start,
            end=self.base.ends[group],
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return {
            "rewarmup": self.rewarmup.to_dict(),
            "starts": list(self.starts),
            "base": None if self.base is None else {"remaining": self.base.remaining, "ends": list(self.base.ends)},
            "restart": self.restart,
            "age": self.age,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Birth:
        base = data["base"]
        return cls(
            Rewarmup.from_dict(data["rewarmup"]),
            tuple(data["starts"]),
            None if base is None else CosineBase(base["remaining"], tuple(base["ends"])),
            data["restart"],
            data["age"],
        )


def rates_by_birth(births: Sequence[Birth], group: int, base_rate: float) -> list[float]:
    """The learning rate of every birth stage's elements: the original ones first, then stage by stage.

    Args:
        births: one per growth stage so far.
        group: the parameter group's index.
        base_rate: its base rate now.
    """
    rates = [base_rate]
    for birth in births:
        rate = birth.rate(group, base_rate)
        if birth.rewarmup.scope is Scope.ALL:
            rates = [rate] * len(rates)
        rates.append(rate)
    return rates
