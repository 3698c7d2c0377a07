"""The figures of a report. A run has one colour in all of them, of Okabe and Ito's, which all eyes tell apart."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ds_sparkling.errors import SparklingError
from ds_sparkling.figures import literal
from ds_sparkling.report import facts
from ds_sparkling.report.events import ReadRun, TagCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ds_sparkling.report.events import FloatArray

#: Pixels are 110 times as many, in every picture alike.
_SIZE = (7.0, 5.2)
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MOST_RUNS = len(_COLOURS)
#: Of births: the old elements, then the growths'.
_STYLES = ("-", "--", ":", "-.")
_DOTS = (0, (1, 3))
#: Marks of a legend that are no line style.
SHADE, DOT, FAINT = "shade", "dot", "faint"
#: Units of a horizontal axis, the largest that fits: tokens and samples, and FLOPs.
_COUNTS: tuple[tuple[float, str], ...] = ((1e9, "B"), (1e6, "M"), (1e3, "k"), (1.0, "1"))
_FLOPS: tuple[tuple[float, str], ...] = (
    (1e21, "ZFLOPs"),
    (1e18, "EFLOPs"),
    (1e15, "PFLOPs"),
    (1e12, "TFLOPs"),
    (1e9, "GFLOPs"),
    (1.0, "FLOPs"),
)
#: Curves of fewer points have them marked.
_MARKED = 40


@dataclass(frozen=True)
class Style:
    """How the figures are drawn.

    Attributes:
        colours: by run's name.
        smooth: points of the running mean over training losses; None takes a fiftieth of a run's points.
        by_tokens: whether curves are over tokens; over samples otherwise.
        reference: sample count at which the activations of all runs are taken for 1.
    """

    colours: dict[str, str]
    smooth: int | None
    by_tokens: bool
    reference: float = 0.0


@dataclass(frozen=True)
class Panel:
    """One part of a figure.

    Attributes:
        tags: what it shows of a run; the beginnings of families of tags end in "/".
        label: of its vertical axis.
        draw: adds a run's curves.
        possible: whether a run can have it, as far as its files tell.
    """

    tags: tuple[str, ...]
    label: str
    draw: Callable[[Axes, ReadRun, Style], None]
    possible: Callable[[ReadRun], bool] = lambda run: True

    def shows(self, run: ReadRun) -> bool:
        """Whether the run has recorded any of it."""
        families = tuple(tag for tag in self.tags if tag.endswith("/"))
        return any(tag in self.tags or (families and tag.startswith(families)) for tag in run.curves)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A figure with what is said about it.

    Attributes:
        name: of the PNG.
        title: above it.
        caption: how to read it.
        switch: how to have what it shows recorded.
        panels: its parts, one above the other; those that no run has recorded are left out.
        marks: what else the legend tells: line style (or :data:`SHADE`, or :data:`DOT`) and name.
        log: whether the vertical axes are logarithmic.
        by_compute: whether the horizontal axis is compute, in place of tokens or samples.
    """

    name: str
    title: str
    caption: str
    switch: str
    panels: tuple[Panel, ...]
    marks: tuple[tuple[str, str], ...] = ()
    log: bool = False
    by_compute: bool = False

    def missing(self, runs: Sequence[ReadRun]) -> list[str]:
        """What isn't recorded, and by whom, though it could be."""
        lines = []
        for panel in self.panels:
            without = [run.name for run in runs if not panel.shows(run) and panel.possible(run)]
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
    by_tokens = all(run.curve(facts.TOKENS) is not None for run in runs)
    return Style(colours, smooth, by_tokens, facts.reference(runs, "activation_rms"))


def draw(section: Section, runs: Sequence[ReadRun], style: Style) -> bytes | None:
    """A section's figure as a PNG; None if no run has recorded anything of it.

    Raises:
        SparklingError: if matplotlib isn't installed.
    """
    figure = figure_of(section, runs, style)
    return None if figure is None else _png(figure)


