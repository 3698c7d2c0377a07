"""Several processes that write one checkpoint together, as ``torchrun`` starts them; or one alone."""

from __future__ import annotations

import datetime
import gc
import os
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

import torch.distributed as dist

from ds_sparkling.errors import CheckpointError

_T = TypeVar("_T")


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
            dist.init_process_group("gloo", timeout=datetime.timedelta(days=1))
            self._started = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._started:
            dist.destroy_process_group()
            gc.collect()  # what is left of it would be taken apart at exit, which gloo's threads don't survive

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
        failures: list[str | None] = [None if failure is None else str(failure)]
        if self.size > 1:
            failures = [None] * self.size
            dist.all_gather_object(failures, None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        first = next(((rank, text) for rank, text in enumerate(failures) if text is not None), None)
        if first is not None:
            raise CheckpointError(f"process {first[0]} failed: {first[1]}")
