"""Growth in other people's training loops: ``transformers.Trainer`` and accelerate."""

import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_sparkling.integrations.accelerate import growing
    from ds_sparkling.integrations.trainer import SparklingCallback

__all__ = ["SparklingCallback", "growing"]

#: Where the public names are; a loop that uses one library needn't have the other.
_PLACES = {"SparklingCallback": "ds_sparkling.integrations.trainer", "growing": "ds_sparkling.integrations.accelerate"}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return pkgutil.resolve_name(f"{_PLACES[name]}:{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
