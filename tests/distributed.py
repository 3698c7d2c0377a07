"""Ranks for tests: processes that are started once and then run any number of jobs together.

    results = workers(2).run(job, argument)     # job(argument) on both ranks; one result per rank

A job is a function at the top of a test module. If it raises on any rank the test fails with that rank's traceback.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

#: A rank that takes longer hangs; DeepSpeed compiles an op of its own the first time, for a minute or two.
_TIMEOUT = 300.0


class Workers:
    """``ranks`` processes that form one gloo world."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._connections: list[Connection] = []
        self._processes: list[Any] = []

    def run(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        """Run ``job(*args)`` on every rank and return the results by rank."""
        answers = self.attempt(job, *args)
        failures = [f"--- rank {rank} ---\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))
        return [result for _, result in answers]

    def attempt(self, job: Callable[..., Any], *args: Any) -> list[tuple[bool, Any]]:
        """Like :meth:`run`, but (True, result) or (False, traceback) per rank."""
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((job, args))
        answers: list[tuple[bool, Any]] = []
        for rank, connection in enumerate(self._connections):
            patience = 10.0 if any(not ok for ok, _ in answers) else _TIMEOUT
            try:
                answers.append(connection.recv() if connection.poll(patience) else (False, f"rank {rank} hangs"))
            except EOFError:
                answers.append((False, f"rank {rank} died"))
        if any(not ok for ok, _ in answers):
            self.stop()
        return answers

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._connections, self._processes = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.ranks, port, theirs))
            process.start()
            self._connections.append(ours)
            self._processes.append(process)


def _serve(rank: int, ranks: int, port: int, connection: Connection) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR="cpu",  # several ranks, wherever the tests run
        TORCHDYNAMO_DISABLE="1",  # Muon would compile its kernels on every rank
    )
    import logging
    import warnings

    import deepspeed
    import torch
    import torch._dynamo  # DeepSpeed's first engine would import it

    warnings.filterwarnings("ignore", category=FutureWarning)
    deepspeed.utils.logger.setLevel(logging.ERROR)
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
