"""Being there before and after every optimizer step of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from deepspeed.runtime.engine import DeepSpeedEngine

#: What monitors are given: tag, value, and the samples trained on.
Event = tuple[str, float, int]


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

    engine.step = stepped
