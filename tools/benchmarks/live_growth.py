"""Growing a live engine, timed and weighed against a bare memory copy and against the way through files."""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.multiprocessing

from benchmarks.common import EXPERT_PARALLEL, free_port
from benchmarks.grown_models import GrowthCase, Sample

_MIB = 2**20

#: Header and format of every column, in the order of Row's fields.
COLUMNS = (
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
LEGEND = f"""\
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
