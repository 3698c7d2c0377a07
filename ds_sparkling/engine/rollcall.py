"""Ranks report to each other through torch.distributed's store, where nobody waits for a rank that is gone.

All ranks answer a roll call: each says that it is there, or what failed, and all get the same outcome. While a rank
works towards its answer, a thread of its own keeps saying that it lives, and looks whether another one has failed. Keys
in the store are per rank or per roll call, and those of past roll calls are deleted.
"""

from __future__ import annotations

import atexit
import faulthandler
import itertools
import json
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch.distributed import DistError, distributed_c10d

from ds_sparkling.engine.hooks import WAIT
from ds_sparkling.engine.internals import abort_collectives, default_store
from ds_sparkling.errors import GrowthError

logger = logging.getLogger(__name__)

#: Seconds between two signs of life.
_BEAT = 3.0
#: Seconds without a sign of life after which a rank that has begun counts as gone.
_GONE = 40.0
#: Seconds that a rank's own work may take while the others wait.
_LONGEST = 1800.0
#: Seconds that a rank may be where nothing can interrupt it, after another one has failed, before it ends.
_STUCK = 15.0
#: Seconds that the first rank waits for the others to hear of a failure.
_GOODBYE = 3.0
#: Seconds of a wait for a collective on the CPU after which it is seen whether another rank has failed.
_SLICE = 1.0


class InterruptedWaitError(RuntimeError):
    """This rank has left a collective that would never end, because another rank has failed."""


@dataclass(frozen=True)
class Failure:
    """What went wrong on a rank.

    Attributes:
        rank: where; None if the message says so.
        kind: class of the error to raise, of :mod:`ds_sparkling.errors`.
        message: what happened.
        follows: whether it may be what another rank's failure looks like from here.
        ends: whether the rank's process ends with it.
    """

    rank: int | None
    kind: str
    message: str
    follows: bool = False
    ends: bool = False


def roll_call(alike: str, patience: float | None = None) -> RollCall:
    """Begin the next roll call; every rank begins the same ones, in the same order.

    Args:
        alike: what ranks are about to do; they fail if it isn't the same on all.
        patience: seconds that others may take to begin it; as long as collectives, by default.

    Raises:
        GrowthError: after a failure that has left ranks in different places, or if the store is gone.
    """
    global _attendance
    store: Any = default_store()
    if _attendance is None or _attendance.default() is not store:
        _attendance = _Attendance(store, 1 if _attendance is None else _attendance.generation + 1)
    if not _attendance.in_step:
        raise GrowthError(
            "an earlier failure has left the ranks in the middle of different collectives; start the processes anew, "
            "from the last checkpoint"
        )
    try:
        return RollCall(_attendance, alike, store.timeout.total_seconds() if patience is None else patience)
    except DistError as error:
        raise GrowthError(_gone_store(error)) from error


