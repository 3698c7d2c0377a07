"""Grow a small model and compare the wide one with it, module by module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ds_sparkling.discovery.build import saved_buffers
from ds_sparkling.discovery.forward import (
    LENGTH,
    Call,
    Inputs,
    NotRunnableError,
    Outputs,
    Seen,
    Side,
    difference,
    given_call,
    run,
    token_calls,
    watch,
    with_labels,
)
from ds_sparkling.discovery.moves import Move
from ds_sparkling.discovery.plain_growth import grow_into, plan_of, randomize, randomize_buffers, settled
from ds_sparkling.discovery.reading import key_value_heads
from ds_sparkling.discovery.small_instance import Instance
from ds_sparkling.discovery.token_selection import enough_tokens
from ds_sparkling.errors import PlanError
from ds_sparkling.growth import GrowthPlan, GrowthTables
from ds_sparkling.spec.axes import Dim, ParamAxes, Role
from ds_sparkling.spec.strategy import Strategy

#: Largest |difference| over largest |value| of logits that counts as the same function. In float64 a growth that keeps
#: the function differs by 1e-12; models of the transformers library compute norms and softmax in fp32 throughout, and
#: sums over twice as many units, in another order, then differ by some 1e-6.
SAME = 1e-5
#: The same in fp32, where every sum is rounded to 2^-24 and layers add that up.
SAME_FP32 = 1e-4


@dataclass(frozen=True, eq=False)
class View:
    """A forward pass, and what of its outputs is compared.

    Attributes:
        call: the forward pass.
        outputs: what the narrow model gives.
        compared: the outputs that are the same from run to run.
        noise: how far the logits differ between two runs, relative to the largest.
    """

    call: Call
    outputs: Outputs
    compared: frozenset[str]
    noise: float


@dataclass(frozen=True, eq=False)
class Runnable:
    """A narrow model that runs: its instance, the module with every parameter made to matter, and how it is run.

    The first of the ``views`` is the model in use; another, if there is one, the model in training, with labels.
    """

    instance: Instance
    model: nn.Module
    views: tuple[View, ...]

    @property
    def call(self) -> Call:
        return self.views[0].call

    @property
    def dtype(self) -> torch.dtype:
        return _dtype(self.model)


@dataclass(frozen=True, kw_only=True)
class Change:
    """One module's tensor in the narrow model and in the wide one.

    Attributes:
        module, call, side: which tensor.
        before, after: root mean square over all its elements.
        expected: ratio of the two that the growth makes on purpose: a tied head's factor, which sits in the norm
            before it.
        same: whether the wide one holds the narrow one's values, each as often as units are copied.
    """

    module: str
    call: int
    side: Side
    before: float
    after: float
    expected: float
    same: bool


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A grown model against the one it came from.

    Attributes:
        plan: how it was grown.
        changes: all modules' tensors, in the order of time.
        difference: largest difference of an output over its largest value; of a grown vocabulary the old logits.
        narrow, wide: the two models.
        what: which outputs those are, in words.
    """

    plan: GrowthPlan
    changes: tuple[Change, ...]
    difference: float
    narrow: nn.Module
    wide: nn.Module
    what: str = "logits"

    @property
    def same(self) -> bool:
        """Whether the function is the same."""
        return self.difference <= tolerance(_dtype(self.narrow))


def tolerance(dtype: torch.dtype) -> float:
    """How much logits of the same function may differ, relative to the largest, when computed in ``dtype``."""
    return SAME if dtype is torch.float64 else SAME_FP32


def first_runnable(instances: Iterable[Instance], inputs: Inputs | None, dtype: torch.dtype, seed: int) -> Runnable:
    """The first instance whose narrow model runs, in ``dtype`` or, if its modules don't know that, in fp32.

    Raises:
        NotRunnableError: with the first one's failure, if none does.
    """
    failure: NotRunnableError | None = None
    for instance in instances:
        for kind in dict.fromkeys((dtype, torch.float32)):
            try:
                model = _prepared(instance, kind, seed)
                return Runnable(instance, model, _first_views(model, inputs, seed))
            except PlanError as error:
                failure = failure or NotRunnableError(str(error))
    raise failure or NotRunnableError("there is no model to run")


