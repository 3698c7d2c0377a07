"""Fixtures of the whole suite: process groups are started once per number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from distributed import Workers


@pytest.fixture(scope="session")
def workers() -> Iterator[Callable[[int], Workers]]:
    pools: dict[int, Workers] = {}

    def pool(ranks: int) -> Workers:
        return pools.setdefault(ranks, Workers(ranks))

    yield pool
    for started in pools.values():
        started.stop()
