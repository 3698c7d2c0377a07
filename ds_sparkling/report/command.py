"""Compare runs on one page: losses by tokens and compute, activation RMS, symmetry, learning rates, and a verdict.

    python tools/report.py runs/grown runs/from-scratch --output report

A run is the directory it was given as --output, or the directory of its TensorBoard event files; it may still be going
on. Written are report.html, which has its pictures in it and needs no network, and the pictures as PNGs beside it. The
verdict, with its figures, is printed too. What a run hasn't recorded is named, with what to switch on.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ds_sparkling.errors import SparklingError
from ds_sparkling.report.events import ReadRun, read_runs
from ds_sparkling.report.page import HEADER, page, rows
from ds_sparkling.report.pictures import SECTIONS, draw, style_of
from ds_sparkling.report.verdict import Finding, verdict


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: print the table and the verdict, and write the page."""
    args = _parse(argv)
    # TensorBoard's reader has much to say about files that are still being written.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    try:
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
    except SparklingError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


def text(runs: Sequence[ReadRun], findings: Sequence[Finding]) -> str:
    """The table and the verdict as plain text."""
    table = [HEADER, *rows(runs)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in table
    ]
    return "\n".join([*lines, "", *(finding.text for finding in findings)])


class Target:
    """Where a report goes: the page, and its pictures beside it, named after it.

    Args:
        output: a directory for ``report.html``, or the page's own name, ``.html``.
    """

    def __init__(self, output: Path) -> None:
        self.page = output if output.suffix == ".html" else output / "report.html"

    def picture(self, name: str) -> Path:
        return self.page.with_name(f"{self.page.stem}-{name}.png")

    def check(self, force: bool) -> None:
        """Raise SparklingError if something stands there that may not be overwritten."""
        there = [path for path in (self.page, *map(self.picture, self._names())) if path.exists()]
        if there and not force:
            raise SparklingError(f"{there[0]} exists; pass --force to overwrite the report, or another --output")

    def write(self, html: str, pictures: Mapping[str, bytes]) -> None:
        """Write all files into a directory of their own first, then rename them into place, the page last.

        Pictures of an earlier report that this one hasn't go.

        Raises:
            SparklingError: if they can't be written; then nothing of an earlier report is lost.
        """
        directory = self.page.parent
        made = next((path for path in (*reversed(directory.parents), directory) if not path.exists()), None)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".report-", dir=directory) as part:
                files = {self.picture(name): png for name, png in pictures.items()}
                files[self.page] = html.encode()
                for path, data in files.items():
                    (Path(part) / path.name).write_bytes(data)
                for path in files:
                    os.replace(Path(part) / path.name, path)
            for name in self._names() - pictures.keys():
                self.picture(name).unlink(missing_ok=True)
        except OSError as error:
            if made is not None:
                with contextlib.suppress(OSError):
                    shutil.rmtree(made)
            raise SparklingError(f"the report can't be written to {self.page}: {error.strerror}") from error

    def _names(self) -> set[str]:
        return {section.name for section in SECTIONS}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's directory, or its event files' one")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="what to call the runs (default: their directories)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("report"),
        metavar="DIR|FILE",
        help="a directory, or the page's name ending in .html (default: %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="overwrite an earlier report")
    parser.add_argument(
        "--smooth", type=int, metavar="N", help="training losses as means of N points (default: a fiftieth of them)"
    )
    parser.add_argument("--text", action="store_true", help="print the verdict and write nothing; needs no matplotlib")
    args = parser.parse_args(argv)
    if args.smooth is not None and args.smooth < 1:
        parser.error(f"--smooth must be positive, got {args.smooth}")
    return args


if __name__ == "__main__":
    main()
