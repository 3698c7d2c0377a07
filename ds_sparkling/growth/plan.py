"""The plan of one growth: everything that shapes decide, without any tensor data.

A plan is immutable, can be printed and saved as JSON, and covers every parameter of the model or doesn't exist.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

from ds_sparkling.errors import PlanError
from ds_sparkling.growth.scaling import AxisGrowth, unit_scales
from ds_sparkling.spec.axes import Dim, Norm, ParamAxes, Role
from ds_sparkling.spec.layers import LayerGrowth, in_list, is_new, renumbered, source_of
from ds_sparkling.spec.strategy import Init, LayerContent, Strategy

Shape = tuple[int, ...]
#: Which share of its experts' parameters one token uses (top-k over experts): of all that are stacked, or by name.
Shares = float | Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class ParamPlan:
    """One parameter's part in a growth.

    Attributes:
        name: what the large model calls it.
        axes: what its dimensions are to this growth: parts of a dimension whose axis doesn't grow are fixed.
        before: logical shape (all experts) of its source.
        after: its own.
        source: what the small model calls the parameter that it comes from.
        made: how all of it is made, of one that there wasn't before; None for its source itself, which goes on.
    """

    name: str
    axes: ParamAxes
    before: Shape
    after: Shape
    source: str
    made: Init | None = None

    @property
    def grows(self) -> bool:
        """Whether any of its elements are new."""
        return self.before != self.after or self.made is not None

    @property
    def new_elements(self) -> int:
        return math.prod(self.after) - (math.prod(self.before) if self.made is None else 0)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "axes": self.axes.to_dict(),
            "before": list(self.before),
            "after": list(self.after),
            **({"source": self.source} if self.source != self.name else {}),
            **({"made": self.made.value} if self.made is not None else {}),
        }


@dataclass(frozen=True, kw_only=True)
class GrowthPlan:
    """One growth of one model.

    Attributes:
        number: 1 for the first growth of a run, 2 for the next ...
        growths: one :class:`AxisGrowth` per width axis that grows.
        strategy: how new entries, scales and optimizer state are made.
        params: one :class:`ParamPlan` per parameter of the large model, in its order.
        active_share: share of the experts that one token uses, for all stacked experts or by parameter; 1 for a dense
            model, None if it isn't known.
        buffers: one :class:`ParamPlan` per buffer that checkpoints hold and that follows an axis.
        layers: the lists of layers that get longer.
    """

    number: int
    growths: tuple[AxisGrowth, ...]
    strategy: Strategy
    params: tuple[ParamPlan, ...]
    active_share: Shares | None = 1.0
    buffers: tuple[ParamPlan, ...] = ()
    layers: tuple[LayerGrowth, ...] = ()

    @property
    def grown_widths(self) -> dict[str, int]:
        """What the axes that grow become."""
        widths = {growth.axis: growth.after for growth in self.growths}
        return widths | {longer.axis: longer.counted for longer in self.layers}

    def source_of(self, name: str) -> str:
        """What the parameter, or the module, that ``name`` comes from is called before the growth."""
        return source_of(name, self.layers)

    def param(self, name: str) -> ParamPlan:
        try:
            return self._by_name[name]
        except KeyError:
            raise PlanError(f"the plan has no parameter {name!r}") from None

    @cached_property
    def _by_name(self) -> dict[str, ParamPlan]:
        return {param.name: param for param in (*self.params, *self.buffers)}

    def parameters(self, *, active: bool = False) -> tuple[int, int]:
        """Total (or active per token) parameters before and after.

        Raises:
            PlanError: if it isn't known how many are active.
        """
        axes = {param.name: param.axes for param in self.params}
        share = self.active_share if active else 1.0
        if share is None:
            raise PlanError("how many of the experts' parameters are active per token isn't known")
        return (
            count_parameters({param.name: param.before for param in self.params if param.made is None}, axes, share),
            count_parameters({param.name: param.after for param in self.params}, axes, share),
        )

    def compute_saved(self, fraction: float) -> float:
        """Share of the wide model's training compute saved by growing at ``fraction`` of the tokens (Eq. 29)."""
        before, after = self.parameters(active=True)
        return fraction * (1 - before / after)

    def to_dict(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "growths": [dict(vars(growth)) for growth in self.growths],
            "layers": {growth.path: list(growth.sources) for growth in self.layers},
            "strategy": self.strategy.to_dict(),
            "params": [param.to_dict() for param in self.params],
            "buffers": [buffer.to_dict() for buffer in self.buffers],
            "active_share": dict(self.active_share) if isinstance(self.active_share, Mapping) else self.active_share,
        }