def reseeded(runnable: Runnable, inputs: Inputs | None, seed: int) -> Runnable:
    """The same instance with other parameters and, unless inputs are given, on other tokens."""
    model = _prepared(runnable.instance, runnable.dtype, seed)
    return Runnable(runnable.instance, model, _first_views(model, inputs, seed))


def _prepared(instance: Instance, dtype: torch.dtype, seed: int) -> nn.Module:
    """The narrow model with parameters, and buffers that follow a width, that all matter."""
    model = settled(instance.build(), dtype)
    randomize(model, seed)
    if held := saved_buffers(model):
        moving = {name for name, _ in instance.moves}
        randomize_buffers({name: buffer for name, buffer in held.items() if name in moving}, seed)
    return model


def _first_views(model: nn.Module, inputs: Inputs | None, seed: int) -> tuple[View, ...]:
    """The views by the first forward pass that works.

    Raises:
        NotRunnableError: with the first one's failure, if none does.
    """
    failure: NotRunnableError | None = None
    for call in _calls(model, seed) if inputs is None else [given_call(inputs)]:
        try:
            return views(model, call)
        except NotRunnableError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _calls(model: nn.Module, seed: int) -> Iterator[Call]:
    plain = list(token_calls(model, seed))
    length = enough_tokens(model)
    if length > LENGTH:
        yield from token_calls(model, seed, length)
    yield from plain
    yield from (call for call in (with_labels(model, plain[0]),) if call is not plain[0])


def views(model: nn.Module, call: Call) -> tuple[View, ...]:
    """How a model is looked at that ``call`` runs: as it is used, and as it is trained.

    In training it gets its labels, and nothing is dropped. If what it draws besides decides its outputs, it is
    looked at in evaluation mode.
    """
    found = [_view(model, call)]
    labelled = with_labels(model, call)
    for other in (replace(labelled, training=True), labelled):
        if other is call:
            break
        try:
            view = _view(model, other)
        except NotRunnableError:
            continue
        if view.compared:
            found.append(view)
        if view.noise <= tolerance(_dtype(model)):
            break
    return tuple(found)


def _view(model: nn.Module, call: Call) -> View:
    first, second = run(model, call, seed=0), run(model, call, seed=1)
    noise = {path: difference(tensor, second.tensors[path]) for path, tensor in first.tensors.items()}
    compared = frozenset(path for path, changed in noise.items() if changed <= tolerance(_dtype(model)))
    return View(call, first, compared, noise[first.main])


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def fitting_axes(instance: Instance, model: nn.Module, axes: Mapping[str, ParamAxes]) -> dict[str, ParamAxes]:
    """The axes of a small instance's parameters, from those of the model that it is an instance of.

    Blocks (entries per unit) may be smaller than the large model's, and heads fewer. Where that doesn't fit, the
    instance is probed.
    """
    fitted = {}
    shared = key_value_heads(model)
    buffers = {name: buffer for name, buffer in saved_buffers(model).items() if name in axes}
    for name, param in (*model.named_parameters(), *buffers.items()):
        known = axes.get(name)
        if known is None or len(known.dims) != param.dim():
            raise NotRunnableError(f"{name} of the small instance isn't in the model that it stands for")
        dims = []
        for position, (dim, size) in enumerate(zip(known.dims, param.shape, strict=True)):
            fitting = _fitting(dim, size, instance, instance.moves.get((name, position)) if dim.parts else None)
            dims.append(fitting.mapped(lambda leaf: _regrouped(leaf, shared)))
        fitted[name] = replace(known, dims=tuple(dims))
    return fitted


