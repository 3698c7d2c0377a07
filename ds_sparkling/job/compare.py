"""Train a config three ways, one after the other: grown as planned, the wide model from scratch, and never grown.

    bash tools/quickstart.sh --compare

All three see the same tokens in the same order on the same schedule. Their directories lie side by side under
--output; a table compares what came out. All other arguments go to the three jobs (ds_sparkling/train.py --help).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ds_sparkling.errors import SparklingError
from ds_sparkling.job.launcher import add_launcher_options


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="ds-sparkling compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--deepspeed_config", required=True, metavar="FILE", help="the runs' JSON, with a growth")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where the three runs lie; default: runs/...")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the comparison in --output, where each run has stopped"
    )
    add_launcher_options(parser)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    args, job = parser.parse_known_args(argv)
    if args.variant is not None:
        parser.error("--variant: a comparison runs all of them")
    return args, job


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: the three runs, then the table."""
    args, job = _parse(argv)
    from ds_sparkling.job.side_by_side import compare, say  # here, so that --help doesn't wait for torch

    try:
        say("\n" + compare(args, job))
    except SparklingError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:  # the job has got it, too
        sys.exit(130)


if __name__ == "__main__":
    main()
