"""Validation losses of one or several runs by tokens and by compute, drawn."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ds_sparkling.errors import SparklingError
from ds_sparkling.figures import empty_figure, save_picture
from ds_sparkling.job.variants import Variant
from ds_sparkling.spec.run_summary import RunSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Of Okabe and Ito's, which all eyes tell apart.
_COLOURS = {
    Variant.GROWN: "#0072B2",
    Variant.FROM_SCRATCH: "#D55E00",
    Variant.NEVER_GROWN: "#009E73",
    Variant.NARROW_LONGER: "#CC79A7",
}
#: Share of the way whose losses are left out, as they would press all others together.
_LEFT_OUT = 0.15


def draw_losses(runs: Mapping[Variant, RunSummary], path: Path) -> str:
    """Draw the runs into a PNG.

    Returns:
        Where the picture is, or what it takes to have it: one line for the run's last words.
    """
    try:
        save_picture(loss_picture(runs), path)
    except SparklingError as error:
        return f"no picture: {error}"
    return f"picture:    {path}"


def loss_picture(runs: Mapping[Variant, RunSummary]) -> Figure:
    """Two panels: validation loss over tokens, and over training compute; 1200 x 450 pixels.

    Raises:
        SparklingError: if matplotlib isn't installed.
    """
    figure = empty_figure(12, 4.5)
    by_tokens, by_compute = figure.subplots(1, 2, sharey=True)
    for axes, column, scale in ((by_tokens, 0, 1e6), (by_compute, 1, 1e12)):
        for variant, run in runs.items():
            points = np.array(run.validations, float).reshape(-1, 3)
            axes.plot(
                points[:, column] / scale,
                points[:, 2],
                color=_COLOURS[variant],
                marker="o",
                markersize=3,
                label=f"{variant.value}: {run.validation_loss:.4f}",
            )
            for before, after in _growths(points):
                _mark_growth(axes, before[column] / scale, before[2], after[2])
        axes.grid(alpha=0.25)
        axes.set_xlim(left=0)
    by_tokens.set(xlabel="tokens [M]", ylabel="validation loss", title="by tokens")
    by_compute.set(xlabel="training compute [TFLOPs]", title="by compute (6 x active parameters x tokens)")
    _look_at_the_end(by_tokens, runs)
    by_tokens.legend(title="at the end")
    return figure


def _growths(points: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The validations right before and right after each growth: no token lies between them."""
    at_once = [list(same) for _, same in itertools.groupby(points, key=lambda point: point[0])]
    return [(same[-2], same[-1]) for same in at_once if len(same) > 1]


def _mark_growth(axes: Axes, where: float, before: float, after: float) -> None:
    axes.axvline(where, color="0.4", linewidth=0.8, linestyle="--")
    axes.annotate(
        f"growth\nbefore {before:.4f}\nafter {after:.4f}",
        (where, after),
        xytext=(8, 24),
        textcoords="offset points",
        fontsize="small",
        arrowprops={"arrowstyle": "-", "color": "0.4", "linewidth": 0.8},
    )


def _look_at_the_end(axes: Axes, runs: Mapping[Variant, RunSummary]) -> None:
    """Leave out the losses of the beginning, if there are others."""
    late = [loss for run in runs.values() for tokens, _, loss in run.validations if tokens >= _LEFT_OUT * run.tokens]
    if late and max(late) > min(late):
        margin = 0.08 * (max(late) - min(late))
        axes.set_ylim(min(late) - margin, max(late) + margin)
