"""More layers: where each comes from, and the proof that those which are to add nothing at first do so.

What a layer writes to the residual stream isn't told by names: a small instance gets new layers that hold nothing but
zeros, and their parameters get their values back, kind by kind, as long as the model keeps its function. They do so in
the order in which they are used, so that what stays zero is the layer's output. So a new layer learns: its output has a
gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ds_sparkling.discovery.build import BuildModel, build_on_meta
from ds_sparkling.discovery.comparison import Runnable, first_runnable, fitting_axes, tolerance
from ds_sparkling.discovery.forward import Inputs, NotRunnableError, difference, run, watch
from ds_sparkling.discovery.layer_lists import at_depth, kinds_of, lengthened, lists_of
from ds_sparkling.discovery.patience import Patience
from ds_sparkling.discovery.plain_growth import grow_into, plan_of, settled
from ds_sparkling.discovery.proof import Proof
from ds_sparkling.discovery.small_instance import instances, layer_kinds
from ds_sparkling.discovery.trial import TrialGrowth
from ds_sparkling.errors import PlanError
from ds_sparkling.spec.axes import ParamAxes
from ds_sparkling.spec.axes_by_pattern import name_pattern
from ds_sparkling.spec.layers import LayerGrowth, in_list, is_new, layer_sources
from ds_sparkling.spec.strategy import LayerContent, Layers, Strategy


def layer_growths(
    build_model: BuildModel, widths: Mapping[str, int], after: Mapping[str, int], strategy: Strategy
) -> tuple[LayerGrowth, ...]:
    """The lists of layers that a growth makes longer.

    Args:
        build_model: builds the model from its widths.
        widths: those in force, of all axes.
        after: the axes that grow, and what to.
        strategy: tells where new layers come from.

    Raises:
        PlanError: if there aren't more layers than before, if the sources don't fit, or if a layer isn't of the kind
            that its source is of.
    """
    narrow = build_on_meta(build_model, widths)
    lists = {axis: lists_of(build_model, widths, axis, to, narrow) for axis, to in after.items()}
    found = tuple(
        LayerGrowth(axis, after[axis], path, layer_sources(axis, before, many, strategy.layers.sources))
        for axis, longer in lists.items()
        for path, (before, many) in longer.items()
    )
    if found:
        depth = {axis: after[axis] for axis, longer in lists.items() if longer}
        deep = build_on_meta(build_model, {**widths, **depth})
        for growth in found:
            _check_kinds(growth, narrow, deep)
    return found


def more_layers(
    build_model: BuildModel, widths: Mapping[str, int], growths: Sequence[Mapping[str, int]], strategy: Strategy
) -> Iterator[tuple[TrialGrowth, tuple[LayerGrowth, ...]]]:
    """Of growths that follow one another, what is to be shown of their new layers: that these add nothing at first.

    Args, Raises: as :func:`layer_growths`.
    """
    for after in growths:
        layers = layer_growths(build_model, widths, after, strategy)
        if layers and strategy.layers.content is LayerContent.ZERO_OUTPUT:
            deeper = {growth.axis: after[growth.axis] for growth in layers}
            yield TrialGrowth(widths, tuple(deeper), deeper, strategy), layers
        widths = {**widths, **after}


def _check_kinds(growth: LayerGrowth, narrow: nn.Module, deep: nn.Module) -> None:
    """Raise PlanError if a layer of the deeper model is of another kind than the one that it comes from."""
    old, new = (kinds_of(model, model.get_submodule(growth.path).children()) for model in (narrow, deep))
    for layer, source in enumerate(growth.sources):
        if new[layer] != old[source]:
            raise PlanError(
                f"{growth.axis}: layer {layer} of {growth.path} would come from layer {source}, and build_model makes "
                "it of another kind (its modules, its parameters, or its entry in layer_types): choose "
                "layers.sources that fit, by a list if need be"
            )


def layer_outputs(
    build_model: BuildModel,
    axes: Mapping[str, ParamAxes],
    widths: Mapping[str, int],
    growths: Sequence[LayerGrowth],
    inputs: Inputs | None = None,
) -> dict[str, ParamAxes]:
    """``axes`` with what layers write to the residual stream marked as such, where that isn't known yet.

    Args:
        build_model: builds the model from its widths.
        axes: what each parameter's dimensions are.
        widths: those in force, of all axes.
        growths: the lists that get longer.
        inputs: of the model's forward; random token ids by default.

    Raises:
        PlanError: if no small instance of the model can be run, or layers change what passes through them even if they
            hold nothing but zeros.
    """
    marked = dict(axes)
    for axis in dict.fromkeys(growth.axis for growth in growths):
        paths = [growth.path for growth in growths if growth.axis == axis]
        if all(any(found.layer_output and in_list(name, path) for name, found in axes.items()) for path in paths):
            continue
        try:
            silent = _Deeper.of(build_model, axes, widths, axis, inputs).silent()
        except NotRunnableError as error:
            raise PlanError(
                f'what layers write to the residual stream can\'t be found out: {error}. Say it in "sparkling": '
                '{"axes": ...} by "layer_output": true, or choose "copy" for layers.content'
            ) from error
        for name, found in axes.items():
            if any((place := in_list(name, path)) and name_pattern(place[1]) in silent for path in paths):
                marked[name] = replace(found, layer_output=True)
    return marked


def prove_layers(
    build_model: BuildModel,
    axes: Mapping[str, ParamAxes],
    widths: Mapping[str, int],
    growths: Sequence[LayerGrowth],
    inputs: Inputs | None = None,
) -> Proof:
    """Show that new layers whose output is zero leave the function as it was.

    Args: as :func:`layer_outputs`, whose result ``axes`` are.

    Returns:
        The largest difference of logits, or why nothing is known.

    Raises:
        PlanError: if growing changes the function.
    """
    worst = 0.0
    try:
        for axis in dict.fromkeys(growth.axis for growth in growths):
            worst = max(worst, _Deeper.of(build_model, axes, widths, axis, inputs).proved())
    except NotRunnableError as error:
        return Proof(None, f"not provable: {error}")
    return Proof(worst)


@dataclass(frozen=True, eq=False)
class _Deeper:
    """A small model, and one with more layers of every kind.

    Attributes:
        axis: what counts the layers.
        narrow: the small model as it runs.
        deep: the deeper one; what it holds is filled in.
        axes: of the small model's parameters.
        layers: which of its layers those of the deeper one come from.
    """

    axis: str
    narrow: Runnable
    deep: nn.Module
    axes: dict[str, ParamAxes]
    layers: tuple[LayerGrowth, ...]

    @classmethod
    def of(
        cls,
        build_model: BuildModel,
        axes: Mapping[str, ParamAxes],
        widths: Mapping[str, int],
        axis: str,
        inputs: Inputs | None,
    ) -> _Deeper:
        patience = Patience()
        patience.spend(f"making the model small, to try more {axis}")
        whole = build_on_meta(build_model, widths)
        kinds, grown = layer_kinds(whole), lists_of(build_model, widths, axis, 2 * widths[axis], whole)
        few = min(max((kinds[path][0] for path in grown if path in kinds), default=1), widths[axis])
        others = {other: width for other, width in widths.items() if other != axis}
        small = instances(at_depth(build_model, {axis: few}), others, {}, keep_vocabulary=inputs is not None)
        narrow = first_runnable(small, inputs, torch.float64, seed=0)
        deeper = replace(narrow.instance, build_model=at_depth(narrow.instance.build_model, {axis: 2 * few}))
        deep = settled(deeper.build(), narrow.dtype)
        layers = tuple(_by_kind(axis, 2 * few, path, narrow.model, deep) for path in lengthened(narrow.model, deep))
        if not layers:
            raise NotRunnableError(f"a small instance with more {axis} has no more layers")
        return cls(axis, narrow, deep, fitting_axes(narrow.instance, narrow.model, axes), layers)

    def silent(self) -> frozenset[str]:
        """The parameters of a layer that must be zero for it to add nothing, as patterns of their names in it.

        Raises:
            PlanError: if that isn't enough, or not needed.
        """
        self._fill(LayerContent.COPY)
        kinds: dict[str, list[tuple[Tensor, Tensor]]] = {}
        with torch.no_grad():
            for pattern, param in self._new():
                kinds.setdefault(pattern, []).append((param, param.clone()))
                param.zero_()
        if not self._keeps():
            raise PlanError(
                f"{self.axis}: new layers change what passes through them even if all of their parameters are zero, so "
                'they can\'t start by adding nothing; choose "copy" for layers.content'
            )
        silent = set()
        with torch.no_grad():
            for pattern, params in kinds.items():
                for param, value in params:
                    param.copy_(value)
                if not self._keeps():
                    silent.add(pattern)
                    for param, _ in params:
                        param.zero_()
        if not silent:
            raise PlanError(f"{self.axis}: new layers have no part in what the model gives")
        return frozenset(silent)

    def proved(self) -> float:
        """How far logits are off with new layers whose output is zero.

        Raises:
            PlanError: if it isn't the same function.
        """
        self._fill(LayerContent.ZERO_OUTPUT)
        off = self._difference()
        if off > tolerance(self.narrow.dtype):
            raise PlanError(
                f"growing {self.axis} would change the model's function: with new layers whose output is zero, logits "
                f'differ by {off:.2g} of the largest. Correct "layer_output" in the axes, or choose "copy" for '
                "layers.content"
            )
        return off

    def _fill(self, content: LayerContent) -> None:
        instance, strategy = self.narrow.instance, Strategy(layers=Layers(content=content))
        plan = plan_of(self.narrow.model, self.axes, instance.before, {}, strategy, self.layers)
        grow_into(self.deep, self.narrow.model, plan)

    def _new(self) -> list[tuple[str, Tensor]]:
        """The parameters of the new layers as they are used, with the pattern of their names there."""
        seen, _ = watch(self.deep, self.narrow.views[0].call)
        turns = {module: turn for turn, module in enumerate(dict.fromkeys(entry.module for entry in seen))}

        def turn(name: str) -> int:
            """When the module that has a parameter, or the nearest around it, takes its turn."""
            while name and name not in turns:
                name = name.rpartition(".")[0]
            return turns.get(name, 0)

        found = [(name, param) for name, param in self.deep.named_parameters() if is_new(name, self.layers)]
        places = [
            (name, param, next(filter(None, (growth.place(name) for growth in self.layers)))) for name, param in found
        ]
        places.sort(key=lambda entry: turn(entry[0]))
        return [(name_pattern(rest), param) for _, param, (_, rest) in places]

    def _keeps(self) -> bool:
        return self._difference() <= tolerance(self.narrow.dtype)

    def _difference(self) -> float:
        """Of the logits in use: what counts tokens per layer in training may know of the new ones."""
        view = self.narrow.views[0]
        return difference(view.outputs.logits, run(self.deep, view.call).logits)


def _by_kind(axis: str, counted: int, path: str, narrow: nn.Module, deep: nn.Module) -> LayerGrowth:
    """A list that gets longer, each new layer from the latest old one of its kind."""
    old, new = (kinds_of(model, model.get_submodule(path).children()) for model in (narrow, deep))
    sources = list(range(len(old)))
    for kind in new[len(old) :]:
        if kind not in old:
            raise NotRunnableError(f"a small instance has no layer of {path} that a further one could come from")
        sources.append(len(old) - 1 - old[::-1].index(kind))
    return LayerGrowth(axis, counted, path, tuple(sources))
