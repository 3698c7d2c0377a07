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
import sys
from collections.abc import Sequence

from ds_sparkling.figures import add_picture_options, check_picture_options, save_picture
from ds_sparkling.spec.command_line import ends_in_words, path_argument, positive


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="plot_schedule.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "config", type=path_argument, metavar="CONFIG", help='a DeepSpeed JSON with a "sparkling" block'
    )
    parser.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help="optimizer steps of the run (default: training.steps, else scheduler.params.total_num_steps)",
    )
    add_picture_options(parser, "-schedule.png")
    args = parser.parse_args(argv)
    check_picture_options(parser, args, f"{args.config.stem}-schedule.png")
    return args


@ends_in_words()
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: write the text, then the picture."""
    args = _parse(argv)
    # Here, so that --help doesn't wait for torch.
    from ds_sparkling.planner.config_curves import curves_of
    from ds_sparkling.planner.curves_picture import picture
    from ds_sparkling.planner.rate_curves import describe
    from ds_sparkling.spec.config import read_json

    curves = curves_of(read_json(args.config), args.steps)
    sys.stdout.write(describe(curves) + "\n")
    if not args.no_picture:
        save_picture(picture(curves, f"Learning rates of {args.config.name}"), args.output)
        sys.stdout.write(f"\npicture: {args.output}\n")


if __name__ == "__main__":
    main()
