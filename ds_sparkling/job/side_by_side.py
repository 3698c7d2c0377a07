"""Runs of one config, one after the other into directories side by side, and the table that compares them."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ds_sparkling.errors import CheckpointError, ConfigError, SparklingError
from ds_sparkling.job.launcher import launcher_command, run_job
from ds_sparkling.job.loss_picture import draw_losses
from ds_sparkling.job.variant_config import as_variant
from ds_sparkling.job.variants import Variant
from ds_sparkling.spec.config import read_json
from ds_sparkling.spec.run_summary import RunSummary, read_summary
from ds_sparkling.text_tables import text_table


def compare(args: argparse.Namespace, job: Sequence[str]) -> str:
    """Run what isn't finished, and return the comparison as text.

    Args:
        args: the parsed command line.
        job: further arguments of each job.

    Raises:
        ConfigError: if the config plans no growth, or sends all runs' curves to one place.
        CheckpointError: if there are checkpoints and no ``--resume``, or the other way round.
        SparklingError: if a run fails.
    """
    config = read_json(args.deepspeed_config)
    for variant in Variant:  # what can't be is told before anything is trained
        as_variant(config, variant)
    if "tensorboard" in config:
        raise ConfigError("the config's tensorboard block would mix the runs' curves in one place; take it out")
    output = _output_directory(args)
    started = _started(output)
    if started and not args.resume:
        holders = ", ".join(str(output / variant.value) for variant in started)
        raise CheckpointError(f"{holders}: checkpoints are there; pass --resume to go on, or another --output DIR")
    if args.resume and not started:
        raise CheckpointError(f"--resume: there is no checkpoint of a comparison in {output}")
    for number, variant in enumerate(Variant, start=1):
        say(f"\n{number} of {len(Variant)}: {variant.value}")
        _train(args, job, output, variant, resume=variant in started)
    summaries = {variant: _summary(output / variant.value) for variant in Variant}
    runs = " ".join(str(output / variant.value) for variant in Variant)
    return "\n".join(
        [
            describe(summaries),
            "",
            draw_losses(summaries, output / "loss.png"),
            f"watch them:  tensorboard --logdir {output}",
            f"a report:    python tools/report.py {runs}",
        ]
    )


def _train(args: argparse.Namespace, job: Sequence[str], output: Path, variant: Variant, *, resume: bool) -> None:
    """One of the runs, from where it stands to its end."""
    own = ["--deepspeed_config", str(args.deepspeed_config), "--output", str(output / variant.value)]
    own += ["--variant", variant.value, *(["--resume"] if resume else [])]
    status = run_job(launcher_command(args.num_gpus, [*job, *own], args.master_port))
    if status:
        way_out = f"pass --resume --output {output}" if _started(output) else "start again"
        raise SparklingError(f"the {variant.value} run ended with status {status}; to go on, {way_out}")


def describe(summaries: Mapping[Variant, RunSummary]) -> str:
    """The runs as a table, and what the grown one has cost and given against the others."""
    header = ("", "validation loss", "parameters", "active", "tokens", "compute [FLOPs]", "time [s]")
    body = [
        (
            variant.value,
            f"{run.validation_loss:.4f}",
            f"{run.parameters:,}",
            f"{run.active_parameters:,}",
            f"{run.tokens:,}",
            f"{run.flops:.3e}",
            f"{run.seconds:.0f}",
        )
        for variant, run in summaries.items()
    ]
    lines = text_table([header, *body], left=[0])
    grown = summaries[Variant.GROWN]
    for variant, other in summaries.items():
        if variant is not Variant.GROWN:
            lines.append(
                f"grown against {variant.value}: loss {grown.validation_loss - other.validation_loss:+.4f}, with "
                f"{grown.tokens / other.tokens:.2f} of its tokens, {grown.flops / other.flops:.2f} of its compute and "
                f"{grown.seconds / other.seconds:.2f} of its time"
            )
    return "\n".join([*lines, "one run each: other seeds give other differences, and a busy machine other times"])


def _output_directory(args: argparse.Namespace) -> Path:
    """Where the runs lie: as asked for, else a new one; with ``--resume``, the latest."""
    if args.output is not None:
        return args.output
    stem = f"{args.deepspeed_config.stem}-compare"
    if not args.resume:
        return Path("runs") / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    earlier = sorted(path for path in Path("runs").glob(f"{stem}-*") if _started(path))
    if not earlier:
        raise CheckpointError(
            f"--resume: found no comparison of {args.deepspeed_config} under runs/; pass --output DIR"
        )
    return earlier[-1]


def _started(output: Path) -> list[Variant]:
    """The runs that there are checkpoints of."""
    return [variant for variant in Variant if (output / variant.value / "checkpoints" / "latest").is_file()]


def _summary(directory: Path) -> RunSummary:
    summary = read_summary(directory)
    if summary is None:
        raise SparklingError(f"the run in {directory} has ended without a summary; go on with --resume")
    return summary


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
