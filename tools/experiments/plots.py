"""A plot per experiment: differences to the reference with their intervals, or curves over a quantity; and losses.

Differences are paired by seed, and so are their intervals of 95%: the spread of seeds that both have is taken out.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ds_sparkling.figures import empty_figure, save_picture
from experiments.results import Estimate, Table, VariantResult
from experiments.runs import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Inches of a line in the left half.
_LINE = 0.26
#: Dashes of every ten curves, whose colours repeat.
_DASHES = ("-", "--", ":", "-.")
#: What stands for a number: filled with an interval, hollow where one seed gives none.
_INTERVAL = "paired difference, 95% interval"


def draw(table: Table, path: Path) -> None:
    """Draw a table into a PNG.

    Raises:
        SparklingError: if matplotlib isn't installed or the file can't be written.
    """
    save_picture(figure_of(table), path)


def figure_of(table: Table) -> Figure:
    """A table's picture: differences on the left; on the right how losses came to them.

    Raises:
        SparklingError: if matplotlib isn't installed.
    """
    rows = [row for row in table.rows if row.finite and not row.variant.swept]
    curved = any(row.variant.x is not None for row in rows)
    figure = empty_figure(14, max(3.6, 1.8 + _LINE * len(rows)))
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
    handles, names = right.get_legend_handles_labels()
    if handles:  # beside the panel, where any number of curves has room
        right.legend(handles, names, fontsize=6, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)
    right.grid(alpha=0.3)
    return figure


#: How a model came to be, as the experiment "iso-compute" names it, and its marker.
_MARKERS = {
    "narrow, never grown": "o",
    "narrow, same compute": "P",
    "from scratch, same compute": "X",
    "from scratch, same tokens": "s",
    "function-preserving": "v",
    "SPARKLING": "D",
    "parting": "*",
}
#: How far apart points at the same compute are drawn, as a share of it.
_ASIDE = 0.006


def draw_overview(table: Table, path: Path) -> None:
    """Draw the experiment "iso-compute" as one point per model: what it cost, and how well it does.

    Models are compared with SPARKLING on the same axis, seed by seed, so that the intervals are those of these paired
    differences; SPARKLING, the reference, has none.

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
        marker, half = _MARKERS[name], (row.difference.half or 0.0) if row.difference else 0.0
        # Beside each other where they cost the same.
        aside = 1 + _ASIDE * (list(_MARKERS).index(name) - len(_MARKERS) / 2)
        axes.errorbar(
            compute * aside, row.loss.mean, yerr=half, fmt=marker, color=colours[axis], markersize=size, capsize=2
        )
    for name, marker in _MARKERS.items():
        axes.plot([], [], marker, color="0.3", label=name)
    for axis in ("inner", "hidden", "joint"):
        axes.plot([], [], "-", color=colours[axis], linewidth=4, label=f"{axis} width doubled")
    axes.legend(fontsize=8, title="bars: 95% of the difference to SPARKLING, paired by seed", title_fontsize=7)
    axes.grid(alpha=0.3)
    save_picture(figure, path)


def _dots(axes: Axes, rows: list[VariantResult]) -> None:
    """The paired difference of every row to its reference, each reference with a colour of its own and at zero."""
    shown = [row for row in rows if not row.variant.reference or row.difference is not None]
    compared = {row.variant.reference for row in shown if row.variant.reference}
    shown = [row for row in shown if row.variant.reference or row.variant.name in compared]
    colours = {
        name: f"C{number % 10}"
        for number, name in enumerate(dict.fromkeys(r.variant.reference for r in shown if r.variant.reference))
    }
    for place, row in enumerate(shown):
        if not row.variant.reference:
            axes.plot(0, place, "|", color=colours[row.variant.name], markersize=12, markeredgewidth=2)
            continue
        assert row.difference is not None
        half, colour = row.difference.half, colours[row.variant.reference]
        fill = "none" if half is None else colour
        if math.isfinite(row.difference.mean):
            axes.errorbar(row.difference.mean, place, xerr=half, fmt="o", capsize=3, color=colour, markerfacecolor=fill)
    axes.set_yticks(
        range(len(shown)),
        [row.variant.name if row.variant.reference else f"{row.variant.name} (reference)" for row in shown],
        fontsize=8,
    )
    axes.invert_yaxis()
    axes.axvline(0, color="0.4", linewidth=0.8)
    for name, colour in colours.items():
        axes.errorbar([], [], xerr=[], fmt="o", capsize=3, color=colour, label=f"against {name}")
    _legend_of_differences(axes, shown)
    axes.set_xlabel("final loss less the reference's, nats per byte (lower is better)", fontsize=8)
    axes.grid(alpha=0.3, axis="x")


