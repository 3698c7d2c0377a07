"""Fixtures of the whole suite: process groups are started once per number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, settings

import launching
from distributed import Workers

# A busy machine is no failure.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=50)
settings.register_profile("thorough", settings.get_profile("unhurried"), max_examples=1000)
settings.load_profile("unhurried")  # --hypothesis-profile thorough for the other

pytest_plugins = ["damage"]

#: Fixtures that start ranks: tests that use one of them, or a fixture that does, are marked ``ranks``.
RANKS = frozenset({"workers", "ranks", "launch"})


@pytest.fixture(scope="session")
def workers() -> Iterator[Callable[[int], Workers]]:
    pools: dict[int, Workers] = {}

    def pool(ranks: int) -> Workers:
        return pools.setdefault(ranks, Workers(ranks))

    yield pool
    for started in pools.values():
        started.stop()


@pytest.fixture(scope="session")
def launch() -> launching.Launch:
    return launching.launch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not RANKS.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker("ranks")
