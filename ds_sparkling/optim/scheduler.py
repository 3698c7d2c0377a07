"""The learning-rate scheduler of a run that grows: the base scheduler, and a curve for every growth on top."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, SequentialLR

from ds_sparkling.errors import ConfigError
from ds_sparkling.growth.schedule import rates_by_birth
from ds_sparkling.spec.birth_schedule import Birth, CosineBase
from ds_sparkling.spec.strategy import BiasCorrection, Rewarmup, RewarmupCurve, Scope, Strategy

logger = logging.getLogger(__name__)

#: Where this scheduler's own state lies in the state dict; the rest of it is the base scheduler's.
_KEY = "ds_sparkling"


class RewarmupScheduler:
    """Steps the base scheduler, which alone sets the groups' ``lr``, and keeps every growth's curve and age.

    Everything that isn't defined here is the base scheduler's.

    Args:
        base: the scheduler of the old elements; None for a constant rate.
        optimizer: the torch optimizer whose groups it schedules.
    """

    def __init__(self, base: Any, optimizer: torch.optim.Optimizer) -> None:
        self.base = base
        self.optimizer = optimizer
        self.births: tuple[Birth, ...] = ()
        self._saved_groups: list[dict[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        if name == "base" or self.base is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.base, name)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """One optimizer step was taken; arguments are the base scheduler's."""
        if self.base is not None:
            self.base.step(*args, **kwargs)
        self.births = tuple(birth.older() for birth in self.births)

    def get_last_lr(self) -> list[Any]:
        """The base rate of every group, which original elements follow."""
        if self.base is None:
            return [group["lr"] for group in self.optimizer.param_groups]
        return list(self.base.get_last_lr())

    def rates(self, group: int) -> list[float]:
        """The rate of the next step in group ``group``: of the original elements, then of every birth's."""
        return rates_by_birth(self.births, group, float(self.optimizer.param_groups[group]["lr"]))

    def check(self, strategy: Strategy) -> None:
        """Raise, as :meth:`born` would now, before anything is touched."""
        self._birth(strategy)

    def born(self, strategy: Strategy) -> None:
        """A growth has just happened.

        Raises:
            ConfigError: if its curve is to be a cosine and the base schedule has none around it.
        """
        self.births = (*self.births, self._birth(strategy))

    def _birth(self, strategy: Strategy) -> Birth:
        starts = [float(group["lr"]) for group in self.optimizer.param_groups]
        return birth(strategy, starts, phase(self.base, len(starts)), type(self.base).__name__)

    def settle(self, growths: int) -> None:
        """Take ``growths`` growths as long past: their elements follow the base rate and count as old."""
        groups = len(self.optimizer.param_groups)
        self.births = (Birth(Rewarmup(scope=Scope.NONE), (0.0,) * groups, None, restart=False),) * growths

    def state_dict(self) -> dict[str, Any]:
        """The base scheduler's state, with this one's under a key of its own that other schedulers ignore."""
        state = {} if self.base is None else dict(self.base.state_dict())
        now = phase(self.base, len(self.optimizer.param_groups))
        return {**state, _KEY: _own_state(self.births, group_numbers(self.optimizer.param_groups), now)}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Load what :meth:`state_dict` gave, or the state of a plain base scheduler, which has no births."""
        state = dict(state or {})
        own = state.pop(_KEY, {"births": [], "groups": []})
        if self.base is not None and state:
            self.base.load_state_dict(state)
        self.births = tuple(Birth.from_dict(birth) for birth in own["births"])
        self._saved_groups = own["groups"]

    def restore_groups(self) -> list[str]:
        """Put the groups' hyperparameters back to what they were when the loaded state was saved.

        Returns:
            What differed, as ``group.key``. DeepSpeed's universal checkpoints give every group those of the first.
        """
        changed = []
        for index, (group, saved) in enumerate(zip(self.optimizer.param_groups, self._saved_groups, strict=False)):
            for key, value in saved.items():
                if _plain(group.get(key)) != value:
                    changed.append(f"{index}.{key}")
                    group[key] = tuple(value) if isinstance(value, list) else value
        return changed


@dataclass(frozen=True)
class Phase:
    """Where a base schedule with a cosine stands: still warming up or not, and what is left of it."""

    warming: bool
    left: CosineBase


def birth(strategy: Strategy, starts: Sequence[float], now: Phase | None, kind: str) -> Birth:
    """The schedule of the elements of a growth that happens now.

    A re-warm-up with curve ``auto`` takes the paper's cosine if it lies inside that of the base schedule.

    Args:
        starts: the base rate of every parameter group.
        now: where the base schedule stands; None if it isn't known to end in a cosine.
        kind: what the base scheduler is called, for the message.

    Raises:
        ConfigError: if the curve is to be a cosine and the base schedule has none around it.
    """
    rewarmup, base = strategy.rewarmup, None
    if rewarmup.curve in (RewarmupCurve.AUTO, RewarmupCurve.COSINE) and rewarmup.scope is not Scope.NONE:
        if now is None:
            why = f"a {kind} doesn't tell where a cosine ends"
        elif now.warming:
            why = "the base schedule is still warming up"
        elif not math.isfinite(now.left.remaining):
            why = "the base schedule never ends"
        elif (left := round(now.left.remaining * (1 - rewarmup.faster_decay))) <= rewarmup.steps:
            why = f"the base schedule ends in {left} steps, before the re-warm-up does"
        elif rewarmup.from_step is not None and rewarmup.from_step >= now.left.total:
            why = f"the base schedule has only {now.left.total} steps"
        else:
            why, base = "", now.left
        if base is None and rewarmup.curve is RewarmupCurve.COSINE:
            raise ConfigError(f"rewarmup.curve is 'cosine', but {why}; use 'auto' or 'factor'")
        if base is None and rewarmup.needs_cosine:
            raise ConfigError(f"rewarmup.faster_decay and from_step change a cosine, but {why}; leave them out")
    # Copied moments are as old as their source's; only empty ones can start anew.
    restart = strategy.bias_correction is BiasCorrection.RESTART and strategy.optimizer_state.resets_new
    return Birth(rewarmup, tuple(starts), base, restart)


def phase(scheduler: Any, groups: int) -> Phase | None:
    """Where a scheduler stands that ends in a cosine; None for any other.

    Known are DeepSpeed's WarmupCosineLR, torch's CosineAnnealingLR, and a SequentialLR that ends in one.

    Args:
        groups: how many parameter groups there are.
    """
    if type(scheduler).__name__ == "WarmupCosineLR":
        last = scheduler.last_batch_iteration
        remaining = scheduler.total_num_steps - 1 - last
        ends = tuple(float(lr) * scheduler.cos_min_ratio for lr in scheduler.org_lrs)
        base = CosineBase(remaining, ends, scheduler.total_num_steps, scheduler.warmup_num_steps)
        return Phase(last < scheduler.warmup_num_steps, base)
    start = 0
    last = getattr(scheduler, "last_epoch", 0)
    if isinstance(scheduler, SequentialLR):
        start, scheduler = scheduler._milestones[-1], scheduler._schedulers[-1]
    if isinstance(scheduler, CosineAnnealingLR):
        total = start + scheduler.T_max
        return Phase(last < start, CosineBase(total - last, (float(scheduler.eta_min),) * groups, total, start))
    return None


def planned_end(scheduler: Any) -> int | None:
    """The number of steps after which a scheduler has come to the end of its schedule; None if it doesn't tell.

    Known are those of :func:`phase`, DeepSpeed's WarmupDecayLR, torch's OneCycleLR, and what transformers makes for a
    number of training steps.
    """
    now = phase(scheduler, 0)
    if now is not None:
        return now.left.total
    told = [getattr(scheduler, name, None) for name in ("total_num_steps", "total_steps")]
    for rule in getattr(scheduler, "lr_lambdas", []):
        told.append(getattr(rule, "keywords", {}).get("num_training_steps"))
    return next((steps for steps in told if isinstance(steps, int)), None)


def group_numbers(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The numeric hyperparameters of every parameter group."""
    plain = [{key: _plain(value) for key, value in group.items()} for group in groups]
    return [{key: value for key, value in group.items() if value is not None} for group in plain]


