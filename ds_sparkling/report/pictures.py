"""The figures of a report. A run has one colour in all of them, of Okabe and Ito's, which all eyes tell apart."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ds_sparkling.errors import SparklingError
from ds_sparkling.report import facts
from ds_sparkling.report.events import Curve, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ds_sparkling.report.events import FloatArray

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MOST_RUNS = len(_COLOURS)
#: Of birth stages: the old elements, then the growths'.
_STYLES = ("-", "--", ":", "-.")


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
class Section:
    """A figure with what is said about it.

    Attributes:
        name: of the PNG.
        title: above it.
        caption: how to read it.
        tags: what it shows, for when that is missing.
        switch: how to have that recorded.
        panels: what draws each of its parts; each returns whether it drew anything for a run.
        labels: of the panels' vertical axes.
    """

    name: str
    title: str
    caption: str
    tags: str
    switch: str
    panels: tuple[Callable[[Axes, Run, Style], bool], ...]
    labels: tuple[str, ...]
    log: bool = False
    horizontal: str = ""


def style_of(runs: Sequence[Run], smooth: int | None = None) -> Style:
    """Colours by run, and what the curves are over: tokens if every run tells them.

    Raises:
        SparklingError: if there are more runs than colours.
    """
    if len(runs) > MOST_RUNS:
        raise SparklingError(f"{len(runs)} runs are more than can be told apart by colour; pass {MOST_RUNS} at most")
    colours = {run.name: colour for run, colour in zip(runs, _COLOURS, strict=False)}
    return Style(colours, smooth, all(run.curve(facts.TOKENS) is not None for run in runs))


def draw(section: Section, runs: Sequence[Run], style: Style) -> tuple[bytes | None, list[str]]:
    """A section's figure as a PNG, None if no run has anything to show; and the runs that have nothing.

    Raises:
        SparklingError: if matplotlib isn't installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SparklingError(
            "a report draws with matplotlib: pip install 'ds-sparkling[plots]', or pass --text for the words alone"
        ) from None
    figure = Figure(figsize=(7, 0.9 + 3.1 * len(section.panels)), dpi=110, layout="constrained")
    shown: set[str] = set()
    used = []
    for axes, panel, label in zip(
        figure.subplots(len(section.panels), 1, squeeze=False)[:, 0], section.panels, section.labels, strict=True
    ):
        drawn = [run.name for run in runs if panel(axes, run, style)]
        shown |= {*drawn}
        _finish(axes, section, label, style, empty=not drawn)
        used += [run for run in runs if run.name in drawn and run not in used]
    if not shown:
        return None, [run.name for run in runs]
    _legend(figure, used, style)
    return _png(figure), [run.name for run in runs if run.name not in shown]


def _finish(axes: Axes, section: Section, label: str, style: Style, *, empty: bool) -> None:
    axes.set_ylabel(label)
    axes.set_xlabel(section.horizontal or ("tokens" if style.by_tokens else "samples"))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if empty:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center", color="0.5")
    elif section.log:
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small", frameon=False)


