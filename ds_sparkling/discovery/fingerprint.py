"""The fingerprint of a proof: what it holds for. While that is the same, there is nothing to prove again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from ds_sparkling.discovery.build import BuildModel, build_on_meta, described_tensors
from ds_sparkling.discovery.trial import TrialGrowth
from ds_sparkling.spec.axes import ParamAxes


def fingerprint(
    build_model: BuildModel, axes: Mapping[str, ParamAxes], growth: TrialGrowth, tried_on: str | None
) -> str:
    """What the proof of a growth holds for, as a hash.

    It covers the growth and its strategy, what the dimensions are taken for, and of the model at the widths before the
    growth all that shows without running it: names, shapes and dtypes of parameters and buffers, the classes of
    modules, and the plain values that these and the config hold. Other code in a module of the same class doesn't show.

    Args:
        build_model: builds the model from its widths.
        axes: what each parameter's dimensions are.
        growth: the growth.
        tried_on: the name of the inputs that growths are tried on; None for random token ids.
    """
    model = build_on_meta(build_model, growth.widths)
    seen = {
        "widths": dict(growth.widths),
        "after": None if growth.after is None else dict(growth.after),
        "strategy": growth.strategy.to_dict(),
        "axes": {name: param_axes.to_dict() for name, param_axes in axes.items()},
        "inputs": tried_on,
        "tensors": described_tensors(model),
        "modules": {name: _described_module(module) for name, module in model.named_modules()},
        "config": _plain_values(getattr(model, "config", None)),
    }
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()


def _described_module(module: nn.Module) -> dict[str, Any]:
    kind = type(module)
    return {"class": f"{kind.__module__}.{kind.__qualname__}", **_plain_values(module)}


def _plain_values(holder: object) -> dict[str, Any]:
    """What an object holds that isn't made of anything."""
    held = vars(holder) if hasattr(holder, "__dict__") else {}
    return {
        name: value
        for name, value in held.items()
        if not name.startswith("_") and isinstance(value, bool | int | float | str)
    }
