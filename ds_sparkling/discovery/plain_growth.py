"""Grow a plain module as an engine's growth does, without an engine: its weights and its buffers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_sparkling.discovery.build import saved_buffers
from ds_sparkling.errors import PlanError
from ds_sparkling.growth import GrowthPlan, GrowthTables, Widener, make_plan
from ds_sparkling.spec.axes import ParamAxes
from ds_sparkling.spec.layers import LayerGrowth
from ds_sparkling.spec.strategy import Strategy

#: Spread of what is added to gains and biases, which models start at zero or one.
_VECTOR_STD = 0.1


@torch.no_grad()
def randomize_buffers(buffers: Mapping[str, Tensor], seed: int) -> None:
    """Move buffers of floats off what they start at, by a tenth of that or of one, so that all entries matter."""
    for index, buffer in enumerate(buffers.values()):
        if buffer.is_floating_point():
            generator = torch.Generator().manual_seed(seed - 1 - index)
            noise = torch.rand(buffer.shape, generator=generator, dtype=torch.float64) * _VECTOR_STD
            buffer.add_((noise * buffer.abs().clamp(min=1.0).double()).to(buffer))


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Give every parameter seeded values with which every path through the model matters.

    Models start with zero biases, equal gains and matrices so small that branches hardly count. Here matrices get the
    std ``1 / sqrt(size of the last dimension)``, embeddings 1, and vectors move off their start by 0.1.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for index, param in enumerate(model.parameters()):
        if not param.is_floating_point():
            continue
        generator = torch.Generator().manual_seed(seed + index)
        noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        if param.dim() < 2:
            param.add_((noise * _VECTOR_STD).to(param))
        else:
            param.copy_(noise if id(param) in embeddings else noise * param.shape[-1] ** -0.5)


def settled(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in evaluation mode and in ``dtype``, whose experts run in every dtype.

    Transformers' grouped kernels for experts don't know float64.
    """
    choose_kernel: Any = getattr(model, "set_experts_implementation", None)
    if choose_kernel is not None:
        choose_kernel("eager")
    return model.to(dtype).eval()


def plan_of(
    model: nn.Module,
    axes: Mapping[str, ParamAxes],
    before: Mapping[str, int],
    after: Mapping[str, int],
    strategy: Strategy,
    layers: Sequence[LayerGrowth] = (),
) -> GrowthPlan:
    """The plan of growing a plain module.

    Raises:
        PlanError: if it can't grow so.
    """
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    buffers = {name: tuple(buffer.shape) for name, buffer in saved_buffers(model).items()}
    return make_plan(shapes, axes, before, after, strategy, number=1, buffers=buffers, layers=layers)


@torch.no_grad()
def grow_into(
    wide: nn.Module, narrow: nn.Module, plan: GrowthPlan, only: Callable[[str], bool] = lambda name: True
) -> None:
    """Fill ``wide``, built at the new widths, with the growth of ``narrow``.

    Tied parameters are filled once. Buffers of a checkpoint are taken over, as a restart from it would, or grow along;
    all others stay as the wide model makes them.

    Args:
        only: which parameters, by name; the others hold what they shall already.

    Raises:
        PlanError: names a parameter whose shape isn't the planned one.
    """
    kept, tables = saved_buffers(narrow), GrowthTables(plan)
    old = {**dict(narrow.named_parameters()), **kept}
    growing = {buffer.name for buffer in plan.buffers}
    followers = {name: buffer for name, buffer in saved_buffers(wide).items() if name in growing}
    for name, param in (*wide.named_parameters(), *followers.items()):
        planned = plan.param(name).after
        if planned != tuple(param.shape):
            raise PlanError(
                f"{name} is planned to become {planned}, but build_model makes it {tuple(param.shape)}; its size "
                "follows from several widths, which have to grow together and by the same ratio"
            )
        if not only(name):
            continue
        widener = Widener(plan, name, tables=tables)
        grown = torch.empty(math.prod(widener.after), dtype=param.dtype)
        widener.weight(old[plan.source_of(name)].detach(), grown)
        param.copy_(grown.view(widener.after))
    for name, buffer in saved_buffers(wide).items():
        held = kept.get(plan.source_of(name))
        if name not in growing and held is not None and held.shape == buffer.shape:
            buffer.copy_(held)
