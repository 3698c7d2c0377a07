"""Growing an engine that others hold: their object becomes the grown one.

A training loop that isn't ours holds the engine and its module in many places: the local variables of
``transformers.Trainer``'s inner loop, its ``model`` and ``model_wrapped``, accelerate's lists, callbacks, closures.
None of them has to be found if the objects themselves go on.
"""

from __future__ import annotations

from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn


def take_place(grown: DeepSpeedEngine, engine: DeepSpeedEngine, module: nn.Module) -> DeepSpeedEngine:
    """Let ``engine``, which has been stripped, and ``module``, which was its module, be ``grown`` and its module.

    Returns:
        ``engine``. ``grown`` stays valid too, as what DeepSpeed has put around the module refers to it: both see the
        same attributes, now and later.
    """
    _become(module, grown.module)
    grown.module = module
    _become(engine, grown)
    return engine


def _become(old: nn.Module, new: nn.Module) -> None:
    """Give ``old`` the class and the attributes of ``new``, and every change to come."""
    old.__class__ = new.__class__
    object.__setattr__(old, "__dict__", new.__dict__)
