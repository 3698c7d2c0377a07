"""The proof, before a growth, that growing keeps a model's function.

A model may scale something by its own width: an embedding by ``sqrt(hidden_size)``, attention by ``hidden_size /
heads``, logits by ``1 / hidden_size``. No rule for weights can see that, but twice the width with every unit copied
must give the same logits, whatever the model does. So that is tried, on a small instance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import nn

from ds_sparkling.discovery.build import BuildModel
from ds_sparkling.discovery.comparison import Change, Comparison
from ds_sparkling.discovery.forward import Inputs, NotRunnableError, Side
from ds_sparkling.discovery.functional_heads import functional_head
from ds_sparkling.discovery.moves import HEADS
from ds_sparkling.discovery.patience import Patience
from ds_sparkling.discovery.roles import makes_queries
from ds_sparkling.discovery.trial import Trial, TrialGrowth, trials_of
from ds_sparkling.errors import PlanError
from ds_sparkling.spec.axes import ParamAxes, Role
from ds_sparkling.spec.strategy import Strategy

#: Readings that failed late and are looked at module by module, to tell which one got furthest.
_LOOKED_AT = 48


@dataclass(frozen=True)
class Proof:
    """What is known of a model's function under growth.

    Attributes:
        difference: of the outputs after every growth that was tried, relative; None if nothing is known.
        reason: why nothing is known ("not provable: ..."); empty if the function is kept.
    """

    difference: float | None
    reason: str = ""

    def __bool__(self) -> bool:
        return not self.reason

    @property
    def doubt(self) -> str:
        """What to warn of; empty if growing keeps the function."""
        return "" if self else f"whether growing keeps the model's function is not known: {self.reason}"


def prove_function(
    build_model: BuildModel,
    axes: Mapping[str, ParamAxes],
    widths: Mapping[str, int],
    after: Mapping[str, int],
    strategy: Strategy | None = None,
    inputs: Inputs | None = None,
) -> Proof:
    """Show that growing the axes in ``after`` keeps the function of ``build_model``'s model.

    A small instance, with parameters that all matter, is grown along these axes with the given ``axes``: doubled, with
    twins that share their consumers evenly and unevenly, and as ``strategy`` says if that is to keep the function. What
    it gives is compared, in use and in training. Takes about a second on the CPU, and leaves the random state as it is.

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
    growth = TrialGrowth(widths, tuple(after), after if strategy is not None else None, strategy or Strategy())
    return prove_growth(build_model, axes, growth, inputs)


def prove_growth(
    build_model: BuildModel, axes: Mapping[str, ParamAxes], growth: TrialGrowth, inputs: Inputs | None
) -> Proof:
    """Show that a growth keeps the function, as :func:`prove_function` does.

    Args:
        build_model: builds the model from its widths.
        axes: what each parameter's dimensions are.
        growth: the growth.
        inputs: of the model's forward; random token ids if None.

    Returns:
        A proof, or why there is none.

    Raises:
        PlanError: as :func:`prove_function`.
    """
    patience = Patience()
    try:
        trials = trials_of(build_model, growth, axes, inputs, patience)
        worst = kept((*trials.copies, *trials.planned), axes, patience)
    except NotRunnableError as error:
        return Proof(None, f"not provable: {error}")
    return Proof(None, f"not provable: {trials.doubt}") if trials.doubt else Proof(worst)


def kept(trials: Sequence[Trial], axes: Mapping[str, ParamAxes], patience: Patience) -> float:
    """How far outputs are off, at most, in trials that all keep the function.

    Args:
        trials: the trials.
        axes: what each parameter's dimensions are.
        patience: how long trying may take.

    Returns:
        The largest relative difference.

    Raises:
        PlanError: if one doesn't; names the first module that takes or gives something else.
    """
    worst = 0.0
    for trial in trials:
        patience.spend(f"growing {' and '.join(trial.after)}")
        difference = trial.difference(axes)
        if difference > trial.tolerance:
            raise refuted(trial, axes)
        worst = max(worst, difference)
    return worst


