"""All ranks go on, or all of them raise the same error."""

from __future__ import annotations

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from ds_sparkling.errors import GrowthError, SparklingError


class Consensus:
    """Holds what went wrong on this rank until :meth:`settle` shares it with all.

    Use it as a context manager around work that may fail on one rank alone; collectives must stay outside, or be
    reached on every rank whatever failed. A second failure doesn't replace the first.

    Args:
        doing: what is being done, for the error.
        way_out: what a user can do when it failed, for the error.
    """

    def __init__(self, doing: str, way_out: str = "") -> None:
        self._doing = doing
        self._way_out = f"; {way_out}" if way_out else ""
        self._error: Exception | None = None

    def __enter__(self) -> Consensus:
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> bool:
        if error is None:
            return False
        if not isinstance(error, Exception):
            return False
        self._error = self._error or error
        return True

    @property
    def failed(self) -> bool:
        return self._error is not None

    def settle(self) -> None:
        """Collective over all ranks.

        Raises:
            SparklingError: on every rank, if any rank failed: what happened on the first rank that did. Its kind is
                the original one where the error was this package's own, GrowthError otherwise.
        """
        flag = torch.tensor([int(self.failed)], device=get_accelerator().current_device_name())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if not int(flag):
            return
        reports: list[tuple[type[SparklingError], str] | None] = [None] * dist.get_world_size()
        torch.distributed.all_gather_object(reports, self._report())
        rank, report = next((rank, report) for rank, report in enumerate(reports) if report is not None)
        kind, message = report
        raise kind(f"{self._doing} failed on rank {rank}: {message}{self._way_out}") from self._error

    def _report(self) -> tuple[type[SparklingError], str] | None:
        if self._error is None:
            return None
        if isinstance(self._error, SparklingError):
            return type(self._error), str(self._error)
        return GrowthError, f"{type(self._error).__name__}: {self._error}"
