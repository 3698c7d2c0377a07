"""Shorter waits for ranks that are gone, than those that the package ships with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

#: Constant of ds_sparkling.engine.rollcall -> what it ships with, and seconds that do for tests.
WAITS = {"_BEAT": (3.0, 0.3), "_GONE": (40.0, 5.0), "_STUCK": (15.0, 3.0), "_GOODBYE": (3.0, 1.0)}


@contextmanager
def in_a_hurry() -> Iterator[None]:
    """Within this, this rank waits shorter."""
    with pytest.MonkeyPatch.context() as patch:
        for name, (_, short) in WAITS.items():
            patch.setattr(f"ds_sparkling.engine.rollcall.{name}", short)
        yield
