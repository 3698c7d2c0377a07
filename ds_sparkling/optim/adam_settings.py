"""Adam's kernels take an optimizer by these settings of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def is_ordinary(group: Mapping[str, Any]) -> bool:
    """Whether a parameter group asks for nothing that only the optimizer's own code does."""
    return not any(group.get(key) for key in ("amsgrad", "maximize", "capturable", "differentiable"))


def is_decoupled(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether weights decay by themselves (AdamW), and not through the gradient (Adam with L2)."""
    of_class = getattr(optimizer, "adam_w_mode", isinstance(optimizer, torch.optim.AdamW))
    return bool(group.get("decoupled_weight_decay", of_class))
