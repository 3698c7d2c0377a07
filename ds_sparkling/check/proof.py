"""The proof, before a growth, that growing keeps a model's function.

A model may scale something by its own width: an embedding by ``sqrt(hidden_size)``, attention by ``hidden_size /
heads``, logits by ``1 / hidden_size``. No rule for weights can see that, but twice the width with every unit copied
must give the same logits, whatever the model does. So that is tried, on a small instance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import nn

from ds_sparkling.axes import ParamAxes, Role
from ds_sparkling.check.comparison import Change, Comparison, Runnable, compare, first_runnable, fitting_axes, tolerance
from ds_sparkling.check.forward import Inputs, Side, difference_between_runs
from ds_sparkling.check.instance import instances
from ds_sparkling.errors import PlanError
from ds_sparkling.probe import BuildModel
from ds_sparkling.probe.moves import HEADS
from ds_sparkling.probe.roles import makes_queries
from ds_sparkling.strategy import Scaling, Strategy


@dataclass(frozen=True)
class Proof:
    """What is known of a model's function under growth.

    Attributes:
        difference: of the logits after doubling every axis, relative; None if nothing is known.
        reason: why nothing is known ("not provable: ..."); empty if the function is kept.
    """

    difference: float | None
    reason: str = ""

    def __bool__(self) -> bool:
        return not self.reason


def prove_function(
    build_model: BuildModel,
    axes: Mapping[str, ParamAxes],
    widths: Mapping[str, int],
    after: Mapping[str, int],
    strategy: Strategy | None = None,
    inputs: Inputs | None = None,
) -> Proof:
    """Show that copying the units of the axes in ``after`` keeps the function of ``build_model``'s model.

    A small instance, with parameters that all matter, is doubled along these axes by copy-copy growth with the given
    ``axes``, and its logits are compared. If ``strategy`` is to keep the function at every ratio, it is also grown as
    that says. Takes about a second on the CPU, and leaves the random state as it is.

    Args:
        build_model: builds the model from its widths.
        axes: what each parameter's dimensions are.
        widths: the widths in force.
        after: the axes that will grow, and their new widths.
        strategy: how they will.
        inputs: of the model's forward; random token ids by default.

    Returns:
        A proof, or why there is none: the model can't be made small, or its forward can't be called.

    Raises:
        PlanError: if the function changes; names the first module that takes or gives something else.
    """
    growths = [({axis: 2 * widths[axis] for axis in after}, Strategy())]
    if strategy is not None and strategy.scaling is Scaling.FUNCTION:
        growths.append((dict(after), strategy))
    difference = 0.0
    for wide, how in growths:
        try:
            small = instances(build_model, widths, wide, keep_vocabulary=inputs is not None)
            runnable = first_runnable(small, inputs, torch.float64, seed=0)
        except PlanError as error:
            return Proof(None, f"not provable: {error}")
        fitted = fitting_axes(runnable.instance, runnable.model, axes)
        comparison = compare(runnable, fitted, how)
        if not comparison.same:
            noise = difference_between_runs(runnable.model, runnable.call)
            if noise > tolerance(runnable.dtype):
                return Proof(None, f"not provable: logits differ between two runs, by {noise:.2g} of the largest")
            raise PlanError(_refutation(*_one_axis(runnable, fitted, comparison, how), how))
        difference = max(difference, comparison.difference)
    return Proof(difference)


def refute(runnable: Runnable, axes: Mapping[str, ParamAxes]) -> str | None:
    """What is wrong with copy-copy growth of a runnable model at integer ratios; None if it keeps the function."""
    comparison = compare(runnable, axes, Strategy())
    if comparison.same:
        return None
    return _refutation(*_one_axis(runnable, axes, comparison, Strategy()), Strategy())


def _one_axis(
    runnable: Runnable, axes: Mapping[str, ParamAxes], joint: Comparison, how: Strategy
) -> tuple[list[str], Comparison]:
    """The first axis that changes the function when it grows alone; all of them if none does."""
    after = runnable.instance.after
    for axis in after if len(after) > 1 else ():
        alone = replace(runnable, instance=replace(runnable.instance, after={axis: after[axis]}))
        try:
            comparison = compare(alone, axes, how)
        except PlanError:  # an axis that only grows together with another
            continue
        if not comparison.same:
            return [axis], comparison
    return list(after), joint


def _refutation(axes: list[str], comparison: Comparison, how: Strategy) -> str:
    """What to say of a growth that should have kept the function."""
    grown = " and ".join(axes)
    promised = f"scaling 'function' and init {how.pair}" if how.scaling is Scaling.FUNCTION else "every unit copied"
    head = (
        f"growing {grown} would change the model's function: with {promised}, logits differ by "
        f"{comparison.difference:.2g} of the largest. "
    )
    advice = (
        f"Something may be scaled by {grown} itself, or by what follows from it (an embedding or logit multiplier, an "
        "attention scale, a size of heads), or a parameter may be laid out otherwise than its axes say. Set such a "
        f"scale from the starting widths, correct the axes, or leave {grown} as it is"
    )
    return head + _where(comparison) + _heads_advice(comparison) + advice


def _heads_advice(comparison: Comparison) -> str:
    """What to do if queries are as wide as an axis that grows, and are split into as many heads as before."""
    plan = comparison.plan
    growths = {growth.axis: growth for growth in plan.growths}
    if growths.keys() & set(HEADS):
        return ""
    for param in plan.params:
        grown = [leaf.axis for leaf in param.axes.leaves if leaf.role is Role.FAN_OUT and leaf.axis in growths]
        if not grown or not makes_queries(param.name):
            continue
        growth = growths[grown[0] or ""]
        heads = _heads_of(comparison.narrow, param.name)
        if heads != _heads_of(comparison.wide, param.name):
            return ""
        ratio = Fraction(growth.after, growth.before)
        wanted = f", {heads[0]} {heads[1]} to {heads[1] * ratio}" if heads is not None else ""
        return (
            f"{param.name} makes queries as wide as {growth.axis}: if heads stay as many, each gets larger, which "
            "attention scales by and positions hang on; grow the number of heads in the same stage by the same ratio"
            f"{wanted}, or let build_model have it follow. "
        )
    return ""


def _heads_of(model: nn.Module, name: str) -> tuple[str, int] | None:
    """What the number of heads is called, and how many there are, by the config or the modules around a parameter."""
    path = name.split(".")
    around = [model.get_submodule(".".join(path[:depth])) for depth in range(len(path) - 1, -1, -1)]
    for holder in (*around, getattr(model, "config", None)):
        for called in (*HEADS, "heads"):
            if isinstance(count := getattr(holder, called, None), int):
                return called, count
    return None


def _where(comparison: Comparison) -> str:
    latest = None
    for change in comparison.changes:
        if not change.same:
            return _described(change, latest, comparison)
        latest = change
    after = f" after {_named(latest)}" if latest is not None else ""
    return f"All its modules give the same, so it is in what {type(comparison.narrow).__name__} does{after}. "


def _described(change: Change, latest: Change | None, comparison: Comparison) -> str:
    kind = type(comparison.narrow.get_submodule(change.module)).__name__
    rms = f"RMS {change.before:.4g} -> {change.after:.4g}"
    if change.side is Side.OUTPUT:
        return f"The first module to give something else is {change.module} ({kind}): {rms}. "
    since = f", computed since {_named(latest)}" if latest is not None else ""
    return f"The first to differ is the input of {change.module} ({kind}){since}: {rms}. "


def _named(change: Change) -> str:
    return f"the {change.side.value} of {change.module}"
