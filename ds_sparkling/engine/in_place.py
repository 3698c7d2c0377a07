"""Grow an engine that others hold: their objects become the grown ones.

A training loop that isn't ours holds the engine, its module, its optimizer and its scheduler in many places: the local
variables of ``transformers.Trainer``'s inner loop, its ``model`` and ``model_wrapped``, accelerate's lists, callbacks,
closures. None of them has to be found if the objects themselves go on.
"""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from ds_sparkling.engine.hooks import recast
from ds_sparkling.engine.optimizers import adapter_of
from ds_sparkling.engine.stale_references import leave_word


class Held:
    """What others may hold of an engine, taken before it is stripped.

    Args:
        engine: about to grow.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine = engine
        self._module = engine.module
        self._optimizer, self._base_optimizer = engine.optimizer, adapter_of(engine).base
        self._scheduler, self._base_scheduler = engine.lr_scheduler, engine.lr_scheduler.base

    def become(self, grown: DeepSpeedEngine) -> DeepSpeedEngine:
        """Let each be what ``grown`` has in its place.

        Returns:
            The engine that was taken. ``grown`` stays valid too, as what DeepSpeed has put around the module refers to
            it: both see the same attributes, now and later; so it is with all others.
        """
        _become(self._base_scheduler, grown.lr_scheduler.base)
        _become(self._scheduler, grown.lr_scheduler)
        _become(self._base_optimizer, adapter_of(grown).base)
        _become(self._optimizer, grown.optimizer)
        _become(self._module, grown.module)
        grown.module, grown.optimizer, grown.lr_scheduler = self._module, self._optimizer, self._scheduler
        _become(self._engine, grown)
        return self._engine

    def leave_word(self, grown: DeepSpeedEngine) -> None:
        """Have the schedulers, which a strip leaves, say that others are in their place."""
        for old, new in ((self._scheduler, grown.lr_scheduler), (self._base_scheduler, grown.lr_scheduler.base)):
            if old is not new and hasattr(old, "__dict__"):
                leave_word(old, "scheduler", "engine.lr_scheduler of the grown engine")


def _become(old: Any, new: Any) -> None:
    """Give ``old`` the class and the attributes of ``new``, and every change to come."""
    if old is new or not hasattr(new, "__dict__"):
        return
    recast(old, new.__class__, new.__dict__)
