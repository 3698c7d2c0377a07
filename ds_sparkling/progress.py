"""Progress bars that leave the line to an error."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm


class _Bar(tqdm):
    """A bar that isn't closed, and so wiped out, as soon as the loop over it ends."""

    def __iter__(self) -> Iterator[Any]:
        for item in self.iterable:
            yield item
            self.update()


@contextlib.contextmanager
def progress_bar(
    items: Iterable[Any] | None = None, *, shown: bool | None = True, leave: bool = False, **options: Any
) -> Iterator[tqdm[Any]]:
    """A progress bar, closed at the end of the ``with`` whatever happens in it.

    After an error it stays as it was, so that what is said about the error begins on a line of its own. In a log, where
    nothing is wiped out, it always stays.

    Args:
        items: what to iterate over, if anything.
        shown: whether there is anything to see; None: on a terminal only.
        leave: whether the bar stays when all went well, too.
        options: of tqdm.
    """
    leave = leave or not sys.stderr.isatty()
    with _Bar(items, disable=None if shown is None else not shown, leave=leave, **options) as bar:
        try:
            yield bar
        except BaseException:
            bar.leave = True
            raise
