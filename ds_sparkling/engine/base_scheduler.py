"""The base scheduler that a DeepSpeed JSON asks for, made without an engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.runtime import lr_schedules

from ds_sparkling.errors import ConfigError


def scheduler_from_json(config: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> Any:
    """The scheduler of the ``"scheduler"`` block, DeepSpeed's own or torch's; None if there is no block.

    Names are looked up as ``DeepSpeedEngine._scheduler_from_config`` does in version 0.19.8. With ZeRO, training needs
    torch's schedulers made in Python: they refuse the optimizer that DeepSpeed hands to those named in the JSON.

    Raises:
        ConfigError: an unknown name, or parameters that the scheduler refuses.
    """
    block = config.get("scheduler")
    if block is None:
        return None
    if not isinstance(block, Mapping) or not {"type", "params"} <= block.keys():
        raise ConfigError(f"scheduler must be an object with 'type' and 'params', got {block!r}")
    name, params = block["type"], block["params"]
    kind = getattr(lr_schedules, str(name), None) or getattr(torch.optim.lr_scheduler, str(name), None)
    if not isinstance(kind, type):
        known = ", ".join(lr_schedules.VALID_LR_SCHEDULES)
        raise ConfigError(f"scheduler.type is {name!r}; known: {known}, and those of torch.optim.lr_scheduler")
    try:
        return kind(optimizer, **params)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"scheduler.params don't suit {name}: {error}") from error
