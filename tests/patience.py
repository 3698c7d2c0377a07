"""When processes hang: not by the clock alone, since a busy machine is no failure."""

from __future__ import annotations

import time
from collections.abc import Sequence

import psutil

#: Seconds in which none of them computes anything, after which they hang.
QUIET = 60.0
#: Seconds after which they do even if one computes: DeepSpeed may compile an op of its own, for a minute or two.
AT_MOST = 300.0
#: What of a core processes that only wait for each other stay below, all together.
_IDLE = 0.1


class Patience:
    """Tells when processes and all that they have started hang.

    Args:
        pids: the processes.
        quiet: seconds in which none of them computes anything.
    """

    def __init__(self, pids: Sequence[int], quiet: float = QUIET) -> None:
        self._pids, self._quiet = pids, quiet
        self._began = self._looked = self._computed = time.monotonic()
        self._spent = _spent(pids)

    def is_over(self) -> bool:
        """Whether they hang; to be asked about once a second."""
        now = time.monotonic()
        if now - self._looked >= 1:
            spent = _spent(self._pids)
            if spent - self._spent > _IDLE * (now - self._looked):
                self._computed = now
            self._spent, self._looked = spent, now
        return now - self._computed > self._quiet or now - self._began > AT_MOST


def family(pid: int) -> list[psutil.Process]:
    """A process and all that it has started, if it is still there."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _spent(pids: Sequence[int]) -> float:
    spent = 0.0
    for process in (one for pid in pids for one in family(pid)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        spent += times.user + times.system
    return spent
