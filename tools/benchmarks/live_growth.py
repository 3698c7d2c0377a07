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
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.multiprocessing

from benchmarks.common import free_port, table
from benchmarks.grown_models import EXPERT_PARALLEL, GrowthCase, Sample
from ds_sparkling.progress import progress_bar

_MIB = 2**20

#: Header and format of every column, in the order of Row's fields.
_COLUMNS = (
    ("ranks", "{:d}"),
    ("parameters", "{:,d}"),
    ("after", "{:,d}"),
    ("grow [s]", "{:.3f}"),
    ("engine start [s]", "{:.3f}"),
    ("memory copy [s]", "{:.3f}"),
    ("save+convert+load [s]", "{:.3f}"),
    ("peak [MiB]", "{:.0f}"),
    ("budget [MiB]", "{:.0f}"),
    ("(grow-start)/copy", "{:.2f}"),
    ("s+c+l/grow", "{:.2f}"),
    ("peak/budget", "{:.3f}"),
)
_LEGEND = f"""\
Medians, on the slowest rank. grow includes engine start. memory copy: clone of the grown rank's weights and moments.
budget: old fp32 weights and moments + grown engine. Experts over {EXPERT_PARALLEL} ranks where there is more than one.
"""


@dataclass(frozen=True)
class LiveRow:
    """One line of the table, and one object of the JSON file: counts, seconds, MiB and ratios."""

    ranks: int
    parameters_before: int
    parameters_after: int
    grow_s: float
    engine_start_s: float
    memory_copy_s: float
    save_convert_load_s: float
    peak_mib: float
    budget_mib: float
    move_over_copy: float
    save_convert_load_over_grow: float
    peak_over_budget: float

    @classmethod
    def from_samples(cls, case: GrowthCase, samples: Sequence[Sample]) -> LiveRow:
        grow = statistics.median(sample.grow for sample in samples)
        start = statistics.median(sample.engine_start for sample in samples)
        copy = statistics.median(sample.memory_copy for sample in samples)
        files = statistics.median(sample.through_files for sample in samples)
        peak = statistics.median(sample.peak for sample in samples)
        budget = statistics.median(sample.budget for sample in samples)
        return cls(
            ranks=case.ranks,
            parameters_before=case.parameters_before,
            parameters_after=case.parameters_after,
            grow_s=grow,
            engine_start_s=start,
            memory_copy_s=copy,
            save_convert_load_s=files,
            peak_mib=peak / _MIB,
            budget_mib=budget / _MIB,
            move_over_copy=(grow - start) / copy,
            save_convert_load_over_grow=files / grow,
            peak_over_budget=peak / budget,
        )


def measure(case: GrowthCase) -> LiveRow:
    """Run one case in processes of its own."""
    with tempfile.TemporaryDirectory(prefix="bench-regrow-") as directory:
        scratch = Path(directory)
        torch.multiprocessing.spawn(_rank, (case, free_port(), scratch), nprocs=case.ranks)
        samples = [Sample(**sample) for sample in json.loads((scratch / "samples.json").read_text())]
    return LiveRow.from_samples(case, samples)


def _rank(rank: int, case: GrowthCase, port: int, scratch: Path) -> None:
    """What every spawned process does; rank 0 leaves the samples in ``scratch``."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # must be set before DeepSpeed is imported
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what DeepSpeed prints must not get into the table
    from benchmarks.one_rank import joined, samples

    with joined(rank, case, port):
        taken = samples(case, scratch)
    if rank == 0:
        (scratch / "samples.json").write_text(json.dumps([asdict(sample) for sample in taken]))
    sys.stderr.flush()
    os._exit(0)  # with several ranks, the interpreter's own way out aborts now and then in a thread of the backend


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench_regrow.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[1, 2, 4], metavar="N", help="processes (default: 1 2 4)"
    )
    parser.add_argument(
        "--parameters",
        type=lambda text: int(float(text)),
        nargs="+",
        default=[5_000_000, 12_000_000, 25_000_000],
        metavar="N",
        help="parameters of the model before the growth, about (default: 5e6 12e6 25e6)",
    )
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="repetitions of every case (default: 3)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of every rank (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here too, case by case, as objects")
    args = parser.parse_args(argv)
    for ranks in args.ranks:
        if ranks < 1 or (ranks > 1 and ranks % EXPERT_PARALLEL):
            parser.error(f"--ranks {ranks}: 1, or a multiple of {EXPERT_PARALLEL} because experts are parallel")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: measure all cases and write the table."""
    args = _parse(argv)
    cases = [GrowthCase(ranks, size, args.repeat, args.threads) for size in args.parameters for ranks in args.ranks]
    rows: list[LiveRow] = []
    with progress_bar(cases, desc="benchmark", unit="case", leave=True) as bar:
        for case in bar:
            rows.append(measure(case))
            if args.json is not None:
                args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    sys.stdout.write(f"{table(_COLUMNS, rows)}\n\n{_LEGEND}")


if __name__ == "__main__":
    main()
