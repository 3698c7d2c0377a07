"""What an optimizer step costs once a tensor has grown, against the same optimizer's plain step.

    python tools/bench_step.py --elements 20e6 200e6 --threads 1 2
    python tools/bench_step.py --quickstart
    python tools/bench_step.py --diagnostics

A flat fp32 tensor on the CPU, as ZeRO makes it, holds one matrix of --row entries per row. It is stepped through
optimizer.step(), with the births told apart, where

- new columns: half of its elements are new, as every row's second half (its fan-in has doubled).
- new rows: half of its elements are new, as its second half (its fan-out has doubled).
- new columns, then rows: the fan-in doubled first and the fan-out one step later, so that three quarters are new, of
  two births.
- curves met: the columns are new, but their learning rate has come back to the base rate and their bias correction is
  as good as 1.
- by hand: what a birth-aware step takes the place of. The weights are cloned, everything is stepped with the base
  rate, and where a bool mask says so the step is stretched to ratio times its length:
  torch.where(new, before.lerp(after, ratio), after). It has one ratio and no bias correction of the new elements' own.
- by hand, buffer kept: the same in place, where the clone's memory is never given back.

New elements re-warm up towards 1.3 times the base rate and count Adam's steps from their birth. The gradient stays
the same. Every (optimizer, size, threads) has a process of its own, with that many threads for PyTorch and for OpenMP.
It takes up to 35 bytes of memory per element. Linux only.

- plain, step: ms of the optimizer's own step and of the step in question, by turns on the same tensor.
- ratio: of the minima, and of the medians.
- peak: bytes per element by which resident memory grows during a step (VmHWM, reset through /proc/self/clear_refs).

With --quickstart, the main job is run instead: configs/quickstart.json, shortened, on two CPU processes with one thread
each; the growth comes after a third of the steps. It is run as it is (birth-aware), and with rewarmup.scope "none" and
bias_correction "inherit" (plain). Times are those between optimizer steps as TensorBoard has them, from 20 steps after
the growth to the end, everything included: forward, backward, communication, step.

With --diagnostics, the quickstart's model is trained on two CPU processes after its growth, with TensorBoard on. Every
other step is taken with diagnose_every 0, the others with 50. Times are medians: of a step without diagnoses, of an
ordinary step with them, and of a diagnosed step, which every 50th is. The ratio is that of 49 ordinary steps and a
diagnosed one to 50 without. --hidden and --inner make the model larger: the widths before the growth, which
doubles them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.common import QUICKSTART, table
from benchmarks.optimizers import OPTIMIZERS
from ds_sparkling.spec.command_line import ends_in_words, path_argument, positive, positive_float

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_DEFAULT = ("adamw-fused", "deepspeed-cpu-adam")
#: Steps of a main job in which enough are left after the growth.
_FEWEST = 60


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench_step.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        nargs="+",
        default=list(_DEFAULT),
        metavar="NAME",
        help=f"of {', '.join(OPTIMIZERS)} (default: {' '.join(_DEFAULT)})",
    )
    parser.add_argument(
        "--elements",
        type=lambda text: int(positive_float(text)),
        nargs="+",
        default=[20_000_000, 200_000_000],
        metavar="N",
        help="elements of the tensor, cut to an even number of rows (default: 20e6 200e6)",
    )
    parser.add_argument(
        "--row", type=positive, default=1024, metavar="N", help="entries of a row, even (default: 1024)"
    )
    parser.add_argument(
        "--threads", type=positive, nargs="+", default=[1, 2], metavar="N", help="threads (default: 1 2)"
    )
    parser.add_argument("--repeat", type=positive, default=20, metavar="N", help="steps of each kind (default: 20)")
    parser.add_argument(
        "--quickstart",
        type=positive,
        nargs="?",
        const=300,
        metavar="STEPS",
        help="measure the main job instead, in runs of STEPS steps (300 if not given)",
    )
    parser.add_argument(
        "--diagnostics",
        type=positive,
        nargs="?",
        const=20,
        metavar="N",
        help="measure the diagnosis instead, N times in 50 N steps (20 if not given)",
    )
    parser.add_argument("--hidden", type=positive, metavar="N", help="hidden_size with --diagnostics (default: 64)")
    parser.add_argument(
        "--inner", type=positive, metavar="N", help="moe_intermediate_size with --diagnostics (default: 32)"
    )
    parser.add_argument(
        "--runs", type=positive, default=1, metavar="N", help="runs of the main job each way (default: 1)"
    )
    parser.add_argument("--json", type=path_argument, metavar="FILE", help="write the rows here too, as objects")
    args = parser.parse_args(argv)
    _check(parser, args)
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.row % 2:
        parser.error(f"--row {args.row}: must be even, as half of a row is new")
    if min(args.elements) < 2 * args.row:
        parser.error(f"--elements {min(args.elements)}: must be two rows at least, {2 * args.row}")
    if args.quickstart is not None and args.quickstart < _FEWEST:
        parser.error(f"--quickstart {args.quickstart}: must be {_FEWEST} steps at least")
    for name in ("quickstart", "diagnostics"):
        if getattr(args, name) is not None and not QUICKSTART.is_file():
            parser.error(f"--{name}: needs {QUICKSTART}, which only a checkout of the repository has")


def _write(path: Path | None, rows: Sequence[DataclassInstance]) -> None:
    if path is not None:
        path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def _measure_steps(args: argparse.Namespace) -> None:
    from benchmarks.step_cost import COLUMNS, LEGEND, StepCase, StepRow, measure
    from ds_sparkling.progress import progress_bar

    cases = [
        StepCase(optimizer, elements // (2 * args.row) * 2 * args.row, args.row, threads, args.repeat)
        for optimizer in args.optimizer
        for elements in args.elements
        for threads in args.threads
    ]
    rows: list[StepRow] = []
    with progress_bar(cases, desc="benchmark", unit="case", leave=True) as bar:
        for case in bar:
            rows += measure(case)
            _write(args.json, rows)
    sys.stdout.write(f"{table(COLUMNS, rows)}\n\n{LEGEND}")


def _measure_job(args: argparse.Namespace) -> None:
    from benchmarks.step_cost import JOB_COLUMNS, JOB_LEGEND, measure_job

    rows = measure_job(args.quickstart, args.runs)
    _write(args.json, rows)
    sys.stdout.write(f"{table(JOB_COLUMNS, rows)}\n\n{JOB_LEGEND}")


def _measure_diagnosis(args: argparse.Namespace) -> None:
    from benchmarks.diagnosis_cost import prices
    from benchmarks.step_cost import PRICE_COLUMNS, PRICE_LEGEND, diagnosed_config

    found = prices(diagnosed_config(args.hidden, args.inner), args.diagnostics)
    _write(args.json, [found])
    sys.stdout.write(f"{table(PRICE_COLUMNS, [found])}\n\n{PRICE_LEGEND}")


@ends_in_words()
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: measure what was asked for and write the table."""
    args = _parse(argv)
    if args.diagnostics is not None:
        _measure_diagnosis(args)
    elif args.quickstart is not None:
        _measure_job(args)
    else:
        _measure_steps(args)


if __name__ == "__main__":
    main()
