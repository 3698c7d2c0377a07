"""Callbacks before and after each optimizer step of an engine, and in its module's forward passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from deepspeed.runtime.engine import DeepSpeedEngine

from ds_sparkling.engine.hooks import STEP

#: What monitors are given: tag, value, and the samples trained on.
MonitorEvent = tuple[str, float, int]


class StepObserver(Protocol):
    """What wants to know of optimizer steps; micro steps that only accumulate gradients are none."""

    def before_step(self) -> None:
        """The engine is going to step. It may yet skip the step, for infinite gradients."""

    def after_step(self) -> None:
        """The engine has stepped; ``engine.global_steps`` has gone up."""


def observe_steps(engine: DeepSpeedEngine, observers: Sequence[StepObserver]) -> None:
    """Make ``engine.step`` tell the observers, in their order."""
    plain_step = engine.step

    def stepped(*args: Any, **kwargs: Any) -> Any:
        if engine.managed_gradient_accumulation() and not engine.is_gradient_accumulation_boundary():
            return plain_step(*args, **kwargs)
        before = engine.global_steps
        for observer in observers:
            observer.before_step()
        result = plain_step(*args, **kwargs)
        if engine.global_steps > before:
            for observer in observers:
                observer.after_step()
        return result

    STEP.install(engine, stepped)


class ForwardHook:
    """A hook on an engine's module that a copy of the module, an average of the weights for instance, doesn't carry on.

    A method as a hook would be copied with the object that it belongs to and all that this holds, down to process
    groups, which can't be copied.
    """

    def __init__(self, method: Callable[..., None] | None) -> None:
        self._method = method

    def __call__(self, *args: Any) -> None:
        if self._method is not None:
            self._method(*args)

    def __deepcopy__(self, _memo: object) -> ForwardHook:
        return ForwardHook(None)