def _legend(figure: Figure, runs: Sequence[Run], style: Style) -> None:
    """The runs' colours, above the panels."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=style.colours[run.name], linewidth=2) for run in runs]
    figure.legend(lines, [run.name for run in runs], loc="outside upper center", ncols=min(len(runs), 4), frameon=False)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


# -- where curves lie -------------------------------------------------------------------------------------------


def _over(run: Run, samples: FloatArray, style: Style) -> FloatArray:
    spent = run.spent(facts.TOKENS, samples) if style.by_tokens else None
    return samples if spent is None else spent


def _mark_growths(axes: Axes, run: Run, style: Style) -> None:
    for growth in run.growths:
        (where,) = _over(run, np.array([float(growth.samples)]), style)
        axes.axvline(where, color=style.colours[run.name], linewidth=0.8, linestyle=(0, (1, 3)))


def _line(axes: Axes, run: Run, curve: Curve | None, style: Style, linestyle: str = "-") -> bool:
    """One curve of a run; a line that ends at a growth and begins anew if there is a jump."""
    if curve is None:
        return False
    colour = style.colours[run.name]
    marker = "." if len(curve) < 40 else ""
    axes.plot(_over(run, curve.samples, style), curve.values, color=colour, linestyle=linestyle, marker=marker)
    _mark_growths(axes, run, style)
    return True


def _band(axes: Axes, run: Run, curves: Sequence[Curve], values: Sequence[FloatArray], style: Style) -> bool:
    """The median over blocks or parameters, and between the least and the largest a shade."""
    if not curves:
        return False
    samples = np.unique(np.concatenate([curve.samples for curve in curves]))
    table = np.array([np.interp(samples, curve.samples, y) for curve, y in zip(curves, values, strict=True)])
    x, colour = _over(run, samples, style), style.colours[run.name]
    axes.plot(x, np.median(table, axis=0), color=colour, marker="." if len(samples) < 40 else "")
    axes.fill_between(x, table.min(axis=0), table.max(axis=0), color=colour, alpha=0.15, linewidth=0)
    _mark_growths(axes, run, style)
    return True


# -- the panels -------------------------------------------------------------------------------------------------


def _loss(axes: Axes, run: Run, style: Style) -> bool:
    return _losses(axes, run, style, lambda samples: _over(run, samples, style))


def _loss_by_compute(axes: Axes, run: Run, style: Style) -> bool:
    return run.curve(facts.COMPUTE) is not None and _losses(
        axes, run, style, lambda samples: run.spent(facts.COMPUTE, samples)
    )


def _losses(axes: Axes, run: Run, style: Style, over: Callable[[FloatArray], FloatArray | None]) -> bool:
    """Training losses as a running mean over the raw points, validation losses with marks."""
    training, validation = run.curve(*facts.TRAINING), run.curve(facts.VALIDATION)
    colour = style.colours[run.name]
    if training is not None and (x := over(training.samples)) is not None:
        window = style.smooth or max(1, len(training) // 50)
        axes.plot(x, training.values, color=colour, alpha=0.18, linewidth=0.7)
        axes.plot(x, running_mean(training.values, window), color=colour, alpha=0.55, linewidth=1)
    if validation is not None and (x := over(validation.samples)) is not None:
        axes.plot(x, validation.values, color=colour, marker="o", markersize=3.5)
    if training is None and validation is None:
        return False
    for growth in run.growths:
        where = over(np.array([float(growth.samples)]))
        if where is not None:
            axes.axvline(where[0], color=colour, linewidth=0.8, linestyle=(0, (1, 3)))
    _look_at_the_end(axes)
    return True


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
    """The mean of each value and those before it, ``window`` in all or as many as there are."""
    sums = np.cumsum(np.concatenate(([0.0], values)))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _rms(axes: Axes, run: Run, style: Style) -> bool:
    """RMS over that before the first growth, or over the first measured."""
    growth = run.growths[0] if run.growths else None
    curves = list(run.family("activation_rms").values())
    scaled = [(curve, values) for curve in curves if (values := facts.relative(curve, growth)) is not None]
    return _band(axes, run, [curve for curve, _ in scaled], [values for _, values in scaled], style)


def _twins(axes: Axes, run: Run, style: Style) -> bool:
    _line(axes, run, run.curve("twins/cosine_max"), style, ":")
    return _line(axes, run, run.curve("twins/cosine"), style)


def _twin_gradients(axes: Axes, run: Run, style: Style) -> bool:
    return _line(axes, run, run.curve("twins/gradient_cosine"), style)


def _rates(axes: Axes, run: Run, style: Style) -> bool:
    """The base schedule and the curve of each birth stage; only the base schedule where nothing has grown."""
    stages = sorted(
        (int(number), curve)
        for name, curve in run.family("lr").items()
        if (number := name.removeprefix("stage_")).isdigit()
    )
    if stages:
        drawn = [_line(axes, run, curve, style, _STYLES[stage % len(_STYLES)]) for stage, curve in stages]
    else:
        new = run.curve("lr/new")
        drawn = [new is not None and _line(axes, run, new, style, _STYLES[1])]
    base = _line(axes, run, run.curve("Train/Samples/lr", "lr/old"), style)
    return any((*drawn, base))


def _updates(axes: Axes, run: Run, style: Style) -> bool:
    drawn = [
        _line(axes, run, run.curve(f"update_rms/{which}"), style, line)
        for which, line in zip(("old", "new"), _STYLES, strict=False)
    ]
    return any(drawn)


def _rank(axes: Axes, run: Run, style: Style) -> bool:
    curves = list(run.family("effective_rank").values())
    return _band(axes, run, curves, [curve.values for curve in curves], style)


def _entropy(axes: Axes, run: Run, style: Style) -> bool:
    curves = list(run.family("router/entropy").values())
    return _band(axes, run, curves, [curve.values for curve in curves], style)


def _load(axes: Axes, run: Run, style: Style) -> bool:
    """Of the most and of the least loaded expert, over all blocks."""
    drawn = [_extreme(axes, run, which, style) for which in ("max", "min")]
    return any(drawn)


def _extreme(axes: Axes, run: Run, which: str, style: Style) -> bool:
    curves = list(run.family(f"router/load_{which}").values())
    if not curves:
        return False
    samples = np.unique(np.concatenate([curve.samples for curve in curves]))
    table = np.array([np.interp(samples, curve.samples, curve.values) for curve in curves])
    extreme = table.max(axis=0) if which == "max" else table.min(axis=0)
    return _line(axes, run, Curve(samples, extreme, np.zeros_like(samples)), style, _STYLES[which == "min"])


_DIAGNOSTICS = 'see "In TensorBoard" in the README'
SECTIONS = (
    Section(
        "loss-by-tokens",
        "Loss by tokens",
        "Validation loss with marks, training loss faint. Dotted lines: growths.",
        "Train/loss, Validation/loss",
        "write them at x = engine.global_samples, as ds_sparkling/train.py does",
        (_loss,),
        ("loss",),
    ),
    Section(
        "loss-by-compute",
        "Loss by compute",
        "The same over 6 x active parameters x tokens. The lower curve at a given compute is the better buy there.",
        "Train/compute_flops",
        "write it at x = engine.global_samples, as ds_sparkling/train.py does",
        (_loss_by_compute,),
        ("loss",),
        horizontal="training compute [FLOPs]",
    ),
    Section(
        "activation-drift",
        "Activation RMS",
        "Each block's RMS over what it was before the first growth (over the first measured, if nothing grew): "
        "the median, and a shade from the least to the largest. A growth should leave it where it was.",
        "activation_rms/BLOCK",
        _DIAGNOSTICS,
        (_rms,),
        ("RMS, relative",),
    ),
    Section(
        "symmetry",
        "Symmetry of copied units",
        "Mean cosine between copied units and their sources, in weights (dotted: the closest pair) and in gradients. "
        "At 1 they are locked.",
        "twins/cosine, twins/gradient_cosine",
        "call ds_sparkling.zero.monitoring.log_twin_cosine(engine) at validations, as ds_sparkling/train.py does; "
        "only growths that copy units have any",
        (_twins, _twin_gradients),
        ("cosine, weights", "cosine, gradients"),
    ),
    Section(
        "learning-rates",
        "Learning rates",
        "By birth stage: solid for old elements, broken for those of growths.",
        "Train/Samples/lr, lr/stage_K (or lr/old and lr/new)",
        'set "log_every" in the "sparkling" block and enable a monitor',
        (_rates,),
        ("learning rate",),
    ),
    Section(
        "updates",
        "Size of updates",
        "RMS of an optimizer step: solid for old elements, broken for those of the latest growth.",
        "update_rms/old, update_rms/new",
        'set "log_every" in the "sparkling" block and enable a monitor; they begin with the first growth',
        (_updates,),
        ("RMS of the update",),
        log=True,
    ),
    Section(
        "effective-rank",
        "Effective rank",
        "Of the weights that are watched: the median, and a shade from the least to the largest.",
        "effective_rank/PARAMETER",
        _DIAGNOSTICS,
        (_rank,),
        ("effective rank",),
    ),
    Section(
        "routing",
        "Routing",
        "Entropy of the routers (median and range over blocks), and the load of the most (solid) and least (broken) "
        "loaded expert of any block; 1 is even, 0 is dead.",
        "router/entropy/BLOCK, router/load_max/BLOCK, router/load_min/BLOCK",
        _DIAGNOSTICS,
        (_entropy, _load),
        ("entropy [nats]", "load over even load"),
    ),
)


def drawn_sections(runs: Sequence[Run], style: Style) -> Iterator[tuple[Section, bytes | None, list[str]]]:
    """Every section with its PNG, if any, and the runs missing from it."""
    for section in SECTIONS:
        yield (section, *draw(section, runs, style))
