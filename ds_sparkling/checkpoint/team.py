"""Several processes that write one checkpoint together, as ``torchrun`` starts them; or one alone."""

from __future__ import annotations

import datetime
import gc
import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

import torch.distributed as dist

from ds_sparkling.errors import CheckpointError

_T = TypeVar("_T")

#: Seconds that taking the process group apart may take.
_PATIENCE = 10.0


class LostProcessError(CheckpointError):
    """Another process of the job has ended without a word, so that nobody can tell why."""


class Team:
    """The processes of this job; use as a context manager.

    Attributes:
        rank: this process.
        size: how many there are.
    """

    def __init__(self) -> None:
        launched = dist.is_torchelastic_launched()  # clusters set RANK and WORLD_SIZE for jobs of other kinds, too
        self.rank = int(os.environ["RANK"]) if launched else 0
        self.size = int(os.environ["WORLD_SIZE"]) if launched else 1
        self._started = False

    def __enter__(self) -> Team:
        if self.size > 1 and not dist.is_initialized():
            # Others wait at the end of a phase for the slowest, which may take hours on a slow file system.
            try:
                dist.init_process_group("gloo", timeout=datetime.timedelta(days=1))
            except (RuntimeError, ValueError, OSError) as error:
                first = str(error).partition("\n")[0]
                raise LostProcessError(f"the other processes of this job can't be reached: {first}") from error
            self._started = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._started:  # aside, because it may wait for ever for what another process has said or left unsaid
            ending = threading.Thread(target=_take_apart, daemon=True)
            ending.start()
            ending.join(_PATIENCE)

    def together(self, action: Callable[[], _T]) -> _T:
        """Do ``action`` in every process, and wait for all; the error of one is an error of all.

        Raises:
            As ``action``; on the other processes CheckpointError.
        """
        failure, result = None, None
        try:
            result = action()
        except Exception as error:
            failure = error
        self.agree(failure)
        return result  # type: ignore[return-value]

    def agree(self, failure: BaseException | None = None) -> None:
        """Wait for all processes to get here.

        Raises:
            The process's own ``failure``; on the others CheckpointError with the first one's message.
        """
        try:
            failures = self.gathered(None if failure is None else f"{type(failure).__name__}: {failure}")
        except LostProcessError:
            if failure is None:
                raise
        if failure is not None:
            raise failure
        first = next(((rank, text) for rank, text in enumerate(failures) if text is not None), None)
        if first is not None:
            raise CheckpointError(f"process {first[0]} failed: {first[1]}")

    def gathered(self, value: _T) -> list[_T]:
        """What all processes have said, by their ranks.

        Raises:
            LostProcessError: if one of them has ended.
        """
        if self.size == 1:
            return [value]
        values: list[_T] = [value] * self.size
        try:
            dist.all_gather_object(values, value)
        except RuntimeError as error:  # gloo's, on a connection that is closed
            raise LostProcessError(
                "another process of this job has ended, so nothing is written; its own output may say why"
            ) from error
        return values


def _take_apart() -> None:
    dist.destroy_process_group()
    gc.collect()  # what is left of it would be taken apart at exit, which gloo's threads don't survive
