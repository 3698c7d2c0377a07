"""The share of compute saved as a function of the growth step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ds_sparkling.figures import empty_picture
from ds_sparkling.planner.compute import Recipe
from ds_sparkling.planner.planning_report import Planning

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_POINTS = 99


def picture(report: Planning) -> Figure:
    """Compute saved over the last growth's share of the tokens, one curve per recipe; 800 x 400 pixels.

    Earlier growths of a recipe stay where they are.

    Raises:
        SparklingError: if matplotlib isn't installed.
    """
    subject = report.subject
    figure, axes = empty_picture(
        f"Training compute saved, {subject.name}", "tokens before the last growth [%]", "compute saved [%]"
    )
    one = report.sweep[0]
    _curve(axes, Recipe("in one growth", one.active, one.shares))
    for recipe in (report.recipe, *report.others):
        if len(recipe.shares) > 1:
            first = ", ".join(f"{share:.0%}" for share in recipe.shares[:-1])
            _curve(axes, Recipe(f"{recipe.name} (first after {first})", recipe.active, recipe.shares))
    share, saved = 100 * report.recipe.shares[-1], 100 * report.recipe.saved
    axes.plot([share], [saved], "o", color="black", label=f"as planned: {saved:.1f}%")
    if subject.steps is not None:
        per_step = 100 / subject.steps
        top = axes.secondary_xaxis(
            "top", functions=(lambda x: np.asarray(x, float) / per_step, lambda x: np.asarray(x, float) * per_step)
        )
        top.set_xlabel("optimizer step")
    axes.set_xlim(0, 100)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def _curve(axes: Axes, recipe: Recipe) -> None:
    """Compute saved where the last growth moves from just after the one before it to the end."""
    earlier = recipe.shares[:-1]
    start = earlier[-1] if earlier else 0.0
    shares = start + (1.0 - start) * np.arange(1, _POINTS + 1) / (_POINTS + 1)
    saved = [100 * Recipe(recipe.name, recipe.active, (*earlier, float(share))).saved for share in shares]
    axes.plot(100 * shares, saved, label=recipe.name)