# -- the same on a saved state, without a scheduler ----------------------------------------------------------------


def grown_state(
    state: Mapping[str, Any] | None,
    groups: Sequence[Mapping[str, Any]],
    strategy: Strategy,
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """A saved state as it would be had a growth happened just before it was saved.

    Args:
        state: of a :class:`RewarmupScheduler`, or of a plain scheduler.
        groups: the optimizer's parameter groups.
        config: the ``"scheduler"`` block of the DeepSpeed config, which says what a plain scheduler is.

    Raises:
        ConfigError: as :func:`birth`.
    """
    state = dict(state or {})
    own = state.get(_KEY) or _own_state((), group_numbers(groups), _configured_phase(state, groups, config))
    known = own.get("phase")
    now = None
    if known is not None:
        now = Phase(known["warming"], CosineBase.from_dict({key: known[key] for key in known if key != "warming"}))
    born = birth(strategy, [float(group["lr"]) for group in groups], now, config.get("type", "client's schedule"))
    return {**state, _KEY: {**own, "births": [*own["births"], born.to_dict()]}}


def regrouped_state(state: Mapping[str, Any] | None, origins: Sequence[int]) -> dict[str, Any] | None:
    """A saved state for other parameter groups, of which group ``g`` is set as the old one ``origins[g]`` was."""
    if state is None:
        return None

    def pick(values: Sequence[Any]) -> list[Any]:
        return [values[origin] for origin in origins]

    state = dict(state)
    for key in ("base_lrs", "_last_lr"):  # of torch's schedulers
        if key in state:
            state[key] = pick(state[key])
    if "_schedulers" in state:
        state["_schedulers"] = [regrouped_state(part, origins) for part in state["_schedulers"]]
    own = state.get(_KEY)
    if own is not None:
        births = []
        for data in own["births"]:
            base = data["base"]
            base = None if base is None else {**base, "ends": pick(base["ends"])}
            births.append({**data, "starts": pick(data["starts"]), "base": base})
        own = {**own, "births": births, "groups": pick(own["groups"])}
        if own.get("phase") is not None:
            own["phase"] = {**own["phase"], "ends": pick(own["phase"]["ends"])}
        state[_KEY] = own
    return state


def _configured_phase(
    state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], config: Mapping[str, Any]
) -> Phase | None:
    """Where a plain scheduler stands: one of torch's tells by its state, WarmupCosineLR by the config."""
    start, cosine = 0, state
    if "_milestones" in state and "_schedulers" in state:
        start, cosine = state["_milestones"][-1], state["_schedulers"][-1]
    if "T_max" in cosine and "eta_min" in cosine:
        last = state["last_epoch"]
        ends = (float(cosine["eta_min"]),) * len(groups)
        total = start + cosine["T_max"]
        return Phase(last < start, CosineBase(total - last, ends, total, start))
    if config.get("type") != "WarmupCosineLR" or "last_batch_iteration" not in state:
        return None
    params = config.get("params") or {}
    last, total = state["last_batch_iteration"], params["total_num_steps"]
    warmup, least = max(2, params.get("warmup_num_steps", 1000)), params.get("cos_min_ratio", 0.0001)
    progress = min(1.0, (last - warmup + 1) / max(1, total - warmup))
    ratio = least + (1.0 - least) * (1.0 + math.cos(math.pi * progress)) / 2
    ends = tuple(float(group["lr"]) / ratio * least if ratio else 0.0 for group in groups)
    return Phase(last < warmup, CosineBase(total - 1 - last, ends, total, warmup))


def _own_state(births: Sequence[Birth], groups: list[dict[str, Any]], now: Phase | None) -> dict[str, Any]:
    known = None
    if now is not None:
        known = {"warming": now.warming, **now.left.to_dict()}
    return {"births": [birth.to_dict() for birth in births], "groups": groups, "phase": known}


def _plain(value: Any) -> Any:
    """A number, or a list of them; None for anything else."""
    if isinstance(value, torch.Tensor) and value.dim() == 0:
        return value.item()
    if isinstance(value, (list, tuple)) and value and all(isinstance(entry, (int, float)) for entry in value):
        return list(value)
    return value if isinstance(value, (bool, int, float)) else None
