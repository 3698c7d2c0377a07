"""Trials: ways to grow a small instance that must keep its function, whatever it computes.

Copies at whole ratios do, and what else the planned strategy promises. Two readings of a model can look alike under
one such growth: with every axis doubled, (fan-out of one, fan-in of another) has the same factor as the reverse. So the
axes also grow by unequal ratios, and with consumers that twins share unevenly, which no other reading keeps.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ds_sparkling.discovery.build import BuildModel
from ds_sparkling.discovery.comparison import (
    Comparison,
    Runnable,
    compared,
    difference_of,
    first_runnable,
    fitting_axes,
    reseeded,
    run_wide,
    tolerance,
)
from ds_sparkling.discovery.forward import Inputs, NotRunnableError, leads_to_outputs
from ds_sparkling.discovery.patience import Patience
from ds_sparkling.discovery.plain_growth import grow_into, plan_of, settled
from ds_sparkling.discovery.small_instance import instances
from ds_sparkling.discovery.token_selection import selects
from ds_sparkling.errors import PlanError
from ds_sparkling.growth import GrowthPlan
from ds_sparkling.growth.plan import ParamPlan, axis_growths
from ds_sparkling.growth.scaling import AxisGrowth, keeps_function, whole_ratios
from ds_sparkling.spec.axes import ParamAxes, Role
from ds_sparkling.spec.record import growth_in_words
from ds_sparkling.spec.strategy import Split, Strategy

#: Copies whose consumers' weights are shared at random.
_UNEVEN = Strategy(split=Split(None))
#: What it is called where copies don't keep the function.
_COPIED, _SHARED = "every unit copied", "twins that share their consumers unevenly"
#: Ratios that no two axes need to share.
_RATIOS = (2, 3)
#: Sets of unequal ratios that are looked at, at most.
_SETS = 12
#: Further parameters and tokens that a growth is tried with; more where what counts is which tokens are selected.
_SEEDS, _SEEDS_SELECTING = (1,), (1, 2, 3)


@dataclass(frozen=True)
class TrialGrowth:
    """A growth that has to keep a model's function.

    Attributes:
        widths: those in force, of all axes.
        axes: those that grow together.
        after: what to; None if that isn't known.
        strategy: how.
    """

    widths: Mapping[str, int]
    axes: Sequence[str]
    after: Mapping[str, int] | None = None
    strategy: Strategy = field(default_factory=Strategy)

    @property
    def words(self) -> str:
        """What grows, in words."""
        after = self.after or {}
        return growth_in_words(self.widths, {axis: after.get(axis, "wider") for axis in self.axes})


class Wide:
    """A wide model that is filled anew for each reading; what two readings share is left as it is."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._filled: dict[str, tuple[int, tuple[AxisGrowth, ...], Strategy, ParamPlan]] = {}

    def fill(self, narrow: nn.Module, plan: GrowthPlan) -> None:
        """Make it the growth of ``narrow``.

        Raises:
            PlanError: if the plan's shapes aren't the model's.
        """
        wanted = {
            param.name: (id(narrow), plan.growths, plan.strategy, param) for param in (*plan.params, *plan.buffers)
        }
        stale = {name for name, key in wanted.items() if self._filled.get(name) != key}
        self._filled = {name: key for name, key in self._filled.items() if name not in stale}
        grow_into(self.model, narrow, plan, stale.__contains__)
        self._filled = wanted


