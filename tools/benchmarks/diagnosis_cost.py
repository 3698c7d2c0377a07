"""What diagnosing an engine costs, as the ranks measure it; what it means stands in ``benchmarks/step.py``."""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.multiprocessing

from benchmarks.common import free_port
from ds_sparkling.models.olmoe import OlmoeConfig, olmoe_factory
from ds_sparkling.models.text import Corpus
from ds_sparkling.progress import progress_bar

RANKS = 2
#: Steps between diagnoses, an even number.
EVERY = 50


@dataclass(frozen=True)
class Prices:
    """Times of a step in ms, medians on the first rank.

    Attributes:
        steps: steps taken, every other one without diagnoses.
        off: of a step without.
        ordinary: of a step with, that isn't diagnosed itself.
        diagnosed: of one that is.
        ratio: (49 ordinary + 1 diagnosed) / 50, in steps without diagnoses.
    """

    steps: int
    off: float
    ordinary: float
    diagnosed: float
    ratio: float


def prices(config: Mapping[str, Any], windows: int) -> Prices:
    """Train the job of ``config`` on CPU processes of one thread each, its growth done.

    Args:
        config: the main job's config; its growth is the first planned one.
        windows: how many diagnoses, and the steps before each.
    """
    with tempfile.TemporaryDirectory(prefix="bench-diagnosis-") as directory:
        arguments = (free_port(), json.dumps(config), windows, directory)
        torch.multiprocessing.start_processes(_rank, args=arguments, nprocs=RANKS, start_method="spawn")
        return Prices(**json.loads((Path(directory) / "prices.json").read_text()))


def _rank(rank: int, port: int, text: str, windows: int, directory: str) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", LOCAL_WORLD_SIZE=str(RANKS))
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what DeepSpeed prints must not get into the table
    from benchmarks.family_ranks import join

    join(rank, RANKS, port)
    config = json.loads(text)
    config["tensorboard"] = {"enabled": True, "output_path": directory, "job_name": "tensorboard"}
    job = _Job(config)
    job.window()  # the growth's own measurements
    with progress_bar(range(windows), desc="diagnoses", shown=rank == 0, leave=True) as bar:
        times = [job.window() for _ in bar]
    if rank == 0:
        (Path(directory) / "prices.json").write_text(json.dumps(asdict(summary(times))))
    sys.stderr.flush()
    os._exit(0)  # with several ranks, the interpreter's own way out aborts now and then in a thread of the backend


def summary(windows: Sequence[Sequence[float]]) -> Prices:
    """From the times of all steps, window by window: every other step is taken with diagnoses, and the last is one."""
    off = statistics.median(step for window in windows for step in window[0::2])
    ordinary = statistics.median(step for window in windows for step in window[1:-1:2])
    diagnosed = statistics.median(window[-1] for window in windows)
    ratio = ((EVERY - 1) * ordinary + diagnosed) / EVERY / off
    return Prices(len(windows) * EVERY, off, ordinary, diagnosed, ratio)


class _Job:
    """The main job's model, engine and data, just after its growth."""

    def __init__(self, config: dict[str, Any]) -> None:
        import ds_sparkling

        self.length = config["training"]["sequence_length"]
        self.corpus = Corpus.standard_library()
        widths = config["sparkling"].pop("growths")[0]["widths"]
        model = OlmoeConfig(**config.pop("model"))
        torch.manual_seed(0)
        self.engine = ds_sparkling.initialize(olmoe_factory(model), config)
        self._step()
        self.engine = ds_sparkling.grow(self.engine, widths)
        while self.engine.global_steps % EVERY:
            self._step()

    def window(self) -> list[float]:
        """Take the steps up to the next diagnosis, with ``diagnose_every`` at 0 and at 50 by turns; ms of each."""
        times = []
        for number in range(1, EVERY + 1):
            run = self.engine.sparkling
            config = replace(run.config, diagnose_every=0 if number % 2 else EVERY)
            self.engine.sparkling = replace(run, config=config)
            times.append(self._step())
        return times

    def _step(self) -> float:
        start = time.perf_counter()
        micro_batch = self.engine.train_batch_size() // self.engine.gradient_accumulation_steps()
        batch = self.corpus.batch(
            self.engine.micro_steps,
            size=micro_batch,
            length=self.length,
            seed=0,
            rank=torch.distributed.get_rank(),
            ranks=RANKS,
        )
        self.engine.backward(self.engine(**batch))
        self.engine.step()
        torch.distributed.barrier()
        return (time.perf_counter() - start) * 1e3
