"""The page: one HTML file that needs nothing else. Everything that comes from a run is escaped."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from ds_sparkling.report import facts
from ds_sparkling.report.events import ReadRun
from ds_sparkling.report.pictures import Section, Style
from ds_sparkling.report.template import PAGE
from ds_sparkling.report.verdict import Finding, Kind, headline, shortlist
from ds_sparkling.text_tables import text_table

HEADER = ("run", "validation loss", "jump at growth", "tokens", "compute [FLOPs]", "parameters", "active", "time [s]")
#: The first pictures, which the headline rests on; the others are folded away.
LOSSES = 2
_NOT_RECORDED = "-"
_ELSEWHERE = "It has grown, but not while these files were written: offline, or in another directory."

_MARKS = {Kind.GOOD: "✓", Kind.WATCH: "!", Kind.PLAIN: "•", Kind.MISSING: "?"}


def rows(runs: Sequence[ReadRun]) -> list[tuple[str, ...]]:
    """The table of the runs, as text; "-" where nothing was recorded."""
    return [_row(run) for run in runs]


def page(
    runs: Sequence[ReadRun],
    findings: Sequence[Finding],
    figures: Sequence[tuple[Section, bytes | None]],
    style: Style,
) -> str:
    """The HTML text.

    Args:
        runs: in the order of the table.
        findings: the verdict.
        figures: of every section its PNG, if there is one.
        style: the runs' colours.
    """
    names = ", ".join(run.name for run in runs)
    first, rest = shortlist(findings)
    shown = [(section, png, section.missing(runs)) for section, png in figures]
    cards = [_figure(section, png, missing) for section, png, missing in shown if png is not None or missing]
    return PAGE.substitute(
        title=escape(f"Report on {names}"),
        headline=escape(headline(runs)),
        findings="\n".join(map(_finding, first)),
        rest="\n".join(map(_finding, rest)),
        number=len(rest),
        header="".join(f"<th>{escape(cell)}</th>" for cell in HEADER),
        rows="\n".join(_html_row(run, style) for run in runs),
        losses="\n".join(cards[:LOSSES]),
        figures="\n".join(cards[LOSSES:]),
        plans="\n".join(_plans(run) for run in runs),
        sources="\n".join(f"<li>{escape(run.name)}: <code>{escape(str(run.path))}</code></li>" for run in runs),
    )


def _row(run: ReadRun) -> tuple[str, ...]:
    end = facts.ending(run)
    jumps = [
        _NOT_RECORDED if jump.size is None else "0" if jump.size == 0 else f"{jump.size:+.1e}"
        for jump in facts.jumps(run)
    ]
    active = _NOT_RECORDED if end.active_parameters is None else f"{end.active_parameters:,}"
    return (
        run.name,
        _number(end.loss, ".4f"),
        ", ".join(jumps) or (_NOT_RECORDED if run.grown_elsewhere else "no growth"),
        _number(end.tokens, ",.0f"),
        _number(end.compute, ".3e"),
        _number(end.parameters, ","),
        f"about {active}" if end.active_derived else active,
        _number(end.seconds, ",.0f"),
    )


def _number(value: float | None, form: str) -> str:
    return _NOT_RECORDED if value is None else format(value, form)


def _finding(finding: Finding) -> str:
    kind = finding.kind
    return f'<li class="{kind.value}"><span class="mark">{_MARKS[kind]}</span> {escape(finding.text)}</li>'


def _html_row(run: ReadRun, style: Style) -> str:
    name, *cells = _row(run)
    chip = f'<span class="chip" style="background:{style.colours[run.name]}"></span>'
    return f"<tr><th>{chip}{escape(name)}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"


def _figure(section: Section, png: bytes | None, missing: Sequence[str]) -> str:
    body = ""
    if png is not None:
        data = base64.b64encode(png).decode("ascii")
        body = f'<img alt="{escape(section.title)}" src="data:image/png;base64,{data}">'
    body += f"<figcaption>{escape(section.caption)}</figcaption>"
    if missing:
        body += f'<p class="none">{escape("; ".join(missing))}. To have it, {escape(section.switch)}.</p>'
    return f'<figure id="{section.name}"><h3>{escape(section.title)}</h3>{body}</figure>'


def _plans(run: ReadRun) -> str:
    name = f"<h3>{escape(run.name)}</h3>"
    if not run.growths:
        return f"{name}<p>{_ELSEWHERE if run.grown_elsewhere else 'Nothing grew.'}</p>"
    return name + "".join(
        f"<pre>{escape(growth.plan)}</pre>"
        if growth.plan is not None
        else f'<p class="none">Growth {growth.number}, to {escape(_widths(growth.widths))}; its plan is not recorded '
        "(TensorBoard has it, other monitors don't).</p>"
        for growth in run.growths
    )


def _widths(widths: dict[str, int]) -> str:
    return ", ".join(f"{axis} {width}" for axis, width in widths.items()) or "widths that are not recorded"


def text(runs: Sequence[ReadRun], findings: Sequence[Finding]) -> str:
    """The table, the headline and the verdict as plain text."""
    lines = text_table([HEADER, *rows(runs)], left=[0])
    first, rest = shortlist(findings)
    short = ["", headline(runs), "", *(finding.text for finding in first)]
    return "\n".join([*lines, *short, *(["", "In detail:"] if rest else []), *(finding.text for finding in rest)])
