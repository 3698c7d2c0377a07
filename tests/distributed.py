"""Ranks for tests: processes that are started once and then run any number of jobs together.

    results = workers(2).run(job, argument)     # job(argument) on both ranks; one result per rank

A job is a function at the top of a test module. If it raises on any rank the test fails with that rank's traceback. If
ranks hang, it fails with the stack of every thread of every rank.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any
from unittest import mock

from psutil import NoSuchProcess

from benchmarks.common import free_port
from patience import QUIET, Patience, family

#: Seconds that the others have once a rank has failed.
AFTER_A_FAILURE = 10.0
#: Jobs that ranks do before new ones take their place. DeepSpeed keeps every engine alive that was ever made, and each
#: expert-parallel group has threads that wake 20 times a second: together they would slow the later tests down.
JOBS = 12


def forking() -> Any:
    """The context of processes that start with what every rank needs imported.

    They have one seed for hashes, unlike ranks that a launcher starts.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rank_imports"])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # the server has no other way to tests/
        ensure_running()
    return context


class Workers:
    """``ranks`` processes that form one gloo world, and new ones after every :data:`JOBS` jobs.

    Args:
        quiet: seconds in which no rank has computed anything, after which they hang.
        environment: variables that every rank has besides.
    """

    def __init__(self, ranks: int, quiet: float = QUIET, environment: Mapping[str, str] | None = None) -> None:
        self.ranks = ranks
        self.quiet = quiet
        self.environment = dict(environment or {})
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        self._stacks: list[Path] = []
        self._jobs = 0

    def run(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        """Run ``job(*args)`` on every rank and return the results by rank."""
        answers = self.attempt(job, *args)
        failures = [f"--- rank {rank} ---\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
        if failures:
            raise AssertionError("\n".join(failures))
        return [result for _, result in answers]

    def attempt(self, job: Callable[..., Any], *args: Any) -> list[tuple[bool, Any]]:
        """Like :meth:`run`, but (True, result) or (False, traceback) per rank."""
        if self._jobs == JOBS:
            self.stop()
        if not self._processes:
            self._start()
        self._jobs += 1
        for connection in self._connections:
            connection.send((job, args))
        answers = self._collect()
        if missing := [rank for rank in range(self.ranks) if rank not in answers]:
            stacks = self._dump_stacks()
            answers |= {rank: (False, f"rank {rank} hangs\n{stacks[rank]}") for rank in missing}
        if any(not ok for ok, _ in answers.values()):
            self.stop()
        return [answers[rank] for rank in range(self.ranks)]

    def stop(self) -> None:
        for process in self._processes:
            for one in family(process.pid):  # loaders of data, too, which wouldn't notice
                with suppress(NoSuchProcess):
                    one.kill()
        for process in self._processes:
            process.join()
        for file in self._stacks:
            file.unlink()
        self._connections, self._processes, self._stacks, self._jobs = [], [], [], 0

    def _collect(self) -> dict[int, tuple[bool, Any]]:
        """The answers by rank, without those of ranks that hang."""
        answers: dict[int, tuple[bool, Any]] = {}
        patience = Patience([process.pid for process in self._processes], self.quiet)
        failed: float | None = None
        while len(answers) < self.ranks and not patience.is_over():
            if failed is not None and time.monotonic() - failed > AFTER_A_FAILURE:
                break
            missing = [rank for rank in range(self.ranks) if rank not in answers]
            ready = wait([self._connections[rank] for rank in missing], timeout=1.0)
            for rank in (rank for rank in missing if self._connections[rank] in ready):
                try:
                    answers[rank] = self._connections[rank].recv()
                except EOFError:
                    answers[rank] = (False, f"rank {rank} died")
                if failed is None and not answers[rank][0]:
                    failed = time.monotonic()
        return answers

    def _dump_stacks(self) -> list[str]:
        """Of every rank the stacks of its threads, the one that runs the job last."""
        for process in self._processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(1)
        return [file.read_text() for file in self._stacks]

    def _start(self) -> None:
        context, port = forking(), free_port()
        for rank in range(self.ranks):
            ours, theirs = context.Pipe()
            descriptor, stacks = tempfile.mkstemp(prefix=f"stacks-of-rank-{rank}-")
            os.close(descriptor)
            process = context.Process(target=_serve, args=(rank, self.ranks, port, theirs, stacks, self.environment))
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
            self._stacks.append(Path(stacks))


def _serve(
    rank: int, ranks: int, port: int, connection: Connection, stacks: str, environment: Mapping[str, str]
) -> None:
    faulthandler.register(signal.SIGUSR1, file=open(stacks, "w"), all_threads=True)  # noqa: SIM115 - for good
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        **environment,
    )
    import deepspeed
    import torch

    torch.set_num_threads(1)
    deepspeed.init_distributed(verbose=False)
    while True:
        # Building an engine collects garbage several times; don't make it walk through every imported module.
        gc.collect()
        gc.freeze()
        try:
            job, args = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, job(*args))
        except Exception:
            answer = (False, traceback.format_exc())
        _forget_expert_groups()
        connection.send(answer)


def _forget_expert_groups() -> None:
    """DeepSpeed keeps expert-parallel groups by size and would use the largest of any earlier job's."""
    from deepspeed.utils import groups

    for name in ("_EXPERT_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP"):
        getattr(groups, name).clear()
        getattr(groups, f"{name}_RANKS").clear()
