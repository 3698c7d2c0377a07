"""Ways to the same wide model: in one growth or in two, by the compute they save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ds_sparkling.errors import ConfigError
from ds_sparkling.planner.compute import Recipe
from ds_sparkling.planner.model import Model
from ds_sparkling.planner.subject import PlannedRun


@dataclass(frozen=True)
class TwoStepSplit:
    """A growth in two steps, by the widths between them."""

    name: str
    between: dict[str, int]


def planned(subject: PlannedRun) -> Recipe:
    """The run as it is planned."""
    widths = [subject.model.widths, *(growth.widths for growth in subject.growths)]
    return _recipe("as planned", subject.model, widths, [growth.share for growth in subject.growths])


def alternatives(subject: PlannedRun, shares: tuple[float, float]) -> list[Recipe]:
    """What to compare the planned run with.

    Several growths are compared with all of it at once, at the share of each. One growth is compared with its splits.

    Args:
        shares: of the tokens at the two growths of a split.

    Raises:
        ConfigError: if they aren't two shares in order.
    """
    first, last = subject.model.widths, subject.growths[-1].widths
    if len(subject.growths) > 1:
        return [_recipe("all at once", subject.model, [first, last], [growth.share]) for growth in subject.growths]
    if not 0 < shares[0] < shares[1] < 1:
        raise ConfigError(f"--two-stage takes two shares of the tokens in order, between 0 and 1; got {shares}")
    return [
        _recipe(split.name, subject.model, [first, {**first, **split.between}, last], shares)
        for split in splits(first, last)
    ]


def splits(before: Mapping[str, int], after: Mapping[str, int]) -> list[TwoStepSplit]:
    """Every way to divide a growth that the paper's recipes have: one axis before the rest, or 2x and then the rest."""
    grown = [axis for axis, width in after.items() if width != before[axis]]
    found = [
        TwoStepSplit(f"{axis}, then {_rest(grown, axis)}", {axis: after[axis]}) for axis in grown if len(grown) > 1
    ]
    doubled = {axis: 2 * before[axis] for axis in grown if after[axis] >= 4 * before[axis]}
    if doubled:
        found.append(TwoStepSplit(f"{' and '.join(doubled)} 2x, then the rest", doubled))
    return found


def equal_share(recipe: Recipe) -> float:
    """Share of the tokens at which one growth from the first to the last model saves as much as ``recipe``."""
    return recipe.saved / (1.0 - recipe.active[0] / recipe.active[-1])


def _recipe(name: str, model: Model, widths: Sequence[Mapping[str, int]], shares: Sequence[float]) -> Recipe:
    return Recipe(name, tuple(model.active(at) for at in widths), tuple(shares))


def _rest(axes: Sequence[str], first: str) -> str:
    return " and ".join(axis for axis in axes if axis != first)
