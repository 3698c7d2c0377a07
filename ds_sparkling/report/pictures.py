"""The figures of a report. A run has one colour in all of them, of Okabe and Ito's, which all eyes tell apart."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ds_sparkling.errors import SparklingError
from ds_sparkling.report import facts
from ds_sparkling.report.events import ReadRun, TagCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ds_sparkling.report.events import FloatArray

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MOST_RUNS = len(_COLOURS)
#: Of births: the old elements, then the growths'.
_STYLES = ("-", "--", ":", "-.")
_DOTS = (0, (1, 3))
#: Curves of fewer points have them marked.
_MARKED = 40


@dataclass(frozen=True)
class Style:
    """How the figures are drawn.

    Attributes:
        colours: by run's name.
        smooth: points of the running mean over training losses; None takes a fiftieth of a run's points.
        by_tokens: whether curves are over tokens; over samples otherwise.
    """

    colours: dict[str, str]
    smooth: int | None
    by_tokens: bool


@dataclass(frozen=True)
class Panel:
    """One part of a figure.

    Attributes:
        tags: what it shows of a run; the beginnings of families of tags end in "/".
        label: of its vertical axis.
        draw: adds a run's curves.
    """

    tags: tuple[str, ...]
    label: str
    draw: Callable[[Axes, ReadRun, Style], None]

    def shows(self, run: ReadRun) -> bool:
        """Whether the run has recorded any of it."""
        families = tuple(tag for tag in self.tags if tag.endswith("/"))
        return any(tag in self.tags or (families and tag.startswith(families)) for tag in run.curves)


@dataclass(frozen=True)
class Section:
    """A figure with what is said about it.

    Attributes:
        name: of the PNG.
        title: above it.
        caption: how to read it.
        switch: how to have what it shows recorded.
        panels: its parts, one above the other; those that no run has recorded are left out.
        log: whether the vertical axes are logarithmic.
        horizontal: label of the horizontal axis, if it isn't tokens or samples.
    """

    name: str
    title: str
    caption: str
    switch: str
    panels: tuple[Panel, ...]
    log: bool = False
    horizontal: str = ""

    def missing(self, runs: Sequence[ReadRun]) -> list[str]:
        """What isn't recorded, and by whom."""
        lines = []
        for panel in self.panels:
            without = [run.name for run in runs if not panel.shows(run)]
            if without:
                whose = "any run" if len(without) == len(runs) else ", ".join(without)
                lines.append(f"{' or '.join(_pattern(tag) for tag in panel.tags)}: not recorded by {whose}")
        return lines


def _pattern(tag: str) -> str:
    return f"{tag}NAME" if tag.endswith("/") else tag


def style_of(runs: Sequence[ReadRun], smooth: int | None = None) -> Style:
    """Colours by run, and what the curves are over: tokens if every run tells them.

    Raises:
        SparklingError: if there are more runs than colours.
    """
    if len(runs) > MOST_RUNS:
        raise SparklingError(f"{len(runs)} runs are more than can be told apart by colour; pass {MOST_RUNS} at most")
    colours = {run.name: colour for run, colour in zip(runs, _COLOURS, strict=False)}
    return Style(colours, smooth, all(run.curve(facts.TOKENS) is not None for run in runs))


def draw(section: Section, runs: Sequence[ReadRun], style: Style) -> bytes | None:
    """A section's figure as a PNG; None if no run has recorded anything of it.

    Raises:
        SparklingError: if matplotlib isn't installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SparklingError(
            "a report draws with matplotlib: pip install 'ds-sparkling[plots]', or pass --text for the words alone"
        ) from None
    panels = [panel for panel in section.panels if any(panel.shows(run) for run in runs)]
    if not panels:
        return None
    figure = Figure(figsize=(7, 0.9 + 3.1 * len(panels)), dpi=110, layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        for run in runs:
            if panel.shows(run):
                panel.draw(axes, run, style)
        axes.set(ylabel=panel.label, xlabel=section.horizontal or ("tokens" if style.by_tokens else "samples"))
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if section.log:
            axes.set_yscale("log")
        else:
            axes.ticklabel_format(axis="y", useOffset=False)
    _legend(figure, [run for run in runs if any(panel.shows(run) for panel in panels)], style)
    return _png(figure)


def _legend(figure: Figure, runs: Sequence[ReadRun], style: Style) -> None:
    """The runs' colours, above the panels."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=style.colours[run.name], linewidth=2) for run in runs]
    figure.legend(lines, [run.name for run in runs], loc="outside upper center", ncols=min(len(runs), 4), frameon=False)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


# -- where curves lie -------------------------------------------------------------------------------------------


def _over(run: ReadRun, samples: FloatArray, style: Style) -> FloatArray:
    spent = run.spent(facts.TOKENS, samples) if style.by_tokens else None
    return samples if spent is None else spent


