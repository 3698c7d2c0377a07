"""The ``ds-sparkling`` command: one subcommand per tool."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence

from ds_sparkling.job.launcher import launcher_command


def _train(arguments: Sequence[str]) -> None:
    """Start the main job under DeepSpeed's launcher."""
    parser = argparse.ArgumentParser(
        prog="ds-sparkling train",
        description="Start ds_sparkling/train.py under the deepspeed launcher. All other arguments go to the job.",
        add_help=False,
    )
    parser.add_argument(
        "--num_gpus", default="2", help="processes to start on this machine (CPU processes without GPU)"
    )
    options, job = parser.parse_known_args(arguments)
    if {"-h", "--help"} & set(job):
        parser.print_help()
    sys.exit(subprocess.call(launcher_command(options.num_gpus, job)))


def _compare(arguments: Sequence[str]) -> None:
    from ds_sparkling.job.compare import main as compare

    compare(arguments)


def _plot_schedule(arguments: Sequence[str]) -> None:
    from ds_sparkling.planner.plot_schedule import main as plot

    plot(arguments)


def _check_growth(arguments: Sequence[str]) -> None:
    from ds_sparkling.check.command import main as check

    check(arguments)


def _plan_growth(arguments: Sequence[str]) -> None:
    from ds_sparkling.planner.command import main as plan

    plan(arguments)


def _report(arguments: Sequence[str]) -> None:
    from ds_sparkling.report.command import main as report

    report(arguments)


def _expand_zero_ckpt(arguments: Sequence[str]) -> None:
    from ds_sparkling.checkpoint.command import main as expand

    expand(arguments)


#: name -> (what runs it, one line of help)
COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "train": (_train, "train a mixture-of-experts language model and widen it mid-way"),
    "compare": (_compare, "train a config three ways: grown, the wide model from scratch, and never grown"),
    "report": (_report, "compare runs on one page: curves, figures and a verdict"),
    "expand-zero-ckpt": (_expand_zero_ckpt, "widen, reshape or export a ZeRO checkpoint offline"),
    "check-growth": (_check_growth, "grow a small instance of a model and see whether that keeps what it promises"),
    "plot-schedule": (_plot_schedule, "learning rates of every birth, before the run, as text and picture"),
    "plan-growth": (_plan_growth, "parameters, compute, memory, bytes and pause of a growth, before the run"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the ``ds-sparkling`` console script."""
    commands = "\n".join(f"  {name:<18}{text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="ds-sparkling",
        description="Widen a mixture-of-experts model in the middle of DeepSpeed training.",
        epilog=f"commands:\n{commands}\n\n'ds-sparkling COMMAND --help' tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    COMMANDS[arguments.command][0](arguments.arguments)


if __name__ == "__main__":
    main()