def figure_of(section: Section, runs: Sequence[ReadRun], style: Style) -> Figure | None:
    """What :func:`draw` draws."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SparklingError(
            "a report draws with matplotlib: pip install 'ds-sparkling[plots]', or pass --text for the words alone"
        ) from None
    panels = [panel for panel in section.panels if any(panel.shows(run) for run in runs)]
    if not panels:
        return None
    figure = Figure(figsize=_SIZE, dpi=110, layout="constrained")
    shown = [run for run in runs if any(panel.shows(run) for panel in panels)]
    drawn = {DOT, FAINT}
    for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        for run in runs:
            if panel.shows(run):
                panel.draw(axes, run, style)
        _label(axes, panel, section, style)
        drawn |= {str(line.get_linestyle()) for line in axes.get_lines()} | ({SHADE} if axes.collections else set())
        for run in runs:
            if panel.shows(run):
                _mark_growths(axes, run, section, style, named=sum(bool(other.growths) for other in shown) > 1)
    _legend(figure, shown, [mark for mark in section.marks if mark[0] in drawn], style)
    return figure


def _label(axes: Axes, panel: Panel, section: Section, style: Style) -> None:
    """Axes with their units, from 0 to the end of the longest curve."""
    from matplotlib.ticker import FuncFormatter

    axes.set_xlim(left=0)
    what = "training compute" if section.by_compute else "tokens" if style.by_tokens else "samples"
    units = _FLOPS if section.by_compute else _COUNTS
    longest = max(axes.get_xlim()[1], 1.0)
    unit, name = next(((unit, name) for unit, name in units if longest >= unit), units[-1])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:g}"))
    axes.set(ylabel=panel.label, xlabel=f"{what} [{name}]")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if section.log:
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", useOffset=False)


def _legend(figure: Figure, runs: Sequence[ReadRun], marks: Sequence[tuple[str, str]], style: Style) -> None:
    """The runs' colours and what the line styles mean, above the panels."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Line2D([], [], color=style.colours[run.name], linewidth=2) for run in runs]
    for mark, _ in marks:
        if mark == SHADE:
            handles.append(Patch(color="0.5", alpha=0.25, linewidth=0))
        elif mark == DOT:
            handles.append(Line2D([], [], color="0.4", marker="o", markersize=3.5))
        elif mark == FAINT:
            handles.append(Line2D([], [], color="0.4", alpha=0.5, linewidth=1))
        else:
            line = Line2D([], [], color="0.4")
            line.set_linestyle(mark)  # type: ignore[arg-type]  # of the few that matplotlib names
            handles.append(line)
    names = [*(literal(run.name) for run in runs), *(name for _, name in marks)]
    figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 4), frameon=False, fontsize="small")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


# -- where curves lie -------------------------------------------------------------------------------------------


def _over(run: ReadRun, samples: FloatArray, style: Style) -> FloatArray:
    spent = run.spent(facts.TOKENS, samples) if style.by_tokens else None
    return samples if spent is None else spent


def _spent(run: ReadRun, samples: FloatArray) -> FloatArray:
    spent = run.spent(facts.COMPUTE, samples)
    assert spent is not None
    return spent


def _mark_growths(axes: Axes, run: ReadRun, section: Section, style: Style, *, named: bool) -> None:
    """A dotted line at each growth, with its number, and the run's name if there are several that grew."""
    for growth in run.growths:
        samples = np.array([float(growth.samples)])
        (where,) = _spent(run, samples) if section.by_compute else _over(run, samples, style)
        colour = style.colours[run.name]
        axes.axvline(where, color=colour, linewidth=0.8, linestyle=_DOTS)
        axes.annotate(
            f"growth {growth.number}, {literal(run.name)}" if named else f"growth {growth.number}",
            (where, 0.98),
            xycoords=("data", "axes fraction"),
            xytext=(3, 0),
            textcoords="offset points",
            rotation=90,
            verticalalignment="top",
            fontsize="x-small",
            color=colour,
        )


def _line(axes: Axes, run: ReadRun, curve: TagCurve | None, style: Style, linestyle: str = "-") -> None:
    """One curve of a run, if it is there."""
    if curve is not None:
        marker = "." if len(curve) < _MARKED else ""
        x = _over(run, curve.samples, style)
        axes.plot(x, curve.values, color=style.colours[run.name], linestyle=linestyle, marker=marker)


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
    _losses(axes, run, style, lambda samples: _spent(run, samples))


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
    """RMS over that at the point which is the same for all runs."""
    curves = [facts.relative(curve, style.reference) for curve in run.family("activation_rms").values()]
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