def _mark_growths(axes: Axes, run: ReadRun, style: Style) -> None:
    for growth in run.growths:
        (where,) = _over(run, np.array([float(growth.samples)]), style)
        axes.axvline(where, color=style.colours[run.name], linewidth=0.8, linestyle=_DOTS)


def _line(axes: Axes, run: ReadRun, curve: TagCurve | None, style: Style, linestyle: str = "-") -> None:
    """One curve of a run, if it is there."""
    if curve is not None:
        marker = "." if len(curve) < _MARKED else ""
        x = _over(run, curve.samples, style)
        axes.plot(x, curve.values, color=style.colours[run.name], linestyle=linestyle, marker=marker)
        _mark_growths(axes, run, style)


def _band(axes: Axes, run: ReadRun, curves: Sequence[TagCurve], style: Style) -> None:
    """The median over blocks or parameters, and between the least and the largest a shade."""
    if curves:
        samples, table = _table(curves)
        _line(axes, run, TagCurve(samples, np.median(table, axis=0), np.zeros_like(samples)), style)
        x, colour = _over(run, samples, style), style.colours[run.name]
        axes.fill_between(x, table.min(axis=0), table.max(axis=0), color=colour, alpha=0.15, linewidth=0)


def _table(curves: Sequence[TagCurve]) -> tuple[FloatArray, FloatArray]:
    """Curves at each other's samples: those [points], and the values [curves, points]."""
    samples = np.unique(np.concatenate([curve.samples for curve in curves]))
    return samples, np.array([np.interp(samples, curve.samples, curve.values) for curve in curves])


# -- the panels -------------------------------------------------------------------------------------------------


def _loss(axes: Axes, run: ReadRun, style: Style) -> None:
    _losses(axes, run, style, lambda samples: _over(run, samples, style))


def _loss_by_compute(axes: Axes, run: ReadRun, style: Style) -> None:
    def compute(samples: FloatArray) -> FloatArray:
        spent = run.spent(facts.COMPUTE, samples)
        assert spent is not None
        return spent

    _losses(axes, run, style, compute)


def _losses(axes: Axes, run: ReadRun, style: Style, over: Callable[[FloatArray], FloatArray]) -> None:
    """Training losses as a running mean over the raw points, validation losses with marks."""
    training, validation = run.curve(*facts.TRAINING), run.curve(facts.VALIDATION)
    colour = style.colours[run.name]
    if training is not None:
        x, window = over(training.samples), style.smooth or max(1, len(training) // 50)
        axes.plot(x, training.values, color=colour, alpha=0.15, linewidth=0.7)
        axes.plot(x, running_mean(training.values, window), color=colour, alpha=0.5, linewidth=1)
    if validation is not None:
        axes.plot(over(validation.samples), validation.values, color=colour, marker="o", markersize=3.5)
    for growth in run.growths:
        (where,) = over(np.array([float(growth.samples)]))
        axes.axvline(where, color=colour, linewidth=0.8, linestyle=_DOTS)
    _look_at_the_end(axes)


def _look_at_the_end(axes: Axes) -> None:
    """Leave out the losses of the first tenth, which would press all others together."""
    lines = [np.column_stack((line.get_xdata(), line.get_ydata())) for line in axes.get_lines()]
    points = np.concatenate([line for line in lines if len(line) > 2] or [np.zeros((0, 2))])
    points = points[np.isfinite(points).all(axis=1)]
    late = points[points[:, 0] >= 0.1 * points[:, 0].max(initial=0), 1]
    if len(late):
        low, high = late.min(), np.quantile(late, 0.995)
        margin = 0.05 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + margin)


def running_mean(values: FloatArray, window: int) -> FloatArray:
    """The mean of each value and those before it, ``window`` in all or as many as there are; of the finite ones, and
    NaN where there are none."""
    finite = np.isfinite(values)
    sums = np.cumsum(np.concatenate(([0.0], np.where(finite, values, 0.0))))
    counts = np.cumsum(np.concatenate(([0], finite)))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    with np.errstate(invalid="ignore"):
        return (sums[ends] - sums[starts]) / (counts[ends] - counts[starts])


def _rms(axes: Axes, run: ReadRun, style: Style) -> None:
    """RMS over that before the first growth, or over the first measured."""
    growth = run.growths[0] if run.growths else None
    curves = [facts.relative(curve, growth) for curve in run.family("activation_rms").values()]
    _band(axes, run, [curve for curve in curves if curve is not None], style)


def _drift(axes: Axes, run: ReadRun, style: Style) -> None:
    _band(axes, run, list(run.family("activation_drift").values()), style)


def _twins(axes: Axes, run: ReadRun, style: Style) -> None:
    _line(axes, run, run.curve("twins/cosine_max"), style, ":")
    _line(axes, run, run.curve("twins/cosine"), style)


