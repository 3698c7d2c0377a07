"""The report as a picture: RMS of every module before and after, along the depth of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_sparkling.check.growth_report import GrowthReport
from ds_sparkling.errors import SparklingError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Pixels per inch, and inches per module: a row of small print.
_DPI = 100
_INCHES = 0.22


def picture(report: GrowthReport, title: str) -> Figure:
    """RMS before and after, on a logarithmic axis, and their ratio beside it; one line of pixels per module.

    Raises:
        SparklingError: if matplotlib isn't installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
    except ImportError:
        raise SparklingError(
            "drawing needs matplotlib: pip install 'ds-sparkling[plots]', or pass --no-picture for the text alone"
        ) from None
    names = [row.module for row in report.rows]
    depth = range(len(names))
    figure = Figure(figsize=(10, 1.6 + _INCHES * len(names)), dpi=_DPI, layout="constrained")
    verdict = "kept" if report.kept else "BROKEN"
    figure.suptitle(f"{title}: {report.small.strategy.pair}, scaling {report.small.strategy.scaling.value}: {verdict}")
    absolute, ratio = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    absolute.plot([row.before for row in report.rows], depth, marker="o", label="before")
    absolute.plot([row.after for row in report.rows], depth, marker="x", linestyle="--", label="after")
    absolute.set(xlabel="RMS of the output", xscale="log")
    absolute.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    absolute.xaxis.set_major_formatter("{x:g}")
    absolute.xaxis.set_minor_formatter("")
    absolute.set_yticks(depth, labels=names, fontsize="small")
    absolute.invert_yaxis()
    absolute.legend()
    ratio.axvline(1, color="0.4", linewidth=0.8)
    ratio.plot(
        [row.ratio / row.expected for row in report.rows], depth, marker="o", linestyle="", label="after / before"
    )
    bands = [report.promise.bands.get(row.place) for row in report.rows]
    for index, band in enumerate(bands):
        if band is not None:
            ratio.barh(index, band[1] - band[0], left=band[0], height=0.8, color="0.85", zorder=0)
    ratio.set(xlabel="ratio" + (", and what is promised" if any(bands) else ""))
    ratio.ticklabel_format(axis="x", useOffset=False)
    for axes in (absolute, ratio):
        axes.grid(alpha=0.3)
    return figure
