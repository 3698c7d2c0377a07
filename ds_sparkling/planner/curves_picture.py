"""Learning rates over steps, drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ds_sparkling.figures import empty_picture
from ds_sparkling.planner.rate_curves import RateCurves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Points of a curve in the picture, at most.
_POINTS = 20_000


def picture(curves: RateCurves, title: str) -> Figure:
    """Rates over steps, with a vertical line at every growth; 800 x 400 pixels.

    Raises:
        SparklingError: if matplotlib isn't installed.
    """
    figure, axes = empty_picture(title, "optimizer step", "learning rate")
    # All steps up to a number far beyond the pixels, and every step where a curve turns.
    steps = np.union1d(np.linspace(0, curves.steps - 1, min(curves.steps, _POINTS), dtype=int), [*curves.landmarks()])
    old = "base schedule" if curves.together else "old elements (base schedule)"
    axes.plot(steps, curves.base[steps], label=old)
    for name, rates in curves.shown.items():
        axes.plot(steps, rates[steps], label=name if curves.together else f"new elements of {name}")
    for number in range(1, len(curves.births) + 1):
        _mark_growth(axes, curves, number)
    axes.set_xlim(0, curves.steps)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _mark_growth(axes: Axes, curves: RateCurves, number: int) -> None:
    """A vertical line at a growth, with its name beside it, away from the vertical axis."""
    step = curves.span(number).start
    left = step > curves.steps / 4
    axes.axvline(step, color="0.4", linestyle="--", linewidth=0.8)
    axes.annotate(
        f"growth {number}, step {step}",
        (step, 0.02),
        xycoords=("data", "axes fraction"),
        xytext=(-3 if left else 3, 0),
        textcoords="offset points",
        rotation=90,
        horizontalalignment="right" if left else "left",
        fontsize="small",
    )
