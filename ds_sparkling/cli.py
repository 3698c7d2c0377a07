"""The ``ds-sparkling`` command: one subcommand per tool."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import NamedTuple

from ds_sparkling.spec.command_line import ends_in_words


class Command(NamedTuple):
    """A subcommand: the module whose ``main`` runs it, and one line of help."""

    module: str
    help: str


COMMANDS = {
    "train": Command("ds_sparkling.job.command", "train a mixture-of-experts language model and widen it mid-way"),
    "compare": Command(
        "ds_sparkling.job.compare",
        "train a config grown, wide from scratch, and narrow by tokens and by compute",
    ),
    "report": Command("ds_sparkling.report.command", "compare runs on one page: curves, figures and a verdict"),
    "expand-zero-ckpt": Command(
        "ds_sparkling.checkpoint.command", "widen, reshape or export a ZeRO checkpoint offline"
    ),
    "check-growth": Command(
        "ds_sparkling.check.command", "grow a small instance of a model and see whether that keeps what it promises"
    ),
    "plot-schedule": Command(
        "ds_sparkling.planner.plot_schedule",
        "learning rates of every birth, before the run, as text and picture",
    ),
    "plan-growth": Command(
        "ds_sparkling.planner.command", "parameters, compute, memory, bytes and pause of a growth, before the run"
    ),
}


@ends_in_words()
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the ``ds-sparkling`` console script."""
    commands = "\n".join(f"  {name:<18}{command.help}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="ds-sparkling",
        description="Widen a mixture-of-experts model in the middle of DeepSpeed training.",
        epilog=f"commands:\n{commands}\n\n'ds-sparkling COMMAND --help' tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    importlib.import_module(COMMANDS[arguments.command].module).main(arguments.arguments)


if __name__ == "__main__":
    main()
