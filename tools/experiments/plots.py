"""A plot per experiment: differences to the reference with their intervals, or curves over a quantity; and losses."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from ds_sparkling.figures import empty_figure, save_picture
from experiments.results import Table, VariantResult
from experiments.runs import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Inches of a line in the left half.
_LINE = 0.26
#: Curves that a legend can tell apart.
_LABELLED = 10


def draw(table: Table, path: Path) -> None:
    """Draw a table into a PNG.

    Raises:
        SparklingError: if matplotlib isn't installed or the file can't be written.
    """
    rows = [row for row in table.rows if row.finite and not row.variant.swept]
    curved = any(row.variant.x is not None for row in rows)
    figure = empty_figure(11, max(3.6, 1.4 + _LINE * len(rows)))
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    figure.suptitle(f"{table.experiment.title} ({table.experiment.source})")
    if curved:
        _lines(left, rows, table.experiment.xlabel)
    else:
        _dots(left, rows)
    if table.experiment.by_compute:
        _by_compute(right, rows)
    else:
        _by_step(right, rows)
    if 0 < len(right.get_lines()) <= _LABELLED and right.get_legend_handles_labels()[0]:
        right.legend(fontsize=7)
    right.grid(alpha=0.3)
    save_picture(figure, path)


#: How a model came to be, as the experiment "iso-compute" names it, and its marker.
_MARKERS = {
    "narrow, never grown": "o",
    "from scratch, same compute": "X",
    "from scratch, same tokens": "s",
    "function-preserving": "v",
    "SPARKLING": "D",
    "parting": "*",
}
#: How far apart points at the same compute are drawn, as a share of it.
_ASIDE = 0.006


def draw_overview(table: Table, path: Path) -> None:
    """Draw the experiment "iso-compute" as one point per model: what it cost, and how well it does, with intervals.

    Raises:
        SparklingError: as :func:`draw`.
    """
    figure = empty_figure(8, 4.5)
    axes = figure.add_subplot(xlabel="training compute, FLOPs", ylabel="validation loss, nats per byte")
    colours = {"inner": "C0", "hidden": "C1", "joint": "C2", "": "0.3"}
    for row in table.rows:
        axis, _, name = row.variant.name.rpartition(": ")
        compute = row.mean("flops")
        if name not in _MARKERS or row.loss is None or not row.finite or compute is None:
            continue
        size = 13 if name == "parting" else 8
        marker, half = _MARKERS[name], row.loss.half or 0.0
        # Beside each other where they cost the same.
        aside = 1 + _ASIDE * (list(_MARKERS).index(name) - len(_MARKERS) / 2)
        axes.errorbar(
            compute * aside, row.loss.mean, yerr=half, fmt=marker, color=colours[axis], markersize=size, capsize=2
        )
    for name, marker in _MARKERS.items():
        axes.plot([], [], marker, color="0.3", label=name)
    for axis in ("inner", "hidden", "joint"):
        axes.plot([], [], "-", color=colours[axis], linewidth=4, label=f"{axis} width doubled")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    save_picture(figure, path)


def _dots(axes: Axes, rows: list[VariantResult]) -> None:
    """The difference of every row to its reference; hollow where one seed gives no interval."""
    shown = [row for row in rows if row.difference is not None and math.isfinite(row.difference.mean)]
    for place, row in enumerate(shown):
        assert row.difference is not None
        half = row.difference.half
        fill = "none" if half is None else "C0"
        axes.errorbar(row.difference.mean, place, xerr=half, fmt="o", capsize=3, color="C0", markerfacecolor=fill)
    axes.set_yticks(range(len(shown)), [row.variant.name for row in shown], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="0.4", linewidth=0.8)
    axes.set_xlabel("final loss against the reference, nats per byte (lower is better)", fontsize=8)
    axes.grid(alpha=0.3, axis="x")


def _lines(axes: Axes, rows: list[VariantResult], xlabel: str) -> None:
    """The difference of every series to the reference, over what it varies; the reference itself is zero.

    Hollow where one seed gives no interval.
    """
    series: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for row in rows:
        if row.variant.x is None:
            continue
        if not row.variant.reference:
            series[row.variant.series].append((row.variant.x, 0.0, 0.0))
        elif row.difference is not None and math.isfinite(row.difference.mean):
            half = math.nan if row.difference.half is None else row.difference.half
            series[row.variant.series].append((row.variant.x, row.difference.mean, half))
    for number, (name, points) in enumerate(series.items()):
        points.sort()
        x, y, halves = ([point[place] for point in points] for place in range(3))
        colour = f"C{number}"
        axes.errorbar(x, y, yerr=halves, color=colour, capsize=3, label=name)
        for place, level, half in points:
            axes.plot(place, level, "o", color=colour, markerfacecolor="none" if math.isnan(half) else colour)
    values = [x for points in series.values() for x, _, _ in points]
    if values and min(values) > 0 and max(values) / min(values) > 10:
        axes.set_xscale("log")
    axes.axhline(0, color="0.4", linewidth=0.8)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("final loss against the reference", fontsize=8)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _by_compute(axes: Axes, rows: list[VariantResult]) -> None:
    """Validation loss over training compute, mean over seeds."""
    for row in rows:
        outcomes = [outcome for outcome in row.outcomes if outcome is not None]
        length = min(len(outcome.curve) for outcome in outcomes)
        x = [outcomes[0].curve[place].flops for place in range(length)]
        y = [statistics.fmean(outcome.curve[place].loss for outcome in outcomes) for place in range(length)]
        axes.plot(x, y, linewidth=1, label=row.variant.name)
    lowest = min((row.loss.mean for row in rows if row.loss is not None), default=None)
    if lowest is not None:
        axes.set_ylim(lowest * 0.97, lowest * 1.2)
    axes.set_xlabel("training compute, FLOPs", fontsize=8)
    axes.set_ylabel("validation loss", fontsize=8)


def _by_step(axes: Axes, rows: list[VariantResult]) -> None:
    """Difference of the validation loss to the reference's at the same step, mean over seeds."""
    named = {row.variant.name: row for row in rows}
    widest = 0.0
    for row in rows:
        reference = named.get(row.variant.reference)
        if reference is None or row.variant.run.steps != reference.variant.run.steps:
            continue
        both = [
            (mine, other)
            for mine, other in zip(row.outcomes, reference.outcomes, strict=False)
            if mine is not None and other is not None
        ]
        curves = [(_losses(mine), _losses(other)) for mine, other in both]
        steps = sorted(set.intersection(*(mine.keys() & other.keys() for mine, other in curves))) if curves else []
        if not steps:
            continue
        y = [statistics.fmean(mine[step] - other[step] for mine, other in curves) for step in steps]
        axes.plot(steps, y, linewidth=1, label=row.variant.name)
        widest = max(widest, abs(y[-1]))
    axes.axhline(0, color="0.4", linewidth=0.8)
    if widest:
        axes.set_ylim(-3 * widest, 3 * widest)
    axes.set_xlabel("optimizer step", fontsize=8)
    axes.set_ylabel("validation loss against the reference", fontsize=8)


def _losses(outcome: Outcome) -> dict[int, float]:
    """The curve by steps; at the growth, the loss after it."""
    return {point.step: point.loss for point in outcome.curve}