class RollCall:
    """One question that all ranks answer.

    Attributes:
        number: of the roll call.
        rank: this process's.
        ranks: how many there are.
        patience: seconds that others may take to begin it.
    """

    def __init__(self, attendance: _Attendance, alike: str, patience: float) -> None:
        self.number = next(attendance.numbers)
        self.rank, self.ranks = attendance.rank, attendance.ranks
        self.patience = patience
        self._attendance = attendance
        self._store = attendance.store
        self._key = f"call{self.number}/"
        self._following: Failure | None = None
        attendance.begin(self)
        first = json.loads(self._first("alike", {"rank": self.rank, "alike": alike}))
        if first["alike"] != alike:
            others = f"rank {self.rank} is {alike}, while rank {first['rank']} is {first['alike']}"
            self.fail(
                Failure(None, "GrowthError", f"{others}: all ranks have to call the same, with the same arguments")
            )

    def fail(self, failure: Failure, *, now: bool = False) -> None:
        """Say what went wrong here.

        Args:
            now: whether others shall hear of it where they are, because what they are doing needs this rank.
        """
        with suppress(DistError):  # settle() says so where the store is gone
            place = self._store.add(f"{self._key}failures", 1)
            self._store.set(f"{self._key}failure{place}", json.dumps(asdict(failure)))
            if now:
                self._store.add(f"{self._key}left", 1)
            if now and not failure.follows:
                self._first("failed", asdict(failure))
        if now and failure.follows:
            self._following = failure

    def leave(self, failure: Failure) -> None:
        """Say that this process is going to end, and don't wait."""
        self.fail(failure, now=True)
        with suppress(DistError):
            self._arrive()
        self._attendance.end(self)

    def settle(self) -> Failure | None:
        """Wait for all ranks.

        Returns:
            What went wrong: the failure on the lowest rank, unless it may follow from another's; None if nothing did.
            The same on all ranks.

        Raises:
            InterruptedWaitError: if a rank has failed in a roll call around this one.
        """
        try:
            return self._settled()
        except DistError as error:
            return Failure(None, "GrowthError", _gone_store(error))
        finally:
            self._attendance.end(self)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within this, collectives that another rank's failure keeps from ending are left."""
        with self._attendance.interruptible(self):
            yield

    def failed(self) -> bool:
        """Whether a rank has failed in a way that all have to hear of at once."""
        return bool(self._store.check([f"{self._key}failed"]))

    def gone(self, lost: _Lost, ranks: Iterable[int]) -> None:
        """Have all ranks fail if some of ``ranks`` aren't coming any more."""
        gone = [rank for rank in ranks if lost.has(rank, self._attendance.sign_of(rank))]
        if gone:
            outcome = self._outcome(gone)
            self._first("failed", outcome["failure"])
            self._first("outcome", outcome)

    def end_stuck(self) -> None:
        """End this process, which another rank's failure keeps in something that it can't leave."""
        failure = Failure(**json.loads(self._store.get(f"{self._key}failed")))
        logger.critical("rank %s failed: %s; this rank can't leave what it waits in, and ends", *_told(failure))
        self._arrive()
        self._let_others_read()
        faulthandler.dump_traceback()
        os._exit(1)

    def _settled(self) -> Failure | None:
        watching, lost = self._arrive() == 1 or self.rank == 0, _Lost(self)
        began = looked = time.monotonic()
        wait = 0.001
        while not self._store.check([f"{self._key}outcome"]):
            time.sleep(wait)
            wait, now = min(1.5 * wait, self._attendance.longest_wait), time.monotonic()
            if self._following is not None and now - began > _GONE + _BEAT:
                self._first("failed", asdict(self._following))  # nothing has turned up that it follows from
            # A rank that knows the outcome may have failed with it already.
            if self._attendance.interrupted_around(self) and not self._store.check([f"{self._key}outcome"]):
                raise InterruptedWaitError("another rank has failed")
            if watching and now - looked > _BEAT:
                looked = now
                self.gone(lost, range(self.ranks))
        outcome = json.loads(self._store.get(f"{self._key}outcome"))
        self._attendance.in_step = outcome["in_step"]
        if outcome["failure"] is not None:
            self._let_others_read()
            return Failure(**outcome["failure"])
        self._attendance.forget_before(self)
        return None

    def _let_others_read(self) -> None:
        """Wait a little on the first rank, which may end now, and the store with it."""
        read, began = self._store.add(f"{self._key}read", 1), time.monotonic()
        while self.rank == 0 and read < self.ranks and time.monotonic() - began < _GOODBYE:
            time.sleep(0.05)
            read = self._store.add(f"{self._key}read", 0)

    def _arrive(self) -> int:
        """How many ranks have arrived with this one; the last one says how it went."""
        arrived = int(self._store.add(f"{self._key}arrived", 1))
        self._attendance.arrive(self)
        if arrived == self.ranks:
            self._first("outcome", self._outcome([]))
        return arrived

    def _outcome(self, gone: list[int]) -> dict[str, Any]:
        """The failure that all ranks shall hear of, and whether they are in step all the same."""
        count = self._store.add(f"{self._key}failures", 0)
        failures = [Failure(**json.loads(self._store.get(f"{self._key}failure{place + 1}"))) for place in range(count)]
        if gone:
            failures.append(Failure(None, "GrowthError", _absence(gone, self.ranks)))
        worst = min(failures, key=lambda failure: (failure.follows, failure.rank is None, failure.rank), default=None)
        return {
            "failure": None if worst is None else asdict(worst),
            "in_step": not gone
            and not any(failure.follows or failure.ends for failure in failures)
            and self._store.add(f"{self._key}left", 0) in (0, self.ranks),
        }

    def _first(self, name: str, value: Any) -> bytes:
        """What the first rank to say so has put under ``name``."""
        return bytes(self._store.compare_set(self._key + name, "", json.dumps(value)))


