"""Weights in page-locked memory: destroying the old engine doesn't take them away from a growth."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

import tiny
from distributed import Workers
from tiny import Case

PINNED = {"device": "cpu", "pin_memory": True}
OFFLOAD = {"offload_optimizer": PINNED}


@contextmanager
def pinned_by(backend: str) -> Iterator[None]:
    os.environ["DS_PIN_MEMORY_BACKEND"] = backend
    try:
        yield
    finally:
        del os.environ["DS_PIN_MEMORY_BACKEND"]


def losses(case: Case, backend: str) -> list[float]:
    """The loss before a growth, after it, and after further steps."""
    import ds_sparkling

    with pinned_by(backend):
        engine = tiny.initialize(case)
        tiny.train(engine, 2)
        found = [tiny.evaluate(engine)]
        engine = ds_sparkling.grow(engine, {"hidden_size": 12})
        found.append(tiny.evaluate(engine))
        tiny.train(engine, 4)
        found.append(tiny.evaluate(engine))
        engine.destroy()
    return found


@pytest.mark.parametrize("case", [Case(2, 1, zero=OFFLOAD), Case(2, 2, bf16=True, zero=OFFLOAD)], ids=str)
def test_growth_with_natively_pinned_memory(case: Case, workers: Callable[[int], Workers]) -> None:
    pool = workers(2)
    native = pool.run(losses, case, "native")
    assert native == pool.run(losses, case, "torch")
    for before, after, _ in native:
        assert after == pytest.approx(before, rel=1e-2 if case.bf16 else 1e-6)


def held_and_given_back(case: Case) -> tuple[list[str], int, int]:
    """Which shards aren't what they were once the engine is stripped, and how much stays page-locked then and after."""
    from deepspeed.utils.pin_memory import get_native_pinned_memory

    from ds_sparkling.engine import access

    def locked() -> int:
        access.release_memory()
        return len(get_native_pinned_memory()._ranges)

    with pinned_by("native"):
        before = locked()
        engine = tiny.initialize(case)
        tiny.train(engine, 1)
        shards = access.shards(engine)
        copies = {name: shard.weight.clone() for name, shard in shards.items()}
        access.strip(engine)
        held = locked() - before
        changed = [name for name, copy in copies.items() if not torch.equal(shards[name].weight, copy)]
        shards.clear()
        return changed, held, locked() - before


@pytest.mark.parametrize(
    "case", [Case(1, 2, zero=OFFLOAD), Case(1, 3, frozen=True, zero={**OFFLOAD, "offload_param": PINNED})], ids=str
)
def test_page_locked_memory_goes_with_the_last_shard(case: Case, workers: Callable[[int], Workers]) -> None:
    ((changed, held, left),) = workers(1).run(held_and_given_back, case)
    assert not changed
    assert left < held  # DeepSpeed itself keeps what stage 3 has moved out of the parameters