@dataclass(frozen=True, eq=False)
class Attempt:
    """One reading of a model, and how far it got.

    Attributes:
        axes: the reading.
        passed: how many trials it passed before the first that it failed.
        difference: how far the outputs were off, at most.
        error: why it couldn't be grown, if it couldn't.
    """

    axes: Mapping[str, ParamAxes]
    passed: int
    difference: float = 0.0
    error: PlanError | None = None


class RefutedError(PlanError):
    """Growing would change the model's function; ``axes`` are those of the reading that got furthest."""

    def __init__(self, message: str, axes: Mapping[str, ParamAxes]) -> None:
        super().__init__(message)
        self.axes = dict(axes)


def refutation(trials: Sequence[Trial], attempts: Sequence[Attempt], patience: Patience) -> PlanError:
    """What to say where no reading passes all trials: that of the one that got furthest.

    Furthest is who failed the latest trial, and in that the latest module. Where several did, it says what they differ
    in.
    """
    grown = [attempt for attempt in attempts if attempt.error is None]
    if not grown:
        assert attempts[0].error is not None
        return attempts[0].error
    latest = max(attempt.passed for attempt in grown)
    trial = trials[latest]
    reached: dict[int, list[Attempt]] = {}
    for attempt in [attempt for attempt in grown if attempt.passed == latest][:_LOOKED_AT]:
        patience.spend("looking for what doesn't keep the function")
        changes = trial.comparison(attempt.axes).changes
        same = next((number for number, change in enumerate(changes) if not change.same), len(changes))
        reached.setdefault(same, []).append(attempt)
    furthest = reached[max(reached)]
    return refuted(trial, furthest[0].axes, _differing(furthest))


def refuted(trial: Trial, axes: Mapping[str, ParamAxes], note: str = "") -> RefutedError:
    """What to say of a growth that should have kept the function."""
    blamed, comparison = _one_axis(trial, axes)
    model = trial.subject.runnable.model
    tied = functional_head(model, trial.subject.runnable.call, [n for n, a in axes.items() if a.axes & set(blamed)])
    return RefutedError(_refutation(blamed, comparison, trial) + note + tied, axes)


def _differing(attempts: Sequence[Attempt]) -> str:
    """Which parameters are read in different ways by those that got equally far."""
    first = attempts[0].axes
    names = [name for name in first if any(attempt.axes[name] != first[name] for attempt in attempts)]
    if not names:
        return ""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f". Of {len(attempts)} readings that get as far, which differ in {shown}, this is the likeliest"


def _one_axis(trial: Trial, axes: Mapping[str, ParamAxes]) -> tuple[list[str], Comparison]:
    """The first axis that changes the function when it grows alone; all of them if none does."""
    for axis, width in trial.after.items() if len(trial.after) > 1 else ():
        try:
            comparison = trial.comparison(axes, {axis: width})
        except PlanError:  # an axis that only grows together with another
            continue
        if not comparison.same:
            return [axis], comparison
    return list(trial.after), trial.comparison(axes)


def _refutation(axes: list[str], comparison: Comparison, trial: Trial) -> str:
    grown = " and ".join(axes)
    head = (
        f"growing {grown} would change the model's function: with {trial.words}, {comparison.what} differ by "
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
    differing = next((change for change in comparison.changes if not change.same), None)
    if growths.keys() & set(HEADS) or differing is None or differing.side is Side.OUTPUT:
        return ""
    for param in plan.params:
        grown = [leaf.axis for leaf in param.axes.leaves if leaf.role is Role.FAN_OUT and leaf.axis in growths]
        attention = "".join(f"{part}." for part in param.name.split(".")[:-2])
        if not grown or not makes_queries(param.name) or not differing.module.startswith(attention):
            continue
        growth = growths[grown[0] or ""]
        heads = _heads_of(comparison.narrow, param.name)
        if heads != _heads_of(comparison.wide, param.name):
            return ""
        ratio = Fraction(growth.after, growth.before)
        wanted = f", {heads[0]} {heads[1]} to {heads[1] * ratio}" if heads is not None else ""
        return (
            f"{param.name} makes queries as wide as {growth.axis}: if heads stay as many, each gets larger, which "
            "attention scales by and positions hang on; grow the number of heads in the same growth by the same ratio"
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
