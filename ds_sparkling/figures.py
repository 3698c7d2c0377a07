"""The commands that draw share this: their options, an empty figure, and a PNG that is whole or not there."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ds_sparkling.errors import SparklingError
from ds_sparkling.files import whole_file
from ds_sparkling.spec.command_line import path_argument
from ds_sparkling.text_tables import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def add_picture_options(parser: argparse.ArgumentParser, suffix: str) -> None:
    """``--output``, ``--force`` and ``--no-picture``; ``suffix`` is what the default name adds to the config's."""
    parser.add_argument(
        "--output",
        type=path_argument,
        metavar="FILE",
        help=f"the picture, a .png (default: CONFIG's name + {suffix}, here)",
    )
    parser.add_argument("--force", action="store_true", help="overwrite the picture if it exists")
    parser.add_argument("--no-picture", action="store_true", help="write the text only; needs no matplotlib")


def check_picture_options(parser: argparse.ArgumentParser, args: argparse.Namespace, default: str) -> None:
    """Fill in ``args.output`` and end the command if the picture has no place to go to."""
    if args.output is None:
        args.output = Path(default)
    if args.no_picture:
        return
    if args.output.suffix != ".png":
        parser.error(f"--output {args.output}: the picture is a PNG, so its name must end in .png")
    if args.output.exists() and not args.force:
        parser.error(f"{args.output} exists; pass --force to overwrite it, or another --output FILE")


def empty_figure(width: float, height: float) -> Figure:
    """A figure of ``width`` x ``height`` hundred pixels.

    Raises:
        SparklingError: if matplotlib isn't installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SparklingError(
            "drawing needs matplotlib: pip install 'ds-sparkling[plots]', or pass --no-picture for the text alone"
        ) from None
    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def empty_picture(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """A figure of 800 x 400 pixels and its axes.

    Raises:
        SparklingError: if matplotlib isn't installed.
    """
    figure = empty_figure(8, 4)
    return figure, figure.add_subplot(title=literal(title), xlabel=xlabel, ylabel=ylabel)


def literal(text: str) -> str:
    """``text`` as matplotlib draws it letter by letter: a dollar would begin a formula."""
    return printable(text).replace("$", r"\$")


def save_picture(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all.

    Raises:
        SparklingError: if it can't be written.
    """
    with whole_file(path) as part:
        figure.savefig(part, format="png")
