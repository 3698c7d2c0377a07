"""The main job's options, and ``ds-sparkling train``, which starts it under DeepSpeed's launcher."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ds_sparkling.job.launcher import add_launcher_options, launcher_command, run_job
from ds_sparkling.job.variants import Variant
from ds_sparkling.spec.command_line import ends_in_words, path_argument


def job_parser(prog: str, launcher: argparse.ArgumentParser | None = None) -> argparse.ArgumentParser:
    """The parser of the main job's command line.

    Args:
        prog: what the program is called.
        launcher: options of the launcher to go with them; None where it has been started already.
    """
    epilog = "Start it with a launcher: deepspeed --num_gpus 2 ds_sparkling/train.py --deepspeed_config FILE"
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Train a mixture-of-experts language model with DeepSpeed and widen it mid-way.",
        epilog=epilog if launcher is None else None,
        parents=[] if launcher is None else [launcher],
        allow_abbrev=launcher is None,
    )
    parser.add_argument(
        "--deepspeed_config", type=path_argument, required=True, metavar="FILE", help="the run's JSON (see configs/)"
    )
    parser.add_argument(
        "--data",
        type=path_argument,
        metavar="PATH",
        help="a text file, a directory of them, or a .npy of token ids; default: the standard library's own sources",
    )
    parser.add_argument(
        "--output", type=path_argument, metavar="DIR", help="checkpoints and TensorBoard files; default: runs/..."
    )
    parser.add_argument("--resume", action="store_true", help="go on from the latest checkpoint in --output")
    parser.add_argument(
        "--variant",
        choices=[variant.value for variant in Variant],
        default=Variant.GROWN.value,
        help="grown as planned, the final widths from scratch, the first ones as long, or the first ones for as much "
        "compute (default: %(default)s)",
    )
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    return parser


@ends_in_words()
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``ds-sparkling train``."""
    launcher = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_launcher_options(launcher)
    job_parser("ds-sparkling train", launcher).parse_args(argv)  # a mistake is told here, before any process is started
    options, job = launcher.parse_known_args(argv)
    sys.exit(run_job(launcher_command(options.num_gpus, job, options.master_port)))
