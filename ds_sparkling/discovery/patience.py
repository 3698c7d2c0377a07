"""Limit how long trying may take, and say so while it does."""

from __future__ import annotations

import logging
import time

from ds_sparkling.discovery.forward import NotRunnableError

logger = logging.getLogger(__name__)

#: Seconds that trying a model's growths may take.
LIMIT = 180.0
#: Seconds between two words of how far it is.
_EVERY = 10.0


class TooSlowError(NotRunnableError):
    """Trying takes longer than anybody wants to wait for it."""


class Patience:
    """What is left of the time for trying."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._said = self._start

    def spend(self, doing: str) -> None:
        """Go on with ``doing``, saying so every few seconds.

        Raises:
            TooSlowError: if there is no time left.
        """
        now = time.monotonic()
        spent = now - self._start
        if spent > LIMIT:
            raise TooSlowError(
                f"{spent:.0f} s of trying weren't enough ({doing}); {_WITHOUT}, or let build_model make less of a model"
            )
        if now - self._said >= _EVERY:
            self._said = now
            logger.warning(
                "trying growths on a small instance, for %.0f s so far, at most %.0f s: %s; %s",
                spent,
                LIMIT,
                doing,
                _WITHOUT,
            )


_WITHOUT = 'to go without, set "check": false in the "sparkling" block'