def _grew(run: ReadRun) -> bool:
    return bool(run.growths) or run.grown_elsewhere


def _may_have_experts(run: ReadRun) -> bool:
    """A run whose blocks are looked at, and that shows no router, is dense."""
    return not run.family("activation_rms")


_DIAGNOSE_EVERY = 'set "diagnose_every" in the "sparkling" block and enable a monitor'
_AS_THE_JOB = "write it at x = engine.global_samples, as ds_sparkling/train.py does"
_LOG_EVERY = 'set "log_every" in the "sparkling" block and enable a monitor'
_MEDIAN = (("-", "median"), (SHADE, "least to largest"))
SECTIONS = (
    Section(
        name="loss-by-tokens",
        title="Loss by tokens",
        caption="The same tokens are the same data. The wider a model, the more compute they take.",
        switch=_AS_THE_JOB,
        panels=(Panel((*facts.TRAINING, facts.VALIDATION), "loss", _loss),),
        marks=((DOT, "validation"), (FAINT, "training")),
    ),
    Section(
        name="loss-by-compute",
        title="Loss by compute",
        caption="Over 6 x active parameters x tokens. What a run ends at is what its compute buys; a run that is "
        "still on its way, its learning rate high, shows more than it would have ended at.",
        switch=_AS_THE_JOB,
        panels=(Panel((facts.COMPUTE,), "loss", _loss_by_compute),),
        marks=((DOT, "validation"), (FAINT, "training")),
        by_compute=True,
    ),
    Section(
        name="activation-drift",
        title="Activation RMS",
        caption="RMS of what comes out of each block, over that of the same run at one point for all runs: right "
        "before the earliest growth. Below, its ratio to what goes in, over that before the run's latest "
        "growth. A growth should leave both where they were; training moves them.",
        switch=_DIAGNOSE_EVERY,
        panels=(
            Panel(("activation_rms/",), "RMS, relative", _rms),
            Panel(("activation_drift/",), "RMS out / in, relative", _drift, _grew),
        ),
        marks=_MEDIAN,
    ),
    Section(
        name="symmetry",
        title="Symmetry of copied units",
        caption="Cosine between copied units and their sources, in weights and in gradients. Units that stay at 1 "
        "learn the same as their sources.",
        switch=f"{_DIAGNOSE_EVERY}; only growths that copy units have any",
        panels=(
            Panel(("twins/cosine",), "cosine, weights", _twins, _grew),
            Panel(("twins/gradient_cosine",), "cosine, gradients", _twin_gradients, _grew),
        ),
        marks=(("-", "mean"), (":", "closest pair")),
    ),
    Section(
        name="learning-rates",
        title="Learning rates",
        caption="By birth. Of equal curves one hides the others.",
        switch=_LOG_EVERY,
        panels=(Panel(("Train/Samples/lr", "lr/"), "learning rate", _rates),),
        marks=(("-", "old elements"), ("--", "born in growth 1"), (":", "in growth 2"), ("-.", "in growth 3")),
    ),
    Section(
        name="updates",
        title="Size of updates",
        caption="RMS of an optimizer step, since the first growth.",
        switch=_LOG_EVERY,
        panels=(Panel(("update_rms/",), "RMS of the update", _updates, _grew),),
        marks=(("-", "old elements"), ("--", "born in the latest growth")),
        log=True,
    ),
    Section(
        name="effective-rank",
        title="Effective rank",
        caption="Of the weights that are watched.",
        switch=_DIAGNOSE_EVERY,
        panels=(Panel(("effective_rank/",), "effective rank", _rank),),
        marks=_MEDIAN,
    ),
    Section(
        name="routing",
        title="Routing",
        caption="Entropy of the routers, median and range over blocks; and the load of the most and of the least "
        "loaded expert of any block, over an even load: 0 is dead.",
        switch=_DIAGNOSE_EVERY,
        panels=(
            Panel(("router/entropy/",), "entropy [nats]", _entropy, _may_have_experts),
            Panel(("router/load_max/", "router/load_min/"), "load over even load", _load, _may_have_experts),
        ),
        marks=(("-", "median entropy; most loaded expert"), (SHADE, "over blocks"), ("--", "least loaded expert")),
    ),
)
