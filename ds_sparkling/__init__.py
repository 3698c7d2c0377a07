"""Width growth in the middle of training (SPARKLING, arXiv:2602.02472) for models trained with DeepSpeed."""

import os
import pkgutil
from typing import TYPE_CHECKING, Any

from ds_sparkling.engine.extension_locks import warn_of_left_locks

if TYPE_CHECKING:
    from ds_sparkling.check.report import check_growth
    from ds_sparkling.discovery.proof import prove_function
    from ds_sparkling.engine.adopt import adopt
    from ds_sparkling.engine.averaged import grow_averaged
    from ds_sparkling.engine.grow import grow, grow_if_due, initialize, rebuild
    from ds_sparkling.spec.record import recorded_widths

__all__ = [
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


#: Where the public names are. DeepSpeed is imported when the engine room is first asked for, so that growth maths and
#: tools start without it.
_PLACES = {
    "adopt": "ds_sparkling.engine.adopt",
    "check_growth": "ds_sparkling.check.report",
    "grow": "ds_sparkling.engine.grow",
    "grow_averaged": "ds_sparkling.engine.averaged",
    "grow_if_due": "ds_sparkling.engine.grow",
    "initialize": "ds_sparkling.engine.grow",
    "prove_function": "ds_sparkling.discovery.proof",
    "rebuild": "ds_sparkling.engine.grow",
    "recorded_widths": "ds_sparkling.spec.record",
}

if "LOCAL_RANK" in os.environ:  # a launched training: DeepSpeed may be started before anything here is called
    warn_of_left_locks()


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return pkgutil.resolve_name(f"{_PLACES[name]}:{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