class TrialModel:
    """A narrow model that runs, what it gives, and the wide models made of it."""

    def __init__(self, runnable: Runnable, wides: dict[tuple[tuple[str, int], ...], Wide] | None = None) -> None:
        self.runnable = runnable
        self.wides: dict[tuple[tuple[str, int], ...], Wide] = {} if wides is None else wides

    def difference(self, after: Mapping[str, int], axes: Mapping[str, ParamAxes], strategy: Strategy) -> float:
        """How far the outputs are off after a growth, at least: further views aren't looked at once one is off.

        Raises:
            PlanError: if it can't grow so, or if the wide model can't run.
        """
        runnable, plan, wide = self._grown(after, axes, strategy)
        worst = 0.0
        for view in runnable.views:
            worst = max(worst, difference_of(view, run_wide(runnable, wide, view), plan))
            if worst > tolerance(runnable.dtype):
                break
        return worst

    def comparison(self, after: Mapping[str, int], axes: Mapping[str, ParamAxes], strategy: Strategy) -> Comparison:
        """The same, module by module.

        Raises:
            PlanError: as :meth:`difference`.
        """
        return compared(*self._grown(after, axes, strategy))

    def _grown(
        self, after: Mapping[str, int], axes: Mapping[str, ParamAxes], strategy: Strategy
    ) -> tuple[Runnable, GrowthPlan, nn.Module]:
        plan, wide = self._plan(after, axes, strategy), self._wide(after)
        wide.fill(self.runnable.model, plan)
        return self._grown_to(after), plan, wide.model

    def fits(self, after: Mapping[str, int], axes: Mapping[str, ParamAxes]) -> bool:
        """Whether copies grow to these widths, and a wide model can be built that has these shapes, and runs."""
        grown = self._grown_to(after)
        try:
            plan = self._plan(after, axes, Strategy())
            wide = grown.instance.build(wide=True, meta=True)
            shapes = {name: tuple(param.shape) for name, param in wide.named_parameters()}
            if shapes != {param.name: param.after for param in plan.params} or not whole_ratios(plan.growths):
                return False
            run_wide(grown, self._wide(after).model, self.runnable.views[0])
        except PlanError:
            return False
        return True

    def uses(self, names: Collection[str]) -> bool:
        """Whether any of some parameters has a part in what is compared, if only one of no consequence."""
        found = dict(self.runnable.model.named_parameters())
        params = [found[name] for name in names if name in found]
        return any(
            leads_to_outputs(self.runnable.model, view.call, view.compared, params) for view in self.runnable.views
        )

    def _grown_to(self, after: Mapping[str, int]) -> Runnable:
        """The narrow model with other widths to grow to."""
        return replace(self.runnable, instance=replace(self.runnable.instance, after=dict(after)))

    def _wide(self, after: Mapping[str, int]) -> Wide:
        key = tuple(sorted(after.items()))
        if key not in self.wides:
            wide = self._grown_to(after).instance.build(wide=True)
            self.wides[key] = Wide(settled(wide, self.runnable.dtype))
        return self.wides[key]

    def _plan(self, after: Mapping[str, int], axes: Mapping[str, ParamAxes], strategy: Strategy) -> GrowthPlan:
        instance, narrow = self.runnable.instance, self.runnable.model
        return plan_of(narrow, fitting_axes(instance, narrow, axes), instance.before, after, strategy)


@dataclass(frozen=True, eq=False)
class Trial:
    """One way to grow a subject that must keep its function.

    Attributes:
        after: what its axes grow to.
        strategy: how.
        words: both in words, behind "with".
    """

    subject: TrialModel
    after: dict[str, int]
    strategy: Strategy
    words: str

    @property
    def tolerance(self) -> float:
        return tolerance(self.subject.runnable.dtype)

    def difference(self, axes: Mapping[str, ParamAxes]) -> float:
        """How far the outputs are off.

        Raises:
            PlanError: if it can't grow so, or if the wide model can't run.
        """
        return self.subject.difference(self.after, axes, self.strategy)

    def comparison(self, axes: Mapping[str, ParamAxes], after: Mapping[str, int] | None = None) -> Comparison:
        """The same, module by module; of some of the axes alone, if ``after`` has only those.

        Raises:
            PlanError: as :meth:`difference`.
        """
        return self.subject.comparison(self.after if after is None else after, axes, self.strategy)


@dataclass(frozen=True, eq=False)
class Trials:
    """What a growth is tried by.

    Attributes:
        copies: copies with every axis doubled, those first that cost least and tell most.
        unequal: copies at unequal ratios. They keep the function, too, unless one axis has to follow another, as heads
            do that are cut from the hidden width: where no reading keeps it, they tell nothing.
        planned: the growth as it is planned, if that is to keep the function.
        doubt: why it isn't tried although it is; else empty.
    """

    copies: tuple[Trial, ...]
    unequal: tuple[Trial, ...] = ()
    planned: tuple[Trial, ...] = ()
    doubt: str = ""


def trials_of(
    build_model: BuildModel,
    growth: TrialGrowth,
    likeliest: Mapping[str, ParamAxes],
    inputs: Inputs | None,
    patience: Patience,
) -> Trials:
    """What a growth is tried by.

    Args:
        likeliest: some axes of the model; only the shapes that they tell matter here.

    Raises:
        NotRunnableError: if no small instance of the model can be run, or what it computes differs between two runs.
    """
    subject = _subject(build_model, growth.widths, _times(growth.widths, growth.axes, 2), inputs, patience)
    copies = tuple(_copies(subject, growth, likeliest, inputs))
    unequal = tuple(_unequal(subject, growth, likeliest, patience))
    try:
        return Trials(copies, unequal, _planned(build_model, growth, likeliest, subject, inputs, patience))
    except NotRunnableError as error:
        return Trials(copies, unequal, doubt=str(error))


