"""From the parameters of the model as built to those of the engine's module, which AutoEP may have rewritten."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deepspeed import comm as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.runtime.engine import DeepSpeedEngine

from ds_sparkling.autoep import BlockNames, block_axes
from ds_sparkling.axes import ParamAxes
from ds_sparkling.errors import PlanError
from ds_sparkling.zero.access import Shard


@dataclass(frozen=True)
class ExpertSlice:
    """The experts first .. last of ``experts`` that this rank holds of one parameter."""

    first: int
    last: int
    experts: int


def expert_slices(engine: DeepSpeedEngine) -> dict[str, ExpertSlice]:
    """Which experts this rank holds, for every parameter that AutoEP split over the expert-parallel group."""
    slices = {}
    for block, layer in autoep_layers(engine).items():
        first = layer.ep_rank * layer.num_local_experts
        for name, _ in layer.experts.named_parameters():
            slices[f"{block}.experts.{name}"] = ExpertSlice(first, first + layer.num_local_experts, layer.num_experts)
    return slices


def replicas(shard: Shard, held: ExpertSlice | None) -> int:
    """How many ranks' shards, this one's included, belong to the same tensor.

    Args:
        held: the experts that this rank holds of it, if AutoEP split it.
    """
    if shard.group is not None:
        return len(shard.pieces)
    return dist.get_world_size() // (1 if held is None else held.experts // (held.last - held.first))


def engine_axes(engine: DeepSpeedEngine, axes: Mapping[str, ParamAxes]) -> dict[str, ParamAxes]:
    """The axes of the engine's parameters, in its module's order, from those of the model as built.

    Raises:
        PlanError: names the parameter that has no counterpart in the model as built.
    """
    known = dict(axes)
    names = BlockNames.from_config(engine.config)
    for block in autoep_layers(engine):
        known.update(block_axes(block, names, axes))
    found = {}
    for name, _ in engine.module.named_parameters():
        if name not in known:
            raise PlanError(f"{name} is in the engine's module but not in the model that build_model makes")
        found[name] = known[name]
    return found


def autoep_layers(engine: DeepSpeedEngine) -> dict[str, AutoEPMoELayer]:
    """AutoEP's layers by their path in the engine's module."""
    return {name: module for name, module in engine.module.named_modules() if isinstance(module, AutoEPMoELayer)}