def _legend_of_differences(axes: Axes, rows: list[VariantResult]) -> None:
    """The labelled handles, headed by what their intervals are and over how many seeds."""
    counts = sorted({row.difference.count for row in rows if row.difference is not None})
    seeds = f"{'-'.join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))} seeds" if counts else "no seed"
    title = f"{_INTERVAL}, {seeds}" + (" (hollow: none)" if counts[:1] == [1] else "")
    options = {"fontsize": 7, "title": title, "title_fontsize": 7, "ncols": 2}
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.01), **options)


def _lines(axes: Axes, rows: list[VariantResult], xlabel: str) -> None:
    """The paired difference of every series to the reference, over what it varies; the reference itself is zero."""
    series: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    shown = [row for row in rows if row.variant.x is not None]
    for row in shown:
        assert row.variant.x is not None
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
    references = list(dict.fromkeys(row.variant.reference for row in shown if row.variant.reference))
    if len(references) > 1:  # one for each place
        references = list(dict.fromkeys(row.variant.series for row in shown if row.variant.name in references))
    axes.axhline(0, color="0.4", linewidth=0.8, label=f"0, the reference: {', '.join(references)}")
    axes.set_xlabel(xlabel)
    axes.set_ylabel("final loss less the reference's, nats per byte", fontsize=8)
    _legend_of_differences(axes, shown)
    axes.grid(alpha=0.3)


def _by_compute(axes: Axes, rows: list[VariantResult]) -> None:
    """Validation loss over training compute, mean over seeds."""
    for number, row in enumerate(rows):
        outcomes = [outcome for outcome in row.outcomes if outcome is not None]
        length = min(len(outcome.curve) for outcome in outcomes)
        x = [outcomes[0].curve[place].flops for place in range(length)]
        y = [statistics.fmean(outcome.curve[place].loss for outcome in outcomes) for place in range(length)]
        axes.plot(x, y, _dash(number), linewidth=1, label=row.variant.name)
    lowest = min((row.loss.mean for row in rows if row.loss is not None), default=None)
    if lowest is not None:
        axes.set_ylim(lowest * 0.97, lowest * 1.2)
    axes.set_xlabel("training compute, FLOPs", fontsize=8)
    axes.set_ylabel("validation loss, nats per byte, mean over seeds", fontsize=8)


def _dash(number: int) -> str:
    return _DASHES[number // 10 % len(_DASHES)]


def _by_step(axes: Axes, rows: list[VariantResult]) -> None:
    """Paired difference of the validation loss to the reference's at the same step, and a shade for its interval."""
    named = {row.variant.name: row for row in rows}
    widest, compared = 0.0, [row for row in rows if row.variant.reference in named]
    for number, row in enumerate(compared):
        reference = named[row.variant.reference]
        if row.variant.run.steps != reference.variant.run.steps:
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
        found = [Estimate.of([mine[step] - other[step] for mine, other in curves]) for step in steps]
        y = np.array([estimate.mean if estimate else math.nan for estimate in found])
        half = np.array([(estimate.half or 0.0) if estimate else math.nan for estimate in found])
        (line,) = axes.plot(steps, y, _dash(number), color=f"C{number % 10}", linewidth=1, label=row.variant.name)
        axes.fill_between(steps, y - half, y + half, color=line.get_color(), alpha=0.08, linewidth=0)
        widest = max(widest, abs(y[-1]))
    axes.axhline(0, color="0.4", linewidth=0.8, label="0: the reference of each (left)")
    if widest:
        axes.set_ylim(-3 * widest, 3 * widest)
    axes.set_xlabel("optimizer step", fontsize=8)
    axes.set_ylabel("validation loss less the reference's\n(shade: paired 95% interval)", fontsize=8)
    axes.locator_params(axis="x", nbins=5)


def _losses(outcome: Outcome) -> dict[int, float]:
    """The curve by steps; at the growth, the loss after it."""
    return {point.step: point.loss for point in outcome.curve}