@dataclass(frozen=True)
class _Sign:
    """A rank's sign of life: the roll call that it has begun last, whether it has arrived, a number that goes up."""

    number: int = 0
    arrived: bool = True
    count: int = 0


class _Lost:
    """Tells which ranks aren't coming any more: those that have stopped to live, or that take too long to begin."""

    def __init__(self, call: RollCall) -> None:
        self._number, self._patience = call.number, call.patience
        self._seen: dict[int, tuple[_Sign, float]] = {}
        self._began = time.monotonic()

    def has(self, rank: int, sign: _Sign) -> bool:
        """Whether ``rank``, whose latest sign is given, is lost; ask again and again."""
        now = time.monotonic()
        if sign.number < self._number:
            return now - self._began > self._patience
        if sign.number > self._number or sign.arrived:
            return False
        seen, since = self._seen.setdefault(rank, (sign, now))
        if seen != sign:
            self._seen[rank] = (sign, now)
            return now - self._began > _LONGEST
        return now - since > _GONE


class _Attendance:
    """This process's signs of life, for all roll calls of one store.

    Args:
        default: the store; it isn't kept alive, because the port of one that is would be taken when a script destroys
            its process group and makes it anew.
        generation: how many stores there have been; what earlier ones hold may be found in this one.
    """

    def __init__(self, default: Any, generation: int) -> None:
        self.default = weakref.ref(default)
        self.generation = generation
        self.numbers = itertools.count(1)
        self.rank, self.ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        #: Seconds between two looks at the store, which answers some 10,000 a second.
        self.longest_wait = max(0.25, self.ranks / 4000)
        self.store = torch.distributed.PrefixStore(f"ds_sparkling{generation}", _connection(default))
        #: Whether no failure has left ranks in the middle of collectives.
        self.in_step = True
        self._sign, self._lock = _Sign(), threading.Lock()
        self._open: list[RollCall] = []
        self._settled: list[int] = []
        self._together: list[_Together] = []
        self._busy = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._live, name="ds_sparkling signs of life", daemon=True)
        self._thread.start()
        atexit.register(self._stop)

    def begin(self, call: RollCall) -> None:
        self._open.append(call)
        self._show((call.number, False))
        self._busy.set()

    def arrive(self, call: RollCall) -> None:
        self._show((call.number, True))

    def end(self, call: RollCall) -> None:
        """Go back to the roll call around ``call``, if there is one."""
        self._open.remove(call)
        if not self._open:
            self._busy.clear()
            return
        with suppress(DistError):
            self._show((self._open[-1].number, False))

    def interrupted_around(self, call: RollCall) -> bool:
        """Whether a rank has failed in a roll call that ``call`` is part of."""
        return any(outer.failed() for outer in self._open if outer.number < call.number)

    def sign_of(self, rank: int) -> _Sign:
        key = f"rank{rank}"
        return _Sign(*json.loads(self.store.get(key))) if self.store.check([key]) else _Sign()

    def forget_before(self, call: RollCall) -> None:
        """Delete what the roll calls that settled before ``call`` have left in the store: every rank has read it."""
        if self.rank == 0:
            for number in self._settled:
                for name in ("alike", "arrived", "failures", "left", "outcome"):
                    self.store.delete_key(f"call{number}/{name}")
            self._settled = [call.number]

    @contextmanager
    def interruptible(self, call: RollCall) -> Iterator[None]:
        """Have this process leave collectives when another rank has failed in ``call``."""
        together = _Together(call)
        self._together.append(together)
        try:
            with _waits_in_slices(lambda: any(around.failed for around in self._together)):
                yield
        finally:
            self._together.remove(together)

    def _show(self, place: tuple[int, bool] | None = None) -> None:
        """Give a sign of life: from ``place``, which is the latest roll call and whether it is arrived at, if new."""
        with self._lock:
            number, arrived = place or (self._sign.number, self._sign.arrived)
            self._sign = _Sign(number, arrived, self._sign.count + 1)
            self.store.set(f"rank{self.rank}", json.dumps([number, arrived, self._sign.count]))

    def _stop(self) -> None:
        """End the thread: an interpreter that exits while it is in the store would abort."""
        self._over.set()
        self._busy.set()
        self._thread.join(_GOODBYE)

    def _live(self) -> None:
        """What the thread does: signs of life while a roll call is open, and a look at the others' failures."""
        try:
            while self._busy.wait() and not self._over.is_set():
                self._show()
                for together in list(self._together):
                    together.look()
                self._over.wait(_BEAT)
        except DistError as error:
            logger.debug("no more signs of life, the store is gone: %s", error)


