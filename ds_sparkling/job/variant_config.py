"""The configs of a config's variants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_sparkling.errors import ConfigError
from ds_sparkling.job.variants import Variant
from ds_sparkling.models.olmoe import OlmoeConfig, olmoe_factory
from ds_sparkling.planner.compute import Recipe
from ds_sparkling.planner.model import probe_model
from ds_sparkling.spec.config import BLOCK, SparklingConfig, sparkling_config, value_at

#: scheduler.type -> those of its parameters that are numbers of steps. Whatever else a scheduler's parameters say holds
#: for any length.
LENGTHS = {
    "WarmupCosineLR": ("total_num_steps", "warmup_num_steps"),
    "WarmupDecayLR": ("total_num_steps", "warmup_num_steps"),
    "WarmupLR": ("warmup_num_steps",),
    "CosineAnnealingLR": ("T_max",),
    "LinearLR": ("total_iters",),
    "PolynomialLR": ("total_iters",),
    "OneCycleLR": ("total_steps",),
}


def as_variant(config: Mapping[str, Any], variant: Variant) -> dict[str, Any]:
    """The config of another run on the same data.

    Args:
        config: the main job's, with a ``"sparkling"`` block.
        variant: which.

    Raises:
        ConfigError: if the block is wrong, plans no growth that there could be another variant of, or the schedule
            can't be stretched.
    """
    block = sparkling_config(config)
    if variant is Variant.GROWN:
        return dict(config)
    if not block.growths:
        key = f"{BLOCK}.{block.growths_key}"
        raise ConfigError(f"{key} is empty: the config plans no growth, so nothing can be {variant.value}")
    changed = {key: value for key, value in config[BLOCK].items() if key != block.growths_key} | {"growths": []}
    if variant is Variant.FROM_SCRATCH:
        changed["widths"] = {**(block.widths or {}), **_final(block)}
    result = {**config, BLOCK: changed}
    return stretched(result, _steps(config), equal_steps(config)) if variant is Variant.NARROW_LONGER else result


def equal_steps(config: Mapping[str, Any]) -> int:
    """The steps in which the narrow model takes the compute that the grown run takes (Eq. 29), to the nearest one.

    Raises:
        ConfigError: if a growth isn't planned within the run's steps.
    """
    block, steps = sparkling_config(config), _steps(config)
    final = _final(block)
    model = probe_model(
        olmoe_factory(OlmoeConfig.from_dict(config.get("model", {}), "model")),
        final,
        block.widths,
        final,
        hints=block.axes,
    )
    active, widths = [model.active(model.widths)], dict(model.widths)
    for growth in block.growths:
        widths |= growth.widths
        active.append(model.active(widths))
    recipe = Recipe("as planned", tuple(active), tuple(growth.at_step / steps for growth in block.growths))
    return round(steps * recipe.flops(1.0) / (6.0 * active[0]))


def stretched(config: Mapping[str, Any], steps: int, longer: int) -> dict[str, Any]:
    """The config of a run over ``longer`` steps instead of ``steps``.

    Every length of the learning-rate schedule grows by the same factor, warm-up and decay alike, so that the rate is
    the same function of the share of the run.

    Raises:
        ConfigError: names the key of a schedule that has no length to be stretched, or doesn't say it.
    """
    result = {**config, "training": {**config["training"], "steps": longer}}
    if "scheduler" not in config:
        return result
    kind, params = value_at(config, "scheduler.type"), value_at(config, "scheduler.params", {})
    if kind not in LENGTHS:
        raise ConfigError(
            f"scheduler.type is {kind!r}, whose length isn't known, so the narrow model can't be trained longer on it; "
            f"known: {', '.join(LENGTHS)}"
        )
    lengths = {}
    for name in LENGTHS[kind]:
        length = params.get(name)
        if isinstance(length, bool) or not isinstance(length, int):
            raise ConfigError(
                f"scheduler.params.{name} must be given as a number of steps, so that the schedule can be stretched to "
                f"the end of the narrow model's longer run; got {length!r}"
            )
        lengths[name] = round(length * longer / steps)
    return {**result, "scheduler": {**config["scheduler"], "params": {**params, **lengths}}}


def _final(block: SparklingConfig) -> dict[str, int]:
    """The widths after the last growth, of the axes that grow."""
    final: dict[str, int] = {}
    for growth in block.growths:
        final |= growth.widths
    return final


def _steps(config: Mapping[str, Any]) -> int:
    steps = value_at(config, "training.steps")
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise ConfigError(f"training.steps must be the number of the run's steps, got {steps!r}")
    return steps
