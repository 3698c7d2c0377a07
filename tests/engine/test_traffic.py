"""What a growth moves between ranks: the old elements that each needs, a few collectives at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest

import tiny
from benchmarks.collectives import Collective, recorded
from distributed import Workers
from ds_sparkling.spec.strategy import Init, Strategy
from tiny import Case

WIDE = {"hidden_size": 14, "moe_intermediate_size": 9}
CASES = [
    Case(2, 1),
    Case(3, 2),
    Case(2, 3, 2),
    Case(3, 3),
    Case(4, 3, 2),
    Case(4, 2, 2),
    Case(3, 3, bf16=True, zero={"sub_group_size": 200}),
]
BUCKET = 300


@dataclass
class Moved:
    """One rank's part of a growth.

    Attributes:
        collectives: those until everything was there.
        floor: bytes of one old element for each element that the rank has now of what it shares with others.
        local: elements of it.
    """

    collectives: list[Collective]
    floor: int
    elements: int


def grow(case: Case, strategy: Strategy) -> Moved:
    import ds_sparkling
    from ds_sparkling.engine import access
    from ds_sparkling.engine import grow as growing
    from ds_sparkling.engine.optimizers import adapter_of

    engine = tiny.initialize(case)
    tiny.train(engine, 1)
    tiny.with_strategy(engine, strategy)
    seen: list[Collective] = []
    move = growing.move

    def recording(plan: Any, old: Any, grown: Any, all_ranks: Any) -> None:
        adapter = type(adapter_of(grown))
        finish = adapter.finish_writing
        with recorded() as collectives:

            def finishing(self: Any) -> None:
                seen.extend(collectives)
                finish(self)

            with mock.patch.object(adapter, "finish_writing", finishing):
                move(plan, old, grown, all_ranks)

    with (
        mock.patch.object(growing, "move", recording),
        mock.patch("ds_sparkling.engine.exchange.BUCKET", BUCKET),
    ):
        engine = ds_sparkling.grow(engine, WIDE)
    shared = [shard for shard in access.shards(engine).values() if shard.group is not None and len(shard.pieces) > 1]
    tensors = [shard.part(key) for shard in shared for key in (None, *shard.states)]
    return Moved(seen, sum(tensor.nbytes for tensor in tensors), sum(tensor.numel() for tensor in tensors))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("init", [Init.COPY, Init.RANDOM], ids=str)
def test_a_rank_gets_at_most_one_old_element_for_each_of_its_own(
    case: Case, init: Init, workers: Callable[[int], Workers]
) -> None:
    answers = workers(case.ranks).run(grow, case, Strategy(fan_out=init, fan_in=init))
    for moved in answers:
        assert {collective.name for collective in moved.collectives} <= {"all_to_all_single", "all_reduce"}
        received = [each.received for each in moved.collectives if each.name == "all_to_all_single"]
        assert sum(received) <= moved.floor
        statistics = [each.received for each in moved.collectives if each.name == "all_reduce"]
        assert len(statistics) <= 4 * (init is Init.RANDOM)  # two for each process group, of a few numbers per matrix
    assert sum(each.received for moved in answers for each in moved.collectives) > 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_buckets_bound_what_is_on_its_way_and_how_many_collectives_there_are(
    case: Case, workers: Callable[[int], Workers]
) -> None:
    answers = workers(case.ranks).run(grow, case, Strategy())
    counts = {len(moved.collectives) for moved in answers}
    assert len(counts) == 1
    for moved in answers:
        assert all(each.buffer <= 4 * BUCKET for each in moved.collectives)
    fullest = max(moved.elements for moved in answers)
    padding = 100 * case.ranks
    assert fullest // BUCKET <= counts.pop() <= 2 + (fullest + padding) // BUCKET + 2
