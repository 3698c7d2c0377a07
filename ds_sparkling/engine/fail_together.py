"""All ranks go on, or all of them raise the same error, and none waits for another without a bound.

Ranks tell each other by :mod:`ds_sparkling.engine.rollcall`, not by collectives, so that they can while one of them is
stuck in a collective or gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import distributed as dist

from ds_sparkling import errors
from ds_sparkling.engine.rollcall import Failure, InterruptedWaitError, RollCall, roll_call
from ds_sparkling.errors import GrowthError, SparklingError

_T = TypeVar("_T")


class FailTogether:
    """Holds what went wrong on this rank until :meth:`settle` shares it with all.

    Use it as a context manager around work that may fail on one rank alone; collectives must stay outside, or be
    reached on every rank whatever failed. Around work that has collectives inside, as DeepSpeed's own has, use
    :meth:`together`. A second failure doesn't replace the first.

    Every rank makes the same ones, in the same order.

    Args:
        doing: what is being done, for errors.
        way_out: what a user can do when it failed, for errors.
        alike: what has to be the same on all ranks, in words; what is being done, by default.
        patience: seconds that others may take to come here; as long as collectives may take, by default.
        kind: of the error for what isn't one of this package's own.
    """

    def __init__(
        self,
        doing: str,
        way_out: str = "",
        *,
        alike: str | None = None,
        patience: float | None = None,
        kind: type[SparklingError] = GrowthError,
    ) -> None:
        self._doing = doing
        self._kind = kind
        self._way_out = f"; {way_out}" if way_out else ""
        self._alike = alike or doing
        self._patience = patience
        self._error: BaseException | None = None
        self._call: RollCall | None = None

    def __enter__(self) -> FailTogether:
        self._open()
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> bool:
        if error is None:
            return False
        if isinstance(error, Exception):
            self._error = self._error or error
            return True
        # An exit or an interrupt ends this rank's process. The others hear of it, and don't wait.
        self._end(error)
        return False

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around work with collectives inside, which ranks do in step: what fails on one ends it on all, at once.

        The ranks are out of step then, and no growth is possible in this process any more.
        """
        call = self._open()
        try:
            with call.together() if call is not None else _nothing():
                yield
        except Exception as error:
            self._error = self._error or error
            if call is not None and not isinstance(error, InterruptedWaitError):
                call.fail(self._failure(error), now=True)
        except BaseException as error:
            self._end(error)
            raise

    @property
    def failed(self) -> bool:
        return self._error is not None

    def settle(self) -> None:
        """Wait for all ranks.

        Raises:
            SparklingError: on every rank, if any rank failed, did something else, or is gone: what happened on the
                first rank that failed. Its kind is the original one where the error was this package's own.
            Exception: without other ranks, the error as it was, unless there is a way out to tell.
        """
        call, self._call = self._open(), None
        if call is None:
            if self._error is not None and self._way_out:
                raise self._raised(self._failure(self._error)) from self._error
            if self._error is not None:
                raise self._error
            return
        if self._error is not None and not isinstance(self._error, InterruptedWaitError):
            call.fail(self._failure(self._error))
        failure = call.settle()
        if failure is not None:
            raise self._raised(failure) from self._error

    def _open(self) -> RollCall | None:
        """The roll call that the next :meth:`settle` ends; None without other ranks."""
        if self._call is None and dist.is_initialized() and dist.get_world_size() > 1:
            self._call = roll_call(self._alike, self._patience)
        return self._call

    def _end(self, error: BaseException) -> None:
        call, self._call = self._open(), None
        if call is not None:
            call.leave(self._failure(error))

    def _failure(self, error: BaseException) -> Failure:
        own = isinstance(error, SparklingError)
        return Failure(
            rank=dist.get_rank() if dist.is_initialized() else 0,
            kind=type(error).__name__ if own else self._kind.__name__,
            message=str(error) if own else f"{type(error).__name__}: {error}",
            follows=follows_another(error),
            ends=not isinstance(error, Exception),
        )

    def _raised(self, failure: Failure) -> SparklingError:
        kind: type[SparklingError] = getattr(errors, failure.kind, GrowthError)
        if failure.rank is None:
            return kind(f"{self._doing} failed: {failure.message}{self._way_out}")
        return kind(f"{self._doing} failed on rank {failure.rank}: {failure.message}{self._way_out}")


def follows_another(error: BaseException) -> bool:
    """Whether an error is what shows on the ranks that another one leaves behind, when it has failed or died."""
    return isinstance(error, (dist.DistError, InterruptedWaitError)) or "/gloo/" in str(error)


def of_first_rank(value: _T, all_ranks: FailTogether) -> _T:
    """The first rank's ``value``. Collective.

    Raises:
        SparklingError: as :meth:`FailTogether.settle`.
    """
    box = [value]
    with all_ranks.together():
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast_object_list(box, src=0)
    all_ranks.settle()
    return box[0]


@contextmanager
def _nothing() -> Iterator[None]:
    yield