def make_plan(
    shapes: Mapping[str, Shape],
    axes: Mapping[str, ParamAxes],
    before: Mapping[str, int],
    after: Mapping[str, int],
    strategy: Strategy,
    *,
    number: int,
    active_share: Shares | None = 1.0,
    buffers: Mapping[str, Shape] | None = None,
    layers: Sequence[LayerGrowth] = (),
) -> GrowthPlan:
    """Plan the growth of a model whose parameters have logical ``shapes`` at widths ``before``.

    Args:
        shapes: logical shape of every parameter, all experts counted.
        axes: what each parameter's dimensions are; must cover exactly ``shapes``, and those of ``buffers`` that follow
            an axis.
        before: widths in force of (at least) every axis that grows.
        after: widths of the axes that grow; what counts layers isn't among them.
        buffers: shape of every buffer that checkpoints hold.
        layers: the lists of layers that get longer.

    Raises:
        PlanError: an unknown axis, a width that doesn't grow, an unmatched parameter, or a shape that contradicts the
            widths; the message names it.
    """
    for axis in after:
        if axis not in before:
            raise PlanError(f"unknown width axis {axis!r}; this model's are {', '.join(sorted(before)) or 'none'}")
    unmatched = [name for name in shapes if name not in axes]
    if unmatched:
        raise PlanError(f"no axes are known for {_some(unmatched)}; a plan must match every parameter")
    held = {name: shape for name, shape in (buffers or {}).items() if name in axes and name not in shapes}
    absent = [name for name in axes if name not in shapes and name not in held]
    if absent:
        raise PlanError(f"axes are given for {_some(absent)}, which the model doesn't have")

    for longer in layers:
        _check_silenced(longer, axes, strategy)
    growths = axis_growths(axes, before, after)
    planned = {name: _param_plan(name, shape, axes[name], before, after) for name, shape in {**shapes, **held}.items()}
    params = tuple(_layer_plan(name, planned, layers, strategy) for name in renumbered([*shapes], layers))
    copied = replace(strategy.layers, content=LayerContent.COPY)  # a buffer's entries may be of any type
    followers = tuple(
        _layer_plan(name, planned, layers, replace(strategy, layers=copied)) for name in renumbered([*held], layers)
    )
    for growth in growths:
        unit_scales(growth, strategy, number)  # refuses a scaling that can't hold, before anything is touched
    return GrowthPlan(
        number=number,
        growths=growths,
        strategy=strategy,
        params=params,
        active_share=active_share,
        buffers=followers,
        layers=tuple(layers),
    )


def _param_plan(
    name: str, shape: Shape, axes: ParamAxes, before: Mapping[str, int], after: Mapping[str, int]
) -> ParamPlan:
    if len(axes.dims) != len(shape) or axes.shape(shape, before) != tuple(shape):
        raise PlanError(
            f"{name}: shape {tuple(shape)} contradicts its axes {roles_in_words(axes)} at widths {dict(before)}"
        )
    settled = axes.settled(before, after)
    wide = settled.shape(shape, after)
    return ParamPlan(name=name, axes=settled, before=tuple(shape), after=wide, source=name)


def _check_silenced(growth: LayerGrowth, axes: Mapping[str, ParamAxes], strategy: Strategy) -> None:
    """Raise PlanError if new layers are to add nothing and it isn't known what makes them so."""
    if strategy.layers.content is not LayerContent.ZERO_OUTPUT:
        return
    told = {place[0] for name, found in axes.items() if found.layer_output and (place := in_list(name, growth.path))}
    for source, new in zip(growth.sources, growth.new, strict=True):
        if new and source not in told:
            raise PlanError(
                f"{growth.axis}: what layer {source} of {growth.path} writes to the residual stream isn't known, so "
                'its copy can\'t be made to add nothing; say it in "sparkling": {"axes": ...} by "layer_output": true, '
                'or choose "copy" for layers.content'
            )