def _twin_gradients(axes: Axes, run: ReadRun, style: Style) -> None:
    _line(axes, run, run.curve("twins/gradient_cosine"), style)


def _rates(axes: Axes, run: ReadRun, style: Style) -> None:
    """The base schedule, and the curve of each birth if they are told apart, else of the latest."""
    births = {name.removeprefix("birth_"): curve for name, curve in run.family("lr").items()}
    numbered = {int(name): curve for name, curve in births.items() if name.isdigit()}
    for birth, curve in sorted(numbered.items()):
        _line(axes, run, curve, style, _STYLES[birth % len(_STYLES)])
    if not numbered:
        _line(axes, run, run.curve("lr/new"), style, _STYLES[1])
    _line(axes, run, run.curve("Train/Samples/lr", "lr/old"), style)


def _updates(axes: Axes, run: ReadRun, style: Style) -> None:
    for which, linestyle in zip(("old", "new"), _STYLES, strict=False):
        _line(axes, run, run.curve(f"update_rms/{which}"), style, linestyle)


def _rank(axes: Axes, run: ReadRun, style: Style) -> None:
    _band(axes, run, list(run.family("effective_rank").values()), style)


def _entropy(axes: Axes, run: ReadRun, style: Style) -> None:
    _band(axes, run, list(run.family("router/entropy").values()), style)


def _load(axes: Axes, run: ReadRun, style: Style) -> None:
    """Of the most and of the least loaded expert, over all blocks."""
    for which, extreme, linestyle in (("max", np.max, "-"), ("min", np.min, "--")):
        curves = list(run.family(f"router/load_{which}").values())
        if curves:
            samples, table = _table(curves)
            _line(axes, run, TagCurve(samples, extreme(table, axis=0), np.zeros_like(samples)), style, linestyle)


_DIAGNOSE_EVERY = 'set "diagnose_every" in the "sparkling" block and enable a monitor'
_AS_THE_JOB = "write it at x = engine.global_samples, as ds_sparkling/train.py does"
_LOG_EVERY = 'set "log_every" in the "sparkling" block and enable a monitor'
SECTIONS = (
    Section(
        "loss-by-tokens",
        "Loss by tokens",
        "Validation loss with marks, training loss faint. Dotted lines: growths.",
        _AS_THE_JOB,
        (Panel((*facts.TRAINING, facts.VALIDATION), "loss", _loss),),
    ),
    Section(
        "loss-by-compute",
        "Loss by compute",
        "The same over 6 x active parameters x tokens. The lower curve at a given compute is the better buy there.",
        _AS_THE_JOB,
        (Panel((facts.COMPUTE,), "loss", _loss_by_compute),),
        horizontal="training compute [FLOPs]",
    ),
    Section(
        "activation-drift",
        "Activation RMS",
        "RMS of what comes out of each block, over that before the first growth (or the first measured); and its ratio "
        "to what goes in, over that before the latest growth. The median, and a shade from the least to the largest. "
        "A growth should leave both where they were.",
        _DIAGNOSE_EVERY,
        (
            Panel(("activation_rms/",), "RMS, relative", _rms),
            Panel(("activation_drift/",), "RMS out / in, relative", _drift),
        ),
    ),
    Section(
        "symmetry",
        "Symmetry of copied units",
        "Mean cosine between copied units and their sources, in weights (dotted: the closest pair) and in gradients. "
        "At 1 they are locked.",
        f"{_DIAGNOSE_EVERY}; only growths that copy units have any",
        (
            Panel(("twins/cosine",), "cosine, weights", _twins),
            Panel(("twins/gradient_cosine",), "cosine, gradients", _twin_gradients),
        ),
    ),
    Section(
        "learning-rates",
        "Learning rates",
        "By birth: solid for old elements, broken for those of growths. Of equal curves one hides the others.",
        _LOG_EVERY,
        (Panel(("Train/Samples/lr", "lr/"), "learning rate", _rates),),
    ),
    Section(
        "updates",
        "Size of updates",
        "RMS of an optimizer step: solid for old elements, broken for those of the latest growth.",
        f"{_LOG_EVERY}; they begin with the first growth",
        (Panel(("update_rms/",), "RMS of the update", _updates),),
        log=True,
    ),
    Section(
        "effective-rank",
        "Effective rank",
        "Of the weights that are watched: the median, and a shade from the least to the largest.",
        _DIAGNOSE_EVERY,
        (Panel(("effective_rank/",), "effective rank", _rank),),
    ),
    Section(
        "routing",
        "Routing",
        "Entropy of the routers (median and range over blocks), and the load of the most (solid) and least (broken) "
        "loaded expert of any block; 1 is even, 0 is dead.",
        _DIAGNOSE_EVERY,
        (
            Panel(("router/entropy/",), "entropy [nats]", _entropy),
            Panel(("router/load_max/", "router/load_min/"), "load over even load", _load),
        ),
    ),
)
