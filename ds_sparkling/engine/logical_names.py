"""From the parameters of the model as built to those of the engine's module, and to those of the whole model.

AutoEP rewrites the module: experts that were stacked in one tensor are stacked in others, and each rank has a slice of
them. In native MoE layers experts are modules of their own, which every rank numbers from 0. What the whole model has
is the same however experts are spread: plans, counts, random numbers and statistics go by its names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from deepspeed import comm as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.sharded_moe import MOELayer
from deepspeed.runtime.engine import DeepSpeedEngine

from ds_sparkling.engine.optimizers import adapter_of
from ds_sparkling.engine.shard import Shard
from ds_sparkling.errors import PlanError
from ds_sparkling.spec.autoep import BlockNames, block_axes
from ds_sparkling.spec.axes import ParamAxes

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Logical:
    """A parameter of the whole model, and what this rank holds of it before it is partitioned.

    Attributes:
        name: its name in the whole model, where experts have numbers of their own.
        like: the name of a parameter of this rank's module with the same axes and, but for the experts, the same shape:
            its own name there, if this rank holds it.
        here: whether this rank holds any of it.
        experts: how many experts its layer has; 0 if it isn't an expert's.
        ranks: over how many ranks these are spread.
        share: which share of the layer's experts one token uses.
        stack: of a tensor that stacks experts, the first one that this rank holds and the one after the last.
    """

    name: str
    like: str
    here: bool = True
    experts: int = 0
    ranks: int = 1
    share: float = 1.0
    stack: tuple[int, int] | None = None

    def whole(self, shape: Shape) -> Shape:
        """The shape with all experts, from that on this rank."""
        return shape if self.stack is None else (self.experts, *shape[1:])

    def part(self, shape: Shape) -> Shape:
        """The shape on this rank, from that with all experts."""
        return shape if self.stack is None else (self.stack[1] - self.stack[0], *shape[1:])


def logical_parameters(engine: DeepSpeedEngine) -> dict[str, Logical]:
    """All parameters of the whole model by name, in the order of the engine's module; the same on all ranks."""
    return {logical.name: logical for logical in _logical(engine)}


def held_parameters(engine: DeepSpeedEngine) -> dict[str, Logical]:
    """The parameters of this rank's module, by their names there and in its order."""
    held = {logical.like: logical for logical in _logical(engine) if logical.here}
    return {name: held[name] for name, _ in engine.module.named_parameters()}


def _logical(engine: DeepSpeedEngine) -> Iterator[Logical]:
    experts = {logical.like: logical for logical in _stacked(engine)}
    modules: dict[str, list[Logical]] = {}
    for first, logical in _modules(engine):
        modules.setdefault(first, []).append(logical)
    own = {logical.like for found in modules.values() for logical in found}
    for name, _ in engine.module.named_parameters():
        if name in modules:
            yield from modules[name]
        elif name not in own:
            yield experts.get(name, Logical(name=name, like=name))


def _stacked(engine: DeepSpeedEngine) -> Iterator[Logical]:
    """Parameters that AutoEP has cut along the experts."""
    for block, layer in autoep_layers(engine).items():
        experts, here = layer.num_experts, layer.num_local_experts
        stack = (layer.ep_rank * here, (layer.ep_rank + 1) * here)
        for leaf, _ in layer.experts.named_parameters():
            name = f"{block}.experts.{leaf}"
            yield Logical(
                name=name,
                like=name,
                experts=experts,
                ranks=experts // here,
                share=layer.top_k / experts,
                stack=stack,
            )


def _modules(engine: DeepSpeedEngine) -> Iterator[tuple[str, Logical]]:
    """Parameters of native MoE layers' experts, all ranks', and the first parameter of the layer's experts here."""
    for block, layer in native_layers(engine).items():
        here, experts = layer.num_local_experts, layer.num_local_experts * layer.ep_size
        before = here * (dist.get_rank(layer.ep_group) if layer.ep_size > 1 else 0)
        share = layer.gate.k / experts
        prefix = f"{block}.experts.deepspeed_experts"
        leaves = [name for name, _ in layer.experts.deepspeed_experts[0].named_parameters()]
        for expert in range(experts):
            held = before <= expert < before + here
            for leaf in leaves:
                like = f"{prefix}.{expert - before if held else 0}.{leaf}"
                name = f"{prefix}.{expert}.{leaf}"
                logical = Logical(name=name, like=like, here=held, experts=experts, ranks=layer.ep_size, share=share)
                yield f"{prefix}.0.{leaves[0]}", logical


def logical_shapes(engine: DeepSpeedEngine) -> dict[str, Shape]:
    """Shape of every parameter of the whole model, with all experts counted."""
    adapter = adapter_of(engine)
    local = {name: adapter.full_shape(param) for name, param in engine.module.named_parameters()}
    return {name: logical.whole(local[logical.like]) for name, logical in logical_parameters(engine).items()}


def replicas(shard: Shard, held: Logical) -> int:
    """How many ranks' shards, this one's included, belong to the same tensor."""
    return len(shard.pieces) if shard.group is not None else dist.get_world_size() // held.ranks


def engine_axes(engine: DeepSpeedEngine, axes: Mapping[str, ParamAxes]) -> dict[str, ParamAxes]:
    """The axes of the whole model's parameters, from those of the model as built.

    Raises:
        PlanError: names the parameter that has no counterpart in the model as built.
    """
    known = dict(axes)
    names = BlockNames.from_config(engine.config)
    for block in autoep_layers(engine):
        known.update(block_axes(block, names, axes))
    found = {}
    for name, logical in logical_parameters(engine).items():
        if logical.like not in known:
            raise PlanError(f"{logical.like} is in the engine's module but not in the model that build_model makes")
        found[name] = known[logical.like]
    return found


def autoep_layers(engine: DeepSpeedEngine) -> dict[str, AutoEPMoELayer]:
    """AutoEP's layers by their path in the engine's module."""
    return {name: module for name, module in engine.module.named_modules() if isinstance(module, AutoEPMoELayer)}


def native_layers(engine: DeepSpeedEngine) -> dict[str, MOELayer]:
    """The layers inside DeepSpeed's native ``MoE`` modules by their path in the engine's module."""
    return {name: module for name, module in engine.module.named_modules() if isinstance(module, MOELayer)}
