"""Train a config four ways, one after the other: grown as planned, and three controls.

    bash tools/quickstart.sh --compare

- from-scratch: the final widths from the start, over the same steps.
- never-grown: the first widths to the end, over the same steps.
- narrow-longer: the first widths over as many steps as take the compute that grown takes in all (6 x active parameters
  x tokens). Its learning-rate schedule is stretched by the same factor, warm-up and decay alike, to its own end.

All see the same tokens in the same order. Their directories lie side by side under --output; a table and a picture
compare what came out. All other arguments go to the four jobs (ds_sparkling/train.py --help).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ds_sparkling.job.launcher import add_launcher_options
from ds_sparkling.spec.command_line import ends_in_words, path_argument


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="ds-sparkling compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--deepspeed_config", type=path_argument, required=True, metavar="FILE", help="the runs' JSON, with a growth"
    )
    parser.add_argument("--output", type=path_argument, metavar="DIR", help="where the runs lie; default: runs/...")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the comparison in --output, where each run has stopped"
    )
    add_launcher_options(parser)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    args, job = parser.parse_known_args(argv)
    if args.variant is not None:
        parser.error("--variant: a comparison runs all of them")
    return args, job


@ends_in_words()
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: the runs, then the table and the picture."""
    args, job = _parse(argv)
    from ds_sparkling.job.side_by_side import compare, say  # here, so that --help doesn't wait for torch

    say("\n" + compare(args, job))


if __name__ == "__main__":
    main()