def _copies(
    subject: TrialModel, growth: TrialGrowth, likeliest: Mapping[str, ParamAxes], inputs: Inputs | None
) -> Iterator[Trial]:
    before = subject.runnable.instance.before
    twice = _times(before, growth.axes, 2)
    counted = _times(before, _counted(growth, likeliest), 2)
    if counted.keys() != twice.keys() and subject.fits(counted, likeliest):
        # New tokens, say, change the loss; so the other axes are looked at by themselves, too.
        yield Trial(subject, counted, Strategy(), _COPIED)
    yield Trial(subject, twice, Strategy(), _COPIED)
    yield Trial(subject, twice, _UNEVEN, _SHARED)
    for seed in _SEEDS_SELECTING if selects(subject.runnable.model) else _SEEDS:
        other = TrialModel(reseeded(subject.runnable, inputs, seed), subject.wides)
        yield Trial(other, twice, _UNEVEN, f"{_SHARED}, and other parameters and tokens")


def _subject(
    build_model: BuildModel,
    widths: Mapping[str, int],
    after: Mapping[str, int],
    inputs: Inputs | None,
    patience: Patience,
) -> TrialModel:
    patience.spend("making the model small")
    try:
        small = instances(build_model, widths, after, keep_vocabulary=inputs is not None)
        runnable = first_runnable(small, inputs, torch.float64, seed=0)
    except PlanError as error:
        raise NotRunnableError(str(error)) from error
    noise = runnable.views[0].noise
    if noise > tolerance(runnable.dtype):
        raise NotRunnableError(f"the model's logits differ between two runs, by {noise:.2g} of the largest")
    return TrialModel(runnable)


def _planned(
    build_model: BuildModel,
    growth: TrialGrowth,
    likeliest: Mapping[str, ParamAxes],
    subject: TrialModel,
    inputs: Inputs | None,
    patience: Patience,
) -> tuple[Trial, ...]:
    """The growth as it is planned, if its strategy promises to keep the function.

    Raises:
        NotRunnableError: if no small instance can be run that grows by these ratios.
    """
    after = growth.after
    if after is None or not keeps_function(
        growth.strategy, whole_ratios(axis_growths(likeliest, growth.widths, after))
    ):
        return ()
    try:
        instance = next(instances(build_model, growth.widths, after, keep_vocabulary=inputs is not None))
    except PlanError as error:
        raise NotRunnableError(str(error)) from error
    known = subject.runnable.instance
    if (instance.build_model, instance.before, instance.layers) != (known.build_model, known.before, known.layers):
        subject = _subject(build_model, growth.widths, after, inputs, patience)
        instance = subject.runnable.instance
    how = f"scaling {growth.strategy.scaling.value!r} and init {growth.strategy.units_meaning}"
    return (Trial(subject, dict(instance.after), growth.strategy, f"{how}, as planned"),)


def _counted(growth: TrialGrowth, axes: Mapping[str, ParamAxes]) -> list[str]:
    """The axes of a growth that don't count what is looked up or told apart, as tokens are; all if none is left."""
    indices = {leaf.axis for param in axes.values() for leaf in param.leaves if leaf.role is Role.INDEX}
    return [axis for axis in growth.axes if axis not in indices] or list(growth.axes)


def _unequal(
    subject: TrialModel, growth: TrialGrowth, likeliest: Mapping[str, ParamAxes], patience: Patience
) -> Iterator[Trial]:
    """Trials in which every two axes that can grow by different ratios do so once."""
    before, axes = subject.runnable.instance.before, _counted(growth, likeliest)
    choices = [choice for choice in itertools.product(_RATIOS, repeat=len(axes)) if len(set(choice)) > 1]
    choices.sort(key=lambda choice: abs(2 * choice.count(_RATIOS[0]) - len(choice)))
    apart: set[frozenset[str]] = set()
    for choice in choices[:_SETS]:
        ratios = dict(zip(axes, choice, strict=True))
        pairs = {frozenset(pair) for pair in itertools.combinations(axes, 2) if ratios[pair[0]] != ratios[pair[1]]}
        if pairs <= apart:
            continue
        patience.spend(f"looking for ratios of {', '.join(axes)}")
        after = {axis: ratio * before[axis] for axis, ratio in ratios.items()}
        if subject.fits(after, likeliest):
            apart |= pairs
            words = " and ".join(f"{ratio} times {axis}" for axis, ratio in ratios.items())
            yield Trial(subject, after, _UNEVEN, f"{words}, and {_SHARED}")


def _times(widths: Mapping[str, int], axes: Collection[str], ratio: int) -> dict[str, int]:
    return {axis: ratio * widths[axis] for axis in axes}
