"""Width growth in the middle of training (SPARKLING, arXiv:2602.02472) for models trained with DeepSpeed."""

import os
import pkgutil
from typing import TYPE_CHECKING, Any

from ds_sparkling.extension_locks import warn_of_left_locks

if TYPE_CHECKING:
    from ds_sparkling.check.proof import prove_function
    from ds_sparkling.check.report import check_growth
    from ds_sparkling.record import recorded_widths
    from ds_sparkling.zero.adopt import adopt
    from ds_sparkling.zero.averaged import grow_averaged
    from ds_sparkling.zero.engine import grow, grow_if_due, initialize, rebuild

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
__version__ = "0.1.0"


#: Where the public names are. DeepSpeed is imported when the engine room is first asked for, so that growth maths and
#: tools start without it.
_PLACES = {
    "adopt": "ds_sparkling.zero.adopt",
    "check_growth": "ds_sparkling.check.report",
    "grow": "ds_sparkling.zero.engine",
    "grow_averaged": "ds_sparkling.zero.averaged",
    "grow_if_due": "ds_sparkling.zero.engine",
    "initialize": "ds_sparkling.zero.engine",
    "prove_function": "ds_sparkling.check.proof",
    "rebuild": "ds_sparkling.zero.engine",
    "recorded_widths": "ds_sparkling.record",
}

if "LOCAL_RANK" in os.environ:  # a launched training: DeepSpeed may be started before anything here is called
    warn_of_left_locks()


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return pkgutil.resolve_name(f"{_PLACES[name]}:{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
