"""Compare runs on one page: losses by tokens and compute, activation RMS, symmetry, learning rates, and a verdict.

    python tools/report.py runs/grown runs/from-scratch --output report

A run is the directory it was given as --output, or the directory of its TensorBoard event files; it may still be going
on. Written are report.html, which has its pictures in it and needs no network, and the pictures as PNGs beside it. The
verdict, with its figures, is printed too. What a run hasn't recorded is named, with what to switch on.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ds_sparkling.spec.command_line import ends_in_words, path_argument, positive


@ends_in_words()
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: print the table and the verdict, and write the page."""
    args = _parse(argv)
    # Here, so that --help doesn't wait for what reads and draws.
    from ds_sparkling.report.events import read_runs
    from ds_sparkling.report.page import page, text
    from ds_sparkling.report.pictures import SECTIONS, draw, style_of
    from ds_sparkling.report.target import Target
    from ds_sparkling.report.verdict import verdict

    # TensorBoard's reader has much to say about files that are still being written.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    target = None if args.text else Target(args.output)
    if target is not None:
        target.check(args.force)
    runs = read_runs(args.runs, args.names)
    findings = verdict(runs)
    if target is not None:
        style = style_of(runs, args.smooth)
        figures = [(section, draw(section, runs, style)) for section in SECTIONS]
        pictures = {section.name: png for section, png in figures if png is not None}
        target.write(page(runs, findings, figures, style), pictures)
    sys.stdout.write(text(runs, findings) + "\n")
    if target is not None:
        sys.stdout.write(f"\nreport: {target.page}\n")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", type=path_argument, metavar="RUN", help="a run's directory, or its event files' one"
    )
    parser.add_argument("--names", nargs="+", metavar="NAME", help="what to call the runs (default: their directories)")
    parser.add_argument(
        "--output",
        type=path_argument,
        default=Path("report"),
        metavar="DIR|FILE",
        help="a directory, or the page's name ending in .html (default: %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="overwrite an earlier report")
    parser.add_argument(
        "--smooth",
        type=positive,
        metavar="N",
        help="training losses as means of N points (default: a fiftieth of them)",
    )
    parser.add_argument("--text", action="store_true", help="print the verdict and write nothing; needs no matplotlib")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
