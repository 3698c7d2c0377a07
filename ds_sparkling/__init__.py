"""Width growth in the middle of training (SPARKLING, arXiv:2602.02472) for models trained with DeepSpeed.

The names in ``__all__`` and those of :mod:`ds_sparkling.integrations` are public. Everything else may change.
"""

import os
import pkgutil
from typing import TYPE_CHECKING, Any

from ds_sparkling.engine.extension_locks import warn_of_left_locks

if TYPE_CHECKING:
    from ds_sparkling.check.growth_report import check_growth
    from ds_sparkling.discovery.factory import HuggingFaceFactory
    from ds_sparkling.discovery.proof import prove_function
    from ds_sparkling.engine.adopt import adopt
    from ds_sparkling.engine.averaged import grow_averaged
    from ds_sparkling.engine.grow import grow, grow_if_due, rebuild
    from ds_sparkling.engine.initialize import initialize
    from ds_sparkling.errors import (
        CheckpointError,
        ConfigError,
        GrowthError,
        PlanError,
        SparklingError,
        UnsupportedError,
    )
    from ds_sparkling.spec.config import SparklingConfig
    from ds_sparkling.spec.record import recorded_widths
    from ds_sparkling.spec.strategy import (
        BiasCorrection,
        Init,
        NewIndex,
        OptimizerState,
        Rewarmup,
        RewarmupCurve,
        Scaling,
        Scope,
        Split,
        Strategy,
    )

__all__ = [
    "BiasCorrection",
    "CheckpointError",
    "ConfigError",
    "GrowthError",
    "HuggingFaceFactory",
    "Init",
    "NewIndex",
    "OptimizerState",
    "PlanError",
    "Rewarmup",
    "RewarmupCurve",
    "Scaling",
    "Scope",
    "SparklingConfig",
    "SparklingError",
    "Split",
    "Strategy",
    "UnsupportedError",
    "adopt",
    "check_growth",
    "grow",
    "grow_averaged",
    "grow_if_due",
    "initialize",
    "prove_function",
    "rebuild",
    "recorded_widths",
]
__version__ = "0.2.0"


#: Where the public names are. Each is imported when it is first asked for, so that the package, growth maths and tools
#: start without DeepSpeed, and the package itself without torch.
_PLACES = {
    "ds_sparkling.check.growth_report": ("check_growth",),
    "ds_sparkling.discovery.factory": ("HuggingFaceFactory",),
    "ds_sparkling.discovery.proof": ("prove_function",),
    "ds_sparkling.engine.adopt": ("adopt",),
    "ds_sparkling.engine.averaged": ("grow_averaged",),
    "ds_sparkling.engine.grow": ("grow", "grow_if_due", "rebuild"),
    "ds_sparkling.engine.initialize": ("initialize",),
    "ds_sparkling.errors": (
        "CheckpointError",
        "ConfigError",
        "GrowthError",
        "PlanError",
        "SparklingError",
        "UnsupportedError",
    ),
    "ds_sparkling.spec.config": ("SparklingConfig",),
    "ds_sparkling.spec.record": ("recorded_widths",),
    "ds_sparkling.spec.strategy": (
        "BiasCorrection",
        "Init",
        "NewIndex",
        "OptimizerState",
        "Rewarmup",
        "RewarmupCurve",
        "Scaling",
        "Scope",
        "Split",
        "Strategy",
    ),
}
_PLACE_OF = {name: place for place, names in _PLACES.items() for name in names}

if "LOCAL_RANK" in os.environ:  # a launched training: DeepSpeed may be started before anything here is called
    warn_of_left_locks()


def __getattr__(name: str) -> Any:
    if name in _PLACE_OF:
        return pkgutil.resolve_name(f"{_PLACE_OF[name]}:{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
