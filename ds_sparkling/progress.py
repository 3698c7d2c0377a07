"""Progress bars that leave the line to an error, and lines where there is no terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

#: In a log a line is written at every so manieth part of the way, if the last one is so many seconds old.
_PARTS, _APART = 50, 10.0


class _Bar(tqdm):
    """A bar that isn't closed, and so wiped out, as soon as the loop over it ends."""

    def __iter__(self) -> Iterator[Any]:
        for item in self.iterable:
            yield item
            self.update()


class _Lines(_Bar):
    """The same as whole lines in a log, where nothing is wiped out: one now and then, and one at the end."""

    def __init__(self, items: Iterable[Any] | None, **options: Any) -> None:
        super().__init__(items, disable=True, **options)
        self.desc, self.unit = options.get("desc") or "", options.get("unit", "it")
        self.initial = self.n
        self._began = self._told = time.monotonic()
        self._part = self._part_done
        self._postfix = ""
        self._over, self._last = False, -1.0

    @property
    def _part_done(self) -> int:
        return int(_PARTS * self.n // self.total) if self.total else 0

    def update(self, n: float | None = 1) -> bool | None:
        self.n += 1 if n is None else n
        if self._part_done > self._part and time.monotonic() - self._told >= _APART:
            self._tell()
        return None

    def set_postfix(self, ordered_dict: Any = None, refresh: bool | None = True, **values: Any) -> None:
        self._postfix = ", ".join(f"{key}={value}" for key, value in values.items())

    def close(self) -> None:
        """Write the last line, once, unless the way's end has been told already."""
        if not self._over and self._last != self.n:
            self._tell()
        self._over = True

    def _tell(self) -> None:
        self._part, self._told, self._last = self._part_done, time.monotonic(), self.n
        meter = self.format_meter(
            self.n,
            self.total or 0,
            self._told - self._began,
            ncols=0,
            prefix=self.desc,
            unit=self.unit,
            initial=self.initial,
            postfix=self._postfix,
        )
        sys.stderr.write(f"{meter.strip()}\n")
        sys.stderr.flush()


@contextlib.contextmanager
def progress_bar(
    items: Iterable[Any] | None = None, *, shown: bool | None = True, leave: bool = False, **options: Any
) -> Iterator[tqdm[Any]]:
    """A progress bar, closed at the end of the ``with`` whatever happens in it.

    After an error it stays as it was, so that what is said about the error begins on a line of its own. Where standard
    error isn't a terminal there are a few whole lines instead.

    Args:
        items: what to iterate over, if anything.
        shown: whether there is anything to see; None: on a terminal only.
        leave: whether the bar stays when all went well, too.
        **options: of tqdm.
    """
    if shown and not sys.stderr.isatty():
        made: tqdm[Any] = _Lines(items, **options)
    else:
        made = _Bar(items, disable=None if shown is None else not shown, leave=leave, **options)
    with made as bar:
        try:
            yield bar
        except BaseException:
            bar.leave = True
            raise