def _layer_plan(
    name: str, planned: Mapping[str, ParamPlan], layers: Sequence[LayerGrowth], strategy: Strategy
) -> ParamPlan:
    """The plan of a parameter of the large model, from those of the small one's."""
    source = planned[source_of(name, layers)]
    if not is_new(name, layers):
        return replace(source, name=name)
    return replace(source, name=name, made=_made(source, strategy.layers.content))


def _made(source: ParamPlan, content: LayerContent) -> Init:
    """How a parameter of a new layer is made."""
    if content is LayerContent.ZERO_OUTPUT and source.axes.layer_output:
        return Init.ZERO
    matrix = len(source.before) - source.axes.stacked_experts > 1
    return Init.RANDOM if content is LayerContent.RANDOM and matrix else Init.COPY


def axis_growths(
    axes: Mapping[str, ParamAxes], before: Mapping[str, int], after: Mapping[str, int]
) -> tuple[AxisGrowth, ...]:
    """What the axes' growths have to do with each other, and with norms."""
    dims: dict[str, list[tuple[ParamAxes, Dim, Dim]]] = {axis: [] for axis in before}
    for param_axes in axes.values():
        for dim in param_axes.dims:
            for leaf in dim.leaves:
                if leaf.axis is not None:
                    dims.setdefault(leaf.axis, []).append((param_axes, dim, leaf))
    widths = {**before, **after}
    silent = [axis for axis in after if not dims[axis]]
    ratios = {Fraction(width, before[axis]) for axis, width in after.items() if dims[axis]}
    for axis in silent:
        if Fraction(after[axis], before[axis]) not in ratios:
            fitting = sorted({str(ratio * before[axis]) for ratio in ratios if (ratio * before[axis]).denominator == 1})
            raise PlanError(
                f"no parameter carries the width axis {axis!r}; it can only grow together with an axis that parameters "
                "carry, and by the same ratio" + (f": to {' or '.join(fitting)}, not {after[axis]}" if fitting else "")
            )
    growths = []
    for axis, width in after.items():
        groups = {(leaf.group_count(before), leaf.group_count(widths)) for _, _, leaf in dims[axis]} or {(1, 1)}
        if len(groups) > 1:
            raise PlanError(f"{axis}: its dimensions are grouped in different ways, {sorted(groups)}")
        norms = {param_axes.norm for param_axes, _, leaf in dims[axis] if leaf.role is Role.GAIN}
        rigid = ""
        if Norm.LAYER in norms:
            rigid = "LayerNorm takes off the mean over the units"
        elif norms and any(leaf.block * leaf.segments * dim.segments > 1 for _, dim, leaf in dims[axis]):
            rigid = "it isn't only the width that a norm divides by the RMS of"
        elif norms and silent:
            rigid = f"{silent[0]} grows with it"
        growths.append(AxisGrowth(axis, before[axis], width, normed=bool(norms), groups=groups.pop(), rigid=rigid))
    for param_axes in axes.values():
        for leaf in param_axes.leaves:
            if leaf.groups in after and leaf.axis not in after:
                raise PlanError(f"{leaf.groups} counts groups of {leaf.axis}, so they can only grow together")
    return tuple(growths)


def count_parameters(shapes: Mapping[str, Shape], axes: Mapping[str, ParamAxes], active_share: Shares = 1.0) -> int:
    """Parameters of a model with logical ``shapes``, of experts only ``active_share``."""

    def share(name: str) -> float:
        if isinstance(active_share, Mapping):
            return active_share.get(name, 1.0)
        return active_share if axes[name].stacked_experts else 1.0

    return round(sum(math.prod(shape) * share(name) for name, shape in shapes.items()))


def _some(names: list[str], limit: int = 3) -> str:
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def roles_in_words(axes: ParamAxes, among: Collection[str] | None = None) -> str:
    """The dimensions' axes and roles, "-" for those that carry none (or none ``among``)."""
    return ", ".join(dim.describe() if dim.axes & set(among or dim.axes) else "-" for dim in axes.dims)