def _fitting(dim: Dim, size: int, instance: Instance, move: Move | None) -> Dim:
    """A dimension of the large model as the small one has it: its blocks may be smaller, its segments fewer."""
    if move is not None:
        return _fitting_parts(dim, size, instance, move)
    if dim.axis is None:
        return dim
    width = instance.before[dim.axis]
    if dim.block > 1:
        return replace(dim, block=max(size // (dim.segments * width), 1))
    return replace(dim, segments=max(size // width, 1))


def _fitting_parts(dim: Dim, size: int, instance: Instance, move: Move) -> Dim:
    """The same of a dimension of parts, which moves as ``move`` says: parts that stay keep their ratio."""
    per_unit = dict(move.shares)
    large = {axis: sum(p.block * p.segments for p in dim.parts if p.axis == axis) * dim.segments for axis in dim.axes}
    axis = min(dim.axes)
    segments = max(dim.segments * per_unit.get(axis, 0) // large[axis], 1) if dim.segments > 1 else 1

    def fitting(leaf: Dim) -> Dim:
        now, before = per_unit.get(leaf.axis or "", 0) // segments, large[leaf.axis or ""] // dim.segments
        if leaf.block * now % before == 0:
            return replace(leaf, block=max(leaf.block * now // before, 1))
        return replace(leaf, segments=max(leaf.segments * now // before, 1))

    fitted = replace(dim, segments=segments).mapped(fitting)
    fixed = sum(part.fixed for part in dim.parts)
    left = size // segments - sum(part.size(instance.before[part.axis]) for part in fitted.parts if part.axis)
    return replace(
        fitted,
        parts=tuple(Dim(fixed=max(left * part.fixed // fixed, 1)) if part.fixed else part for part in fitted.parts),
    )


def _regrouped(leaf: Dim, shared: int | None) -> Dim:
    fixed = isinstance(leaf.groups, int) and leaf.groups > 1
    return replace(leaf, groups=shared) if fixed and shared is not None else leaf


def compare(runnable: Runnable, axes: Mapping[str, ParamAxes], strategy: Strategy) -> Comparison:
    """Grow a narrow model as ``strategy`` says, and run both.

    Raises:
        PlanError: if it can't grow so, or if the wide model can't run.
    """
    return compared(runnable, *grown(runnable, axes, strategy))


def compared(runnable: Runnable, plan: GrowthPlan, wide: nn.Module) -> Comparison:
    """A narrow model and the ``wide`` one that it has grown to, in the first view whose outputs differ.

    Raises:
        PlanError: if the wide model can't run.
    """
    narrow = runnable.model
    largest, chosen = 0.0, runnable.views[0]
    for view in runnable.views:
        found = difference_of(view, run_wide(runnable, wide, view), plan)
        chosen = view if largest <= tolerance(runnable.dtype) < found else chosen
        largest = max(largest, found)
    (seen, _), (seen_wide, _) = watch(narrow, chosen.call), watch(wide, chosen.call)
    what = "outputs in training" if chosen.call.training else "logits"
    return Comparison(
        plan=plan,
        changes=tuple(_changes(seen, seen_wide, plan)),
        difference=largest,
        narrow=narrow,
        wide=wide,
        what=what,
    )


def grown(runnable: Runnable, axes: Mapping[str, ParamAxes], strategy: Strategy) -> tuple[GrowthPlan, nn.Module]:
    """The plan of a narrow model's growth, and the wide model.

    Raises:
        PlanError: if it can't grow so.
    """
    instance, narrow = runnable.instance, runnable.model
    plan = plan_of(narrow, axes, instance.before, instance.after, strategy)
    wide = settled(instance.build(wide=True), runnable.dtype)
    grow_into(wide, narrow, plan)
    return plan, wide


def run_wide(runnable: Runnable, wide: nn.Module, view: View) -> Outputs:
    """What the wide model gives.

    Raises:
        PlanError: if it can't run.
    """
    try:
        return run(wide, view.call)
    except NotRunnableError as error:
        widths = {**runnable.instance.before, **runnable.instance.after}
        raise PlanError(
            f"the model runs at widths {runnable.instance.before}, but not at {widths}: {error}; does another width "
            "have to grow along?"
        ) from error


def difference_of(view: View, wide: Outputs, plan: GrowthPlan) -> float:
    """How far the outputs of a growth are off: of the logits, and of all that the growth leaves the shape of.

    If the growth makes new things to be told apart, as tokens are, all but the logits may depend on them.
    """
    narrow, grown_axes = view.outputs, {growth.axis for growth in plan.growths}
    off = [difference(narrow.logits, wide.logits)] if narrow.main in view.compared else []
    leaves = (leaf for param in plan.params for leaf in param.axes.leaves)
    if not any(leaf.role is Role.INDEX and leaf.axis in grown_axes for leaf in leaves):
        off += [
            difference(narrow.tensors[path], wide.tensors[path])
            for path in view.compared
            if path in wide.tensors and narrow.tensors[path].shape == wide.tensors[path].shape
        ]
    return max(off, default=0.0)


def difference_after(runnable: Runnable, axes: Mapping[str, ParamAxes]) -> float:
    """How far the outputs are off after copy-copy growth, as :func:`difference_of` measures it.

    Raises:
        PlanError: if it can't grow so, or if the wide model can't run.
    """
    plan, wide = grown(runnable, axes, Strategy())
    return max(difference_of(view, run_wide(runnable, wide, view), plan) for view in runnable.views)


def _changes(seen: list[Seen], seen_wide: list[Seen], plan: GrowthPlan) -> Iterator[Change]:
    expected = _expected_factors(plan)
    found = {entry.key: entry.value for entry in seen_wide}
    for entry in seen:
        factor = expected.get(entry.module, 1.0) if entry.side is Side.OUTPUT else 1.0
        wide = found.get(entry.key)
        if wide is not None:
            same = _holds_copies(entry.value * factor, wide)
            yield Change(
                module=entry.module,
                call=entry.call,
                side=entry.side,
                before=_rms(entry.value),
                after=_rms(wide),
                expected=factor,
                same=same,
            )


def _expected_factors(plan: GrowthPlan) -> dict[str, float]:
    """Modules whose output a growth scales on purpose.

    These are norms that take the factor of a head tied to the embedding, and what a model multiplies by a power of its
    own width.
    """
    scales = GrowthTables(plan).scales
    factors = {}
    for param in plan.params:
        for dim in param.axes.dims:
            if dim.axis in scales and param.axes.head_gain:
                factors[param.name.rpartition(".")[0]] = float(scales[dim.axis].weight(dim, True)[0])
            elif dim.axis in scales and dim.power:
                factors[param.name.rpartition(".")[0]] = scales[dim.axis].stretch ** -dim.power
    return factors


def _holds_copies(narrow: Tensor, wide: Tensor) -> bool:
    """Whether ``wide`` is ``narrow`` with every entry of the grown dimensions repeated equally often, in any order."""
    if narrow.dim() != wide.dim():
        return False
    grown = [i for i, (a, b) in enumerate(zip(narrow.shape, wide.shape, strict=True)) if a != b]
    if grown:
        kept = [i for i in range(narrow.dim()) if i not in grown]
        narrow, wide = (x.permute(*kept, *grown).flatten(len(kept)).sort(-1).values for x in (narrow, wide))
        copies, rest = divmod(wide.shape[-1], max(narrow.shape[-1], 1))
        if rest:
            return False
        narrow = narrow.repeat_interleave(copies, -1)
    if not narrow.numel():
        return True
    return float((narrow - wide).abs().max()) <= tolerance(narrow.dtype) * float(narrow.abs().max())


def _rms(value: Tensor) -> float:
    return float(value.double().square().mean().sqrt()) if value.numel() else 0.0
