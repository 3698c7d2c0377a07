"""A model's parameters at any widths, from one probing on the meta device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ds_sparkling.discovery.build import BuildModel, base_widths, build_on_meta, check_wide
from ds_sparkling.discovery.layer_lists import layer_axes, refuse_layers
from ds_sparkling.discovery.reading import read
from ds_sparkling.errors import PlanError
from ds_sparkling.growth.plan import GrowthPlan, Shape, count_parameters, make_plan
from ds_sparkling.spec.active_experts import active_share, doubt_of_share
from ds_sparkling.spec.axes import ParamAxes, Role
from ds_sparkling.spec.strategy import Strategy


@dataclass(frozen=True)
class ParameterSize:
    """One parameter as a rank's engine holds it, before ZeRO partitions it.

    Attributes:
        numel: elements, of the rank's own experts only.
        expert: it belongs to experts that are spread over the expert-parallel ranks.
        trained: an optimizer holds it; otherwise it is frozen.
    """

    numel: int
    expert: bool = False
    trained: bool = True


@dataclass(frozen=True)
class Model:
    """What is known of the model without building it again.

    Attributes:
        widths: those it starts with, one per axis that grows.
        shapes: logical shape of every parameter at ``widths``, tied parameters once.
        axes: what each parameter's dimensions are.
        frozen: parameters that aren't trained.
        active_share: share of the stacked experts that one token uses.
    """

    widths: dict[str, int]
    shapes: dict[str, Shape]
    axes: dict[str, ParamAxes]
    frozen: frozenset[str]
    active_share: float

    def shapes_at(self, widths: Mapping[str, int]) -> dict[str, Shape]:
        """Logical shapes with the axes in ``widths`` at those widths."""
        return {name: self.axes[name].shape(shape, widths) for name, shape in self.shapes.items()}

    def parameters(self, widths: Mapping[str, int]) -> int:
        """All parameters, tied ones (the embedding that is the head, too) counted once."""
        return count_parameters(self.shapes_at(widths), self.axes)

    def active(self, widths: Mapping[str, int]) -> int:
        """Parameters that one token uses: all but the experts that it isn't routed to (N of Eq. 29)."""
        return count_parameters(self.shapes_at(widths), self.axes, self.active_share)

    def plan(self, before: Mapping[str, int], after: Mapping[str, int], strategy: Strategy, number: int) -> GrowthPlan:
        """The growth from all widths ``before`` to those in ``after``.

        Raises:
            PlanError: if the widths don't grow or the strategy can't hold.
        """
        shapes = self.shapes_at(before)
        return make_plan(shapes, self.axes, before, after, strategy, number=number, active_share=self.active_share)

    def tensors(self, widths: Mapping[str, int], expert_parallel: int) -> list[ParameterSize]:
        """What one rank holds, experts divided by ``expert_parallel`` ranks.

        Where experts are divided, AutoEP splits a fused gate and up into two tensors.

        Raises:
            PlanError: if the experts can't be shared evenly.
        """
        held = []
        for name, shape in self.shapes_at(widths).items():
            trained = name not in self.frozen
            if not self.axes[name].stacked_experts or expert_parallel == 1:
                held.append(ParameterSize(math.prod(shape), trained=trained))
                continue
            if shape[0] % expert_parallel:
                raise PlanError(
                    f"{name} stacks {shape[0]} experts, which {expert_parallel} expert-parallel ranks can't share "
                    "evenly; pass another --expert-parallel"
                )
            segments = max(dim.segments if dim.role is Role.FAN_OUT else 1 for dim in self.axes[name].dims)
            numel = math.prod(shape) // expert_parallel // segments
            held += [ParameterSize(numel, expert=True, trained=trained)] * segments
        return held


def probe_model(
    build_model: BuildModel,
    axes: Iterable[str],
    given: Mapping[str, int] | None,
    final: Mapping[str, int],
    experts_per_token: int | None = None,
    hints: Mapping[str, ParamAxes] | None = None,
) -> Model:
    """Probe the model, and check what was found against the model at its ``final`` widths.

    Args:
        build_model: builds it from its widths.
        axes: the axes that grow.
        given: widths to start with, where they aren't the model's own.
        final: the widths of ``axes`` after the last growth.
        experts_per_token: how many experts a token is routed to, if the model's config doesn't tell.
        hints: what is known of parameters that can't be read, by patterns that match whole names.

    Raises:
        PlanError: if something isn't known or doesn't fit; the message says what to do.
    """
    axes = list(axes)
    widths = base_widths(build_model, axes, given)
    refuse_layers(axes, layer_axes(build_model, widths, axes), "leave it out, and plan the widths alone")
    found = read(build_model, widths, hints).likeliest
    built = build_on_meta(build_model, widths)
    shapes = {name: tuple(param.shape) for name, param in built.named_parameters()}
    frozen = frozenset(name for name, param in built.named_parameters() if not param.requires_grad)
    share = _share(active_share(built), shapes, found, experts_per_token)
    check_wide(build_model, found, widths, final)
    # Buffers that follow an axis are no parameters, and hardly weigh.
    return Model(widths, shapes, {name: found[name] for name in shapes}, frozen, share)


def _share(
    told: float | None, shapes: Mapping[str, Shape], axes: Mapping[str, ParamAxes], experts_per_token: int | None
) -> float:
    """Share of the stacked experts that one token uses; 1 for a dense model."""
    stacked = {shapes[name][0] for name, param_axes in axes.items() if param_axes.stacked_experts}
    if experts_per_token is not None and len(stacked) == 1:
        (experts,) = stacked
        if not 1 <= experts_per_token <= experts:
            raise PlanError(f"--experts-per-token {experts_per_token}: the model has {experts} experts")
        return experts_per_token / experts
    if experts_per_token is not None:
        raise PlanError(
            f"--experts-per-token is for a model with one number of stacked experts; this one's are {sorted(stacked)}"
        )
    doubt = doubt_of_share(told, stacked=bool(stacked))
    if doubt is not None:
        raise PlanError(
            f"{doubt}; pass --experts-per-token K" if stacked else f"{doubt}, so what a token uses can't be counted"
        )
    return 1.0 if told is None else told