class _Together:
    """What this process does when another rank fails while all are in step."""

    def __init__(self, call: RollCall) -> None:
        self._call = call
        self._lost = _Lost(call)
        self._failed_since: float | None = None
        self._main = threading.get_ident()

    @property
    def failed(self) -> bool:
        """Whether another rank has been seen to fail."""
        return self._failed_since is not None

    def look(self) -> None:
        """See whether a rank has failed or is gone, and leave the collectives that wait for it."""
        # The first rank watches all others, and the second one the first.
        rank, ranks = self._call.rank, self._call.ranks
        self._call.gone(self._lost, range(1, ranks) if rank == 0 else range(1) if rank == 1 else ())
        if not self._call.failed():
            return
        if self._failed_since is None:
            self._failed_since = time.monotonic()
            if not _on_cpu():
                abort_collectives()
        elif time.monotonic() - self._failed_since > _STUCK and self._in_torch():
            self._call.end_stuck()

    def _in_torch(self) -> bool:
        """Whether the process is inside of torch.distributed."""
        frame = sys._current_frames().get(self._main)
        return frame is not None and frame.f_code.co_filename == distributed_c10d.__file__


@contextmanager
def _waits_in_slices(failed: Callable[[], bool]) -> Iterator[None]:
    """Let waits for collectives on the CPU end when a rank has failed; those on devices are aborted."""
    if not _on_cpu():
        yield
        return
    work: Any = torch.distributed.Work
    plain = work.wait

    def wait(handle: Any, timeout: timedelta | None = None) -> Any:
        if timeout is not None:
            return plain(handle, timeout)
        while True:
            began = time.monotonic()
            try:
                return plain(handle, timedelta(seconds=_SLICE))
            except RuntimeError as error:
                if "timed out" not in str(error).lower() or time.monotonic() - began < 0.9 * _SLICE:
                    raise
            if failed():
                raise InterruptedWaitError("another rank has failed")

    with WAIT.during(work, wait):
        yield


def _absence(gone: list[int], ranks: int) -> str:
    named = ", ".join(map(str, gone[:8])) + (" and others" if len(gone) > 8 else "")
    return (
        f"of {ranks} ranks, {named} didn't come: failed before, ended, stuck, or not calling what the others call (if "
        "they only take longer, raise sparkling.patience)"
    )


def _gone_store(error: DistError) -> str:
    reason = str(error).partition("\n")[0].partition(". Exception raised")[0]
    return f"the store that ranks meet at is gone, and with it likely the first rank ({reason})"


def _told(failure: Failure) -> tuple[object, str]:
    return "?" if failure.rank is None else failure.rank, failure.message


def _on_cpu() -> bool:
    return bool(torch.distributed.get_backend() == "gloo")


def _connection(store: Any) -> Any:
    """A connection of our own to a store: on the default one, whoever waits for a key keeps others out."""
    if hasattr(store, "clone"):
        return store.clone()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    if isinstance(store, torch.distributed.TCPStore):
        return torch.distributed.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False)
    return store


_attendance: _Attendance | None = None
