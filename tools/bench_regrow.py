"""What growing a live engine costs in time and memory, against a bare memory copy and against the way through files.

    python tools/bench_regrow.py --ranks 1 2 4 --parameters 5e6 12e6 25e6

The model is an OLMoE with 8 experts, trained on CPUs with ZeRO-3, fp32 and torch's AdamW for one step, so that the
moments exist; experts are parallel over pairs of ranks where there is more than one rank. The growth doubles the
hidden and the experts' inner width, so that the state grows about fourfold. Every case runs in processes of its own,
which do all of it once with a tiny model first, so that everything is imported. Figures are medians over the
repetitions. Linux only.

Times are wall times that begin at a barrier, on the slowest rank:

- grow: ds_sparkling.grow, without a checkpoint.
- engine start: ds_sparkling.initialize at the wide widths. It is a part of every growth.
- memory copy: src.clone() of as many bytes as the grown rank holds of fp32 weights and both moments, on all ranks at
  once. Like a growth, it writes to memory that the process has to ask the system for.
- save+convert+load: the plain way around a growth, not a clever one. The narrow engine saves a checkpoint; rank 0
  alone reads all ranks' optimizer files (memory-mapped), joins the whole fp32 weights and moments in its memory,
  widens them there and saves them in one file; every rank starts the wide engine and copies its own pieces out of
  that file (memory-mapped). Both ways must end in the same state, or the benchmark fails.

Memory is anonymous resident memory per rank, above what the process held before it had an engine of this size (and
after the tiny one was destroyed: the modules that DeepSpeed imports on the way are no part of it):

- peak: during grow. VmHWM, the kernel's exact high-water mark of resident memory, reset just before grow through
  /proc/self/clear_refs, less the resident pages of files and shared memory. Before the reset, garbage is collected and
  free heap given back to the kernel (malloc_trim), so that leftovers of the training step don't count.
- budget: old master state (the fp32 weights and moments that the rank holds of the narrow engine) + new engine
  (RssAnon after grow, garbage collected and heap trimmed).

The rank with the largest peak/budget counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from benchmarks.common import EXPERT_PARALLEL, table
from ds_sparkling.spec.command_line import ends_in_words, path_argument, positive, positive_float


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench_regrow.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--ranks", type=positive, nargs="+", default=[1, 2, 4], metavar="N", help="processes (default: 1 2 4)"
    )
    parser.add_argument(
        "--parameters",
        type=lambda text: int(positive_float(text)),
        nargs="+",
        default=[5_000_000, 12_000_000, 25_000_000],
        metavar="N",
        help="parameters of the model before the growth, about (default: 5e6 12e6 25e6)",
    )
    parser.add_argument(
        "--repeat", type=positive, default=3, metavar="N", help="repetitions of every case (default: 3)"
    )
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="threads of every rank (default: 1)")
    parser.add_argument(
        "--json", type=path_argument, metavar="FILE", help="write the rows here too, case by case, as objects"
    )
    args = parser.parse_args(argv)
    for ranks in args.ranks:
        if ranks < 1 or (ranks > 1 and ranks % EXPERT_PARALLEL):
            parser.error(f"--ranks {ranks}: 1, or a multiple of {EXPERT_PARALLEL} because experts are parallel")
    return args


@ends_in_words()
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: measure all cases and write the table."""
    args = _parse(argv)
    # Here, so that --help doesn't wait for torch.
    from benchmarks.grown_models import GrowthCase
    from benchmarks.live_growth import COLUMNS, LEGEND, LiveRow, measure
    from ds_sparkling.progress import progress_bar

    cases = [GrowthCase(ranks, size, args.repeat, args.threads) for size in args.parameters for ranks in args.ranks]
    rows: list[LiveRow] = []
    with progress_bar(cases, desc="benchmark", unit="case", leave=True) as bar:
        for case in bar:
            rows.append(measure(case))
            if args.json is not None:
                args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    sys.stdout.write(f"{table(COLUMNS, rows)}\n\n{LEGEND}")


if __name__ == "__main__":
    main()
