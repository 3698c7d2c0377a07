"""From the parameters of the model as built to those of the engine's module, which AutoEP may have rewritten.

AutoEP turns a block's stacked experts into ``experts.w1``, ``.w2``, ``.w3`` (this rank's experts only) and its router
into ``router.gate``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from deepspeed.module_inject.auto_ep_config import PRESET_MODELS, AutoEPConfig
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.runtime.engine import DeepSpeedEngine

from ds_sparkling.axes import FIXED, ParamAxes, Role
from ds_sparkling.errors import PlanError


@dataclass(frozen=True)
class ExpertSlice:
    """The experts first .. last of ``experts`` that this rank holds of one parameter."""

    first: int
    last: int
    experts: int


def expert_slices(engine: DeepSpeedEngine) -> dict[str, ExpertSlice]:
    """Which experts this rank holds, for every parameter that AutoEP split over the expert-parallel group."""
    slices = {}
    for block, layer in _autoep_layers(engine).items():
        first = layer.ep_rank * layer.num_local_experts
        for name, _ in layer.experts.named_parameters():
            slices[f"{block}.experts.{name}"] = ExpertSlice(first, first + layer.num_local_experts, layer.num_experts)
    return slices


def engine_axes(engine: DeepSpeedEngine, axes: Mapping[str, ParamAxes]) -> dict[str, ParamAxes]:
    """The axes of the engine's parameters, in its module's order, from those of the model as built.

    Raises:
        PlanError: names the parameter that has no counterpart in the model as built.
    """
    known = dict(axes)
    for block, layer in _autoep_layers(engine).items():
        known.update(_autoep_axes(block, layer, engine._config.expert_parallel_config, axes))
    found = {}
    for name, _ in engine.module.named_parameters():
        if name not in known:
            raise PlanError(f"{name} is in the engine's module but not in the model that build_model makes")
        found[name] = known[name]
    return found


def _autoep_layers(engine: DeepSpeedEngine) -> dict[str, AutoEPMoELayer]:
    return {name: module for name, module in engine.module.named_modules() if isinstance(module, AutoEPMoELayer)}


def _autoep_axes(
    block: str, layer: AutoEPMoELayer, config: AutoEPConfig, axes: Mapping[str, ParamAxes]
) -> dict[str, ParamAxes]:
    """Axes of one AutoEP layer's parameters."""
    preset = PRESET_MODELS.get(layer.model_family)

    def setting(key: str, preset_key: str) -> str | None:
        value = getattr(config, key)
        return value if isinstance(value, str) else getattr(preset, preset_key, None)

    experts = setting("expert_pattern", "experts_pattern")
    gate, down = setting("expert_w1", "expert_w1"), setting("expert_w2", "expert_w2")
    up = None if config.expert_w3 is None else setting("expert_w3", "expert_w3")
    router = setting("router_pattern", "router_pattern")

    def expert_axes(leaf: str | None) -> ParamAxes:
        stacked = axes.get(f"{block}.{experts}.{leaf}")
        if stacked is not None:
            return stacked
        single = axes.get(f"{block}.{experts}.0.{leaf}.weight")
        if single is None:
            raise PlanError(f"{block}: found no expert weight {leaf!r} under {experts!r} in the model as built")
        return ParamAxes((FIXED, *single.dims), stacked_experts=True)

    w1 = expert_axes(gate)
    w3 = _half(w1, alive=()) if up is None else expert_axes(up)
    renamed = {
        f"{block}.experts.w1": _half(w1, alive=(0,)),
        f"{block}.experts.w2": expert_axes(down),
        f"{block}.experts.w3": w3,
    }
    for kind in ("weight", "bias"):
        source = f"{block}.{router}.{kind}"
        if source in axes:
            renamed[f"{block}.router.gate.{kind}"] = axes[source]
    return renamed


def _half(fused: ParamAxes, alive: tuple[int, ...]) -> ParamAxes:
    """One of the two segments of a fused gate-and-up weight, as a tensor of its own."""
    dims = tuple(replace(dim, segments=1, alive=alive) if dim.role is Role.FAN_OUT else dim for dim in fused.dims)
    return replace(fused, dims=dims)
