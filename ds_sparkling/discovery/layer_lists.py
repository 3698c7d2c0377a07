"""The lists that a model keeps its layers in, and the axes that make them longer."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from ds_sparkling.discovery.build import BuildModel, build_on_meta
from ds_sparkling.discovery.factory import HuggingFaceFactory
from ds_sparkling.errors import PlanError, UnsupportedError

Layers = nn.ModuleList | nn.Sequential


def layer_lists(model: nn.Module, kinds: Any = nn.ModuleList) -> dict[str, Layers]:
    """The outermost lists of modules by name, empty ones left out."""
    found: dict[str, Layers] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if isinstance(module, kinds) and name and len(module) and not inside:
            found[name] = module
    return found


def kinds_of(model: nn.Module, layers: Iterable[nn.Module]) -> list[Hashable]:
    """What kind every layer of a list in a model is.

    Two are of one kind if their submodules and parameters have the same names, types and shapes, and the model's config
    declares no different ``layer_types``.
    """
    kinds = [_kind(layer) for layer in layers]
    declared = getattr(getattr(model, "config", None), "layer_types", None)
    types = declared if isinstance(declared, list) and len(declared) == len(kinds) else [None] * len(kinds)
    return [*zip(kinds, types, strict=True)]


def _kind(layer: nn.Module) -> Hashable:
    modules = tuple((name, type(module)) for name, module in layer.named_modules())
    return modules, tuple((name, tuple(param.shape)) for name, param in layer.named_parameters())


def lengthened(narrow: nn.Module, wide: nn.Module) -> dict[str, tuple[int, int]]:
    """The lists of layers that are longer in ``wide``, and how many layers they have in the two models."""
    before, after = (layer_lists(model, (nn.ModuleList, nn.Sequential)) for model in (narrow, wide))
    both = {name: (len(layers), len(after[name])) for name, layers in before.items() if name in after}
    return {name: (few, many) for name, (few, many) in both.items() if few < many and "expert" not in name}


def layer_axes(build_model: BuildModel, widths: Mapping[str, int], axes: Iterable[str]) -> tuple[str, ...]:
    """Those of ``axes`` that count layers: with twice as many, a list of layers is longer.

    Raises:
        PlanError: if the model can't be built as it is.
    """
    narrow = build_on_meta(build_model, widths)
    return tuple(axis for axis in axes if lists_of(build_model, widths, axis, 2 * widths[axis], narrow))


def refuse_layers(axes: Iterable[str], deeper: Collection[str], cure: str) -> None:
    """Raise UnsupportedError for an axis that counts layers, where these can't grow yet.

    Args:
        axes: those that are to grow.
        deeper: those that count layers.
        cure: what to do instead.
    """
    for axis in axes:
        if axis in deeper:
            raise UnsupportedError(f"{axis} counts layers, which can't be added here yet: {cure}")


def lists_of(
    build_model: BuildModel, widths: Mapping[str, int], axis: str, after: int, narrow: nn.Module
) -> dict[str, tuple[int, int]]:
    """The lists that ``axis`` makes longer, and how many layers they have before and after; none if it is a width."""
    try:
        return lengthened(narrow, build_on_meta(build_model, {**widths, axis: after}))
    except PlanError:  # a width that can't grow alone
        return {}


def at_depth(build_model: BuildModel, depth: Mapping[str, int]) -> BuildModel:
    """What builds the model with so many layers, whatever its other widths."""
    if not depth:
        return build_model
    if isinstance(build_model, HuggingFaceFactory):
        return replace(build_model, config=build_model.widened(depth))
    return partial(build_model, **depth)
