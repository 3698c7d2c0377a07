"""Learning rates of old elements and of every growth's new ones, before the run: as text and as a picture.

    python tools/plot_schedule.py configs/quickstart.json

The curves (compare the paper's Fig. 8) come out of the schedulers that train: the base scheduler that the JSON asks
for, DeepSpeed's or torch's, and the re-warm-up of its "sparkling" block, stepped without a model. Without a "scheduler"
block the base rate is constant. A scheduler made in Python, passed to initialize as lr_scheduler=, isn't in a JSON; to
see its curves, name it as the "scheduler" of a copy. optimizer.params.lr is the rate shown: parameter groups with rates
of their own, and steps that fp16 skips, aren't foreseen.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ds_sparkling.errors import ConfigError, SparklingError
from ds_sparkling.figures import add_picture_options, check_picture_options, empty_picture, save_picture
from ds_sparkling.planner.rate_curves import RateCurves, describe, simulate
from ds_sparkling.spec.config import planned_steps, read_json, sparkling_config, value_at

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Points of a curve in the picture, at most.
_POINTS = 20_000


def curves_of(config: Mapping[str, Any], steps: int | None = None) -> RateCurves:
    """The curves of a DeepSpeed config with a ``"sparkling"`` block.

    Args:
        config: the parsed JSON.
        steps: optimizer steps in all; by default, what the config says.

    Raises:
        ConfigError: names the key.
    """
    block = sparkling_config(config)
    if steps is None:
        steps = planned_steps(config)
    if steps is None:
        raise ConfigError(
            "the config doesn't tell how many steps the run has (training.steps or scheduler.params.total_num_steps): "
            "pass --steps N"
        )
    lr = _lr(config)
    with _quiet():
        # Here, so that --help doesn't wait for DeepSpeed.
        from ds_sparkling.engine.base_scheduler import scheduler_from_json

        return simulate(block, steps, lr, lambda optimizer: scheduler_from_json(config, optimizer))


def picture(curves: RateCurves, title: str) -> Figure:
    """Rates over steps, with a vertical line at every growth; 800 x 400 pixels.

    Raises:
        SparklingError: if matplotlib isn't installed.
    """
    figure, axes = empty_picture(title, "optimizer step", "learning rate")
    # All steps up to a number far beyond the pixels, and every step where a curve turns.
    steps = np.union1d(np.linspace(0, curves.steps - 1, min(curves.steps, _POINTS), dtype=int), [*curves.landmarks()])
    old = "base schedule" if curves.together else "old elements (base schedule)"
    axes.plot(steps, curves.base[steps], label=old)
    for name, rates in curves.shown.items():
        axes.plot(steps, rates[steps], label=name if curves.together else f"new elements of {name}")
    for number in range(1, len(curves.births) + 1):
        _mark_growth(axes, curves, number)
    axes.set_xlim(0, curves.steps)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _mark_growth(axes: Axes, curves: RateCurves, number: int) -> None:
    """A vertical line at a growth, with its name beside it, away from the vertical axis."""
    step = curves.span(number).start
    left = step > curves.steps / 4
    axes.axvline(step, color="0.4", linestyle="--", linewidth=0.8)
    axes.annotate(
        f"growth {number}, step {step}",
        (step, 0.02),
        xycoords=("data", "axes fraction"),
        xytext=(-3 if left else 3, 0),
        textcoords="offset points",
        rotation=90,
        horizontalalignment="right" if left else "left",
        fontsize="small",
    )


def _lr(config: Mapping[str, Any]) -> float:
    lr = value_at(config, "optimizer.params.lr")
    if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not (math.isfinite(lr) and lr >= 0):
        raise ConfigError(f"optimizer.params.lr must be the optimizer's learning rate, got {lr!r}")
    return float(lr)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No log messages below errors: on stdout, DeepSpeed warns of a missing accelerator and of a fresh schedule."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="plot_schedule.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help='a DeepSpeed JSON with a "sparkling" block')
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="optimizer steps of the run (default: training.steps, else scheduler.params.total_num_steps)",
    )
    add_picture_options(parser, "-schedule.png")
    args = parser.parse_args(argv)
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps must be positive, got {args.steps}")
    check_picture_options(parser, args, f"{args.config.stem}-schedule.png")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: write the text, then the picture."""
    args = _parse(argv)
    try:
        curves = curves_of(read_json(args.config), args.steps)
        sys.stdout.write(describe(curves) + "\n")
        if not args.no_picture:
            save_picture(picture(curves, f"Learning rates of {args.config.name}"), args.output)
            sys.stdout.write(f"\npicture: {args.output}\n")
    except SparklingError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
