"""The learning rates that a DeepSpeed JSON plans."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

from ds_sparkling.errors import ConfigError
from ds_sparkling.planner.rate_curves import RateCurves, simulate
from ds_sparkling.spec.config import planned_steps, sparkling_config, value_at


def curves_of(config: Mapping[str, Any], steps: int | None = None) -> RateCurves:
    """The curves of a DeepSpeed config with a ``"sparkling"`` block.

    Args:
        config: the parsed JSON.
        steps: optimizer steps in all; by default, what the config says.

    Raises:
        ConfigError: names the key.
    """
    block = sparkling_config(config)
    if steps is None:
        steps = planned_steps(config)
    if steps is None:
        raise ConfigError(
            "the config doesn't tell how many steps the run has (training.steps or scheduler.params.total_num_steps): "
            "pass --steps N"
        )
    lr = _lr(config)
    with _quiet():
        from ds_sparkling.engine.base_scheduler import scheduler_from_json  # DeepSpeed warns when it is imported

        return simulate(block, steps, lr, lambda optimizer: scheduler_from_json(config, optimizer))


def _lr(config: Mapping[str, Any]) -> float:
    lr = value_at(config, "optimizer.params.lr")
    if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not (math.isfinite(lr) and lr >= 0):
        raise ConfigError(f"optimizer.params.lr must be the optimizer's learning rate, got {lr!r}")
    return float(lr)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No log messages below errors: on stdout, DeepSpeed warns of a missing accelerator and of a fresh schedule."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
