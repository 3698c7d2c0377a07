"""The learning-rate scheduler of a run that grows: the base scheduler, and a curve for every growth stage on top."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, SequentialLR

from ds_sparkling.errors import ConfigError
from ds_sparkling.schedule import Birth, CosineBase, rates_by_birth
from ds_sparkling.strategy import BiasCorrection, Curve, Rewarmup, Scope, Strategy

logger = logging.getLogger(__name__)

#: Where this scheduler's own state lies in the state dict; the rest of it is the base scheduler's.
_KEY = "ds_sparkling"


class RewarmupScheduler:
    """Steps the base scheduler, which alone sets the groups' ``lr``, and keeps every growth stage's curve and age.

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
        """The rate of the next step in group ``group``: of the original elements, then of every stage's."""
        return rates_by_birth(self.births, group, float(self.optimizer.param_groups[group]["lr"]))

    def check(self, strategy: Strategy) -> None:
        """Raise, as :meth:`born` would now, before anything is touched."""
        cosine_base(self.base, strategy.rewarmup, len(self.optimizer.param_groups))

    def born(self, strategy: Strategy) -> None:
        """A growth stage has just happened.

        Raises:
            ConfigError: if its curve is to be a cosine and the base schedule has none around it.
        """
        starts = tuple(float(group["lr"]) for group in self.optimizer.param_groups)
        base = cosine_base(self.base, strategy.rewarmup, len(starts))
        # Copied moments are as old as their source's; only empty ones can start anew.
        restart = strategy.bias_correction is BiasCorrection.RESTART and strategy.optimizer_state.resets_new
        self.births = (*self.births, Birth(strategy.rewarmup, starts, base, restart))

    def settle(self, stages: int) -> None:
        """Take ``stages`` growths as long past: their elements follow the base rate and count as old."""
        groups = len(self.optimizer.param_groups)
        self.births = (Birth(Rewarmup(scope=Scope.NONE), (0.0,) * groups, None, restart=False),) * stages

    def state_dict(self) -> dict[str, Any]:
        """The base scheduler's state, with this one's under a key of its own that other schedulers ignore."""
        state = {} if self.base is None else dict(self.base.state_dict())
        return {**state, _KEY: {"births": [birth.to_dict() for birth in self.births], "groups": self._groups()}}

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

    def _groups(self) -> list[dict[str, Any]]:
        """Every group's numeric hyperparameters."""
        plain = [{key: _plain(value) for key, value in group.items()} for group in self.optimizer.param_groups]
        return [{key: value for key, value in group.items() if value is not None} for group in plain]


def cosine_base(scheduler: Any, rewarmup: Rewarmup, groups: int) -> CosineBase | None:
    """What the paper's curve needs to know of the base schedule; None where new elements get a factor instead.

    Known cosines are DeepSpeed's WarmupCosineLR, torch's CosineAnnealingLR, and a SequentialLR that ends in one.

    Args:
        scheduler: the base scheduler.
        rewarmup: ``auto`` takes the cosine if the re-warm-up lies inside it.
        groups: how many parameter groups there are.

    Raises:
        ConfigError: if ``rewarmup`` asks for a cosine and there is none around it.
    """
    if rewarmup.curve is Curve.FACTOR or rewarmup.scope is Scope.NONE:
        return None
    known = _cosine(scheduler, groups)
    if known is None:
        why = f"a {type(scheduler).__name__} doesn't tell where a cosine ends"
    elif known[0]:
        why = "the base schedule is still warming up"
    elif known[1].remaining <= rewarmup.steps:
        why = f"the base schedule ends in {known[1].remaining} steps, before the re-warm-up does"
    else:
        return known[1]
    if rewarmup.curve is Curve.COSINE:
        raise ConfigError(f"rewarmup.curve is 'cosine', but {why}; use 'auto' or 'factor'")
    return None


def _cosine(scheduler: Any, groups: int) -> tuple[bool, CosineBase] | None:
    """Whether the cosine is still ahead, and what is left of the schedule."""
    if type(scheduler).__name__ == "WarmupCosineLR":
        last = scheduler.last_batch_iteration
        remaining = scheduler.total_num_steps - 1 - last
        ends = tuple(float(lr) * scheduler.cos_min_ratio for lr in scheduler.org_lrs)
        return last < scheduler.warmup_num_steps, CosineBase(remaining, ends)
    start = 0
    last = getattr(scheduler, "last_epoch", 0)
    if isinstance(scheduler, SequentialLR):
        start, scheduler = scheduler._milestones[-1], scheduler._schedulers[-1]
    if isinstance(scheduler, CosineAnnealingLR):
        return last < start, CosineBase(start + scheduler.T_max - last, (float(scheduler.eta_min),) * groups)
    return None


def _plain(value: Any) -> Any:
    """A number, or a list of them; None for anything else."""
    if isinstance(value, torch.Tensor) and value.dim() == 0:
        return value.item()
    if isinstance(value, (list, tuple)) and value and all(isinstance(entry, (int, float)) for entry in value):
        return list(value)
    return value if isinstance(value, (bool, int, float)) else None
