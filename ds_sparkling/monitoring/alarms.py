"""Alarms say when a run should be looked at: each is told what was measured, and answers once per event."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence

#: Losses whose running level a new one is compared with, and how many there must be.
_LOSSES, _FEWEST_LOSSES = 100, 20
#: A spike exceeds the median by so many robust standard deviations, and by this share of it at least.
_DEVIATIONS, _SHARE = 6.0, 0.1
#: From the median absolute deviation to a normal distribution's standard deviation.
_SIGMA = 1.4826
#: Twins whose mean cosine doesn't exceed this have parted; above the next nothing has told them apart.
PARTED_COSINE, SAME_COSINE = 0.99, 0.99999
#: In between they are parting if their distance, 1 - cosine, has grown by so much while their age did by the next.
_PARTING, OLDER = 1.2, 1.5
#: Steps after which copies that no re-warm-up parts should have parted.
_SETTLED = 100
#: Measurements that are kept are so much older than one another.
_APART = 1.05
#: An expert is dead if its load (1 is even) falls below this, and alive again above the other.
DEAD_LOAD = 0.01
_ALIVE = 0.1
#: Measurements that an expert's load is taken over (fewer say nothing: a router that has just begun sends all tokens to
#: a few), and the tokens that each expert would have got in them if even.
_MEASUREMENTS, _FEWEST_TOKENS = 4, 64


class LossAlarm:
    """Loss spikes: a loss far above the median of the last hundred, or one that isn't finite.

    A spike is over when the loss is back, or has stayed long enough to be the level itself.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=_LOSSES)
        self._raised = False

    def see(self, step: int, loss: float) -> str | None:
        """Look at the loss of the optimizer step that made it ``step`` steps in all."""
        if not math.isfinite(loss):
            return self._raise(
                f"loss spike at step {step}: the loss is {loss}. Look at this step's data and at the gradient norm; "
                "resume from a checkpoint before it, with a lower learning rate if it comes back"
            )
        if len(self._recent) < _FEWEST_LOSSES:
            self._recent.append(loss)
            self._raised = False
            return None
        level = statistics.median(self._recent)
        spread = _SIGMA * statistics.median(abs(value - level) for value in self._recent)
        threshold = level + max(_DEVIATIONS * spread, _SHARE * abs(level))
        running = len(self._recent)
        self._recent.append(loss)
        if loss <= threshold:
            self._raised = False
            return None
        return self._raise(
            f"loss spike at step {step}: the loss is {loss:.4f}, above the threshold of {threshold:.4f} (the median of "
            f"the last {running} steps is {level:.4f}). If it doesn't come back by itself, resume from a checkpoint "
            "before it; right after a growth, look at activation_drift, and lower rewarmup.ratio"
        )

    def _raise(self, message: str) -> str | None:
        raised, self._raised = self._raised, True
        return None if raised else message


def locked(cosine: float, earlier: float | None) -> bool:
    """Whether copied units stay like their sources. One measurement can't tell, unless they are the same.

    Args:
        cosine: of the units with their sources.
        earlier: that when they were younger by the factor :data:`OLDER`; None if it isn't known.
    """
    if cosine > SAME_COSINE or earlier is None:
        return cosine > SAME_COSINE
    return cosine > PARTED_COSINE and 1 - cosine <= _PARTING * (1 - earlier)


class TwinAlarm:
    """Copied units that are still alike when their re-warm-up is over; once per growth."""

    def __init__(self) -> None:
        self._raised: set[int] = set()
        self._seen: tuple[int, deque[tuple[int, Mapping[str, float]]]] = 0, deque()

    def see(self, growth: int, age: int, rewarmup: int, cosines: Mapping[str, float]) -> str | None:
        """Look at a measurement.

        Args:
            growth: the growth that made the copies.
            age: optimizer steps since.
            rewarmup: steps of its re-warm-up, before which nothing is an alarm; without one, 100.
            cosines: mean cosine of the copied units with their sources, by parameter.
        """
        earlier = self._earlier(growth, age, cosines)
        alike = {name: cosine for name, cosine in cosines.items() if locked(cosine, earlier.get(name))}
        if age < (rewarmup or _SETTLED) or growth in self._raised or not alike:
            return None
        self._raised.add(growth)
        worst = max(alike, key=lambda name: alike[name])
        return (
            f"locked twins: {age} steps after growth {growth} the units it copied are still like their sources in "
            f"{len(alike)} of {len(cosines)} parameters looked at, most in {worst} (mean cosine {alike[worst]:.4f}; "
            f"above {SAME_COSINE}, or above {PARTED_COSINE} and no longer falling). They learn the same and add no "
            'capacity: grow with optimizer_state "asymmetric_reset", a larger rewarmup.ratio, or init.fan_in "random"'
        )

    def _earlier(self, growth: int, age: int, cosines: Mapping[str, float]) -> Mapping[str, float]:
        """The last measurement of the growth at an age that is small enough beside this one's."""
        if self._seen[0] != growth:
            self._seen = growth, deque()
        seen = self._seen[1]
        if not seen or age >= _APART * seen[-1][0]:
            seen.append((age, dict(cosines)))
        while len(seen) > 1 and OLDER * seen[1][0] <= age:
            seen.popleft()
        return seen[0][1] if OLDER * seen[0][0] <= age else {}


class ExpertAlarm:
    """Experts that get almost no tokens over the last measurements; once, until they get some again."""

    def __init__(self) -> None:
        self._counts: dict[str, deque[Sequence[float]]] = {}
        self._dead: dict[str, set[int]] = {}

    def see(self, step: int, router: str, counts: Sequence[float]) -> str | None:
        """Look at a measurement: assignments by expert of the router ``router``, over all ranks."""
        window = self._counts.setdefault(router, deque(maxlen=_MEASUREMENTS))
        window.append(counts)
        sums = [sum(column) for column in zip(*window, strict=True)]
        even = sum(sums) / len(sums)
        if len(window) < _MEASUREMENTS or even < _FEWEST_TOKENS:
            return None
        load = {expert: count / even for expert, count in enumerate(sums)}
        known = self._dead.setdefault(router, set())
        known -= {expert for expert in known if load[expert] > _ALIVE}
        new = {expert for expert in load if load[expert] < DEAD_LOAD} - known
        known |= new
        if not new:
            return None
        return (
            f"dead experts at step {step} in {router}: experts {', '.join(map(str, sorted(new)))} of {len(sums)} got "
            f"at most {max(load[expert] for expert in new):.4f} of an even share of the tokens over the last "
            f"{len(window)} measurements (threshold {DEAD_LOAD}). Raise the load-balancing loss's coefficient, or "
            "lower the learning rate"
        )
