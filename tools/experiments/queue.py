"""Runs in processes of their own, several at a time; what branches off a trunk waits for it."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ds_sparkling.errors import SparklingError
from ds_sparkling.progress import progress_bar
from experiments.loop import train
from experiments.runs import Outcome, TrainingRun
from experiments.store import Store

#: Counts the steps of all processes, and tells them to stop; set in each.
_counter: Any = None
_stop: Any = None


@dataclass
class _Job:
    """A run, and the steps at which others want it kept."""

    run: TrainingRun
    keep: set[int] = field(default_factory=set)
    wanted: bool = False


class Queue:
    """Trains runs that the store doesn't have yet.

    Args:
        store: gets every outcome as soon as it is there.
        snapshots: where trunks are kept meanwhile.
        jobs: processes at a time.
    """

    def __init__(self, store: Store, snapshots: Path, jobs: int) -> None:
        self.store = store
        self.snapshots = snapshots
        self.jobs = jobs
        self.failures: dict[str, str] = {}

    def finish(self, wanted: Callable[[], Iterable[TrainingRun]]) -> None:
        """Train until ``wanted``, which may come to name more as outcomes come in, names none that is missing."""
        context = multiprocessing.get_context("spawn")
        counter, stop = context.Value("q", 0), context.Event()
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        with (
            ProcessPoolExecutor(self.jobs, context, initializer=_start, initargs=(counter, stop, threads)) as pool,
            progress_bar(total=0, unit="step", smoothing=0.05, leave=True) as bar,
        ):
            try:
                self._work(pool, wanted, counter, bar)
            except BaseException:
                stop.set()  # leaving the pool waits for its processes
                raise

    def _work(self, pool: Executor, wanted: Callable[[], Iterable[TrainingRun]], counter: Any, bar: tqdm[Any]) -> None:
        """Keep the pool busy until nothing is wanted any more."""
        running: dict[Future[Outcome | None], _Job] = {}
        finished = 0
        while True:
            jobs = self._open(wanted(), [job.run.key for job in running.values()])
            bar.total = finished + sum(_steps(job) for job in [*jobs, *running.values()])
            for job in jobs:
                # No more than can run, so that those named later can still come first.
                if len(running) < self.jobs and self._ready(job):
                    running[pool.submit(_train, job.run, self.snapshots, tuple(sorted(job.keep)), job.wanted)] = job
            if not running:
                return
            done = self._watch(running, counter, bar, len(jobs))
            for future in done:
                job = running.pop(future)
                finished += _steps(job)
                self._collect(job, future)

    def _watch(
        self, running: Collection[Future[Outcome | None]], counter: Any, bar: tqdm[Any], left: int
    ) -> set[Future[Outcome | None]]:
        """Show the progress until a job is done; only for a second while a process has nothing to do."""
        while True:
            done, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
            bar.set_postfix(finished=len(self.store.outcomes), left=left, refresh=False)
            bar.update(counter.value - bar.n)
            if done or len(running) < self.jobs:
                return done

    def _open(self, wanted: Iterable[TrainingRun], running: list[str]) -> list[_Job]:
        """What is to be trained still, in the order in which it is wanted; trunks before the first that needs them."""
        jobs: dict[str, _Job] = {}
        for run in wanted:
            if run.key in self.store.outcomes or run.key in self.failures:
                continue
            step, trunk = run.first_growth, run.trunk
            if step is not None and not self._snapshot(run).exists() and trunk.key not in self.failures:
                jobs.setdefault(trunk.key, _Job(trunk)).keep.add(step)
            jobs.setdefault(run.key, _Job(run)).wanted = True
        return [job for job in jobs.values() if job.run.key not in running]

    def _ready(self, job: _Job) -> bool:
        run = job.run
        return not run.stages or self._snapshot(run).exists() or run.trunk.key in self.failures

    def _snapshot(self, run: TrainingRun) -> Path:
        return self.snapshots / f"{run.trunk.key}-{run.first_growth}.pt"

    def _collect(self, job: _Job, future: Future[Outcome | None]) -> None:
        try:
            outcome = future.result()
        except BrokenProcessPool:
            raise SparklingError(
                "a process that was training died, perhaps for want of memory; finished runs are kept, and the same "
                "command goes on (with --jobs 1 it needs least)"
            ) from None
        except Exception as error:  # whatever stops one run must not stop the others
            self.failures[job.run.key] = str(error) if isinstance(error, SparklingError) else repr(error)
            return
        if outcome is not None:
            self.store.add(job.run, outcome)


def _steps(job: _Job) -> int:
    """Steps that a job takes."""
    run = job.run
    if run.stages:
        return run.steps - (run.first_growth or 0)
    return run.steps if job.wanted else max(job.keep)


def _start(counter: Any, stop: Any, threads: int) -> None:
    """Set up a process. Ctrl-C is for the parent, which then tells it to stop."""
    global _counter, _stop
    _counter, _stop = counter, stop
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _train(run: TrainingRun, snapshots: Path, keep: tuple[int, ...], wanted: bool) -> Outcome | None:
    """One job; of a trunk whose outcome nobody wants, only up to where the last branch begins."""

    parent = multiprocessing.parent_process()

    def report() -> None:
        if _stop.is_set() or parent is None or not parent.is_alive():
            os._exit(1)
        with _counter.get_lock():
            _counter.value += 1

    return train(run, snapshots, keep, None if wanted else max(keep), report)
