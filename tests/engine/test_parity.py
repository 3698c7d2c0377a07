"""The grown engine against the one-process reference, bit for bit, on every topology."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch

import tiny
from distributed import Workers
from ds_sparkling.growth import GrowthPlan
from ds_sparkling.spec.strategy import INIT_PAIRS, Init, OptimizerState, Scaling, Split, Strategy
from pairwise import shares
from tiny import Case

#: Growths one after the other: inner, hidden and joint at integer ratios, where copy-copy keeps the function exactly;
#: then every other init pair, at ratios that aren't integers.
GROWTHS = (
    (
        {"moe_intermediate_size": 10},
        Strategy(fan_out=INIT_PAIRS[0][0], fan_in=INIT_PAIRS[0][1], split=Split.parse("1:2")),
    ),
    (
        {"hidden_size": 12},
        Strategy(
            fan_out=INIT_PAIRS[0][0],
            fan_in=INIT_PAIRS[0][1],
            optimizer_state=OptimizerState.COPY,
            perturbation=0.5,
            seed=1,
        ),
    ),
    (
        {"hidden_size": 24, "moe_intermediate_size": 20},
        Strategy(
            fan_out=INIT_PAIRS[0][0],
            fan_in=INIT_PAIRS[0][1],
            optimizer_state=OptimizerState.ASYMMETRIC_RESET_SCALED,
            split=Split.parse("random"),
            perturbation=0.1,
            seed=2,
        ),
    ),
    ({"hidden_size": 31}, Strategy(fan_out=INIT_PAIRS[1][0], fan_in=INIT_PAIRS[1][1], norm=Init.RANDOM, seed=3)),
    (
        {"moe_intermediate_size": 23},
        Strategy(
            fan_out=INIT_PAIRS[2][0],
            fan_in=INIT_PAIRS[2][1],
            norm=Init.RANDOM,
            optimizer_state=OptimizerState.DROP,
            seed=4,
        ),
    ),
    (
        {"hidden_size": 37, "moe_intermediate_size": 51},
        Strategy(fan_out=INIT_PAIRS[3][0], fan_in=INIT_PAIRS[3][1], norm=Init.RANDOM, seed=5),
    ),
    (
        {"hidden_size": 40},
        Strategy(fan_out=INIT_PAIRS[4][0], fan_in=INIT_PAIRS[4][1], optimizer_state=OptimizerState.COPY_SCALED, seed=6),
    ),
    (
        {"moe_intermediate_size": 60},
        Strategy(fan_out=INIT_PAIRS[5][0], fan_in=INIT_PAIRS[5][1], scaling=Scaling.NONE, seed=7),
    ),
)
INTEGER_COPIES = 3


@dataclass
class Growth:
    """What one rank saw of one growth."""

    before: Any
    plan: GrowthPlan
    after: Any
    counters: tuple[str, str]
    losses: tuple[float, float]


def topologies() -> list[Case]:
    experts = {1: (1,), 2: (1, 2), 3: (1, 3), 4: (1, 2, 4)}
    cases = [Case(ranks, 3, ep) for ranks, eps in experts.items() for ep in eps]
    cases += [Case(ranks, stage, eps[-1]) for ranks, eps in experts.items() for stage in (1, 2)]
    small_groups = {"sub_group_size": 200, "stage3_param_persistence_threshold": 20}
    return [
        *cases,
        Case(3, 3, zero=small_groups),
        Case(2, 3, 2, zero=small_groups, frozen=True, groups=True),
        Case(2, 3, 2, bf16=True, zero=small_groups, groups=True),
        Case(2, 2, 2, bf16=True, frozen=True),
        Case(3, 1, bf16=True, groups=True),
        Case(2, 1, bf16=True, top={"data_types": {"grad_accum_dtype": "fp32"}}),
        Case(2, 0, frozen=True),
        Case(2, 0, 2),
        Case(2, 0, bf16=True),
        Case(1, 3, bf16=True, tied=False),
        Case(3, 3, 3, tied=False),
        Case(2, 3, bf16=True, zero={"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}),
    ]


@mock.patch("ds_sparkling.engine.exchange.BUCKET", 150)  # of which a growth then has many
def chain(case: Case, numbers: tuple[int, ...]) -> list[Growth]:
    """Train, grow, train, grow ... by the growths of these numbers."""
    import ds_sparkling

    engine = tiny.initialize(case)
    seen = []
    for widths, strategy in (GROWTHS[number] for number in numbers):
        tiny.train(engine, engine.global_steps + 1)
        tiny.with_strategy(engine, strategy)
        before, counters, loss = tiny.local_state(engine), steps(engine), tiny.evaluate(engine)
        engine = ds_sparkling.grow(engine, widths)
        plan = engine.sparkling.plan
        around = (counters, steps(engine)), (loss, tiny.evaluate(engine))
        seen.append(Growth(before, plan, tiny.local_state(engine), *around))
    return seen


def steps(engine: Any) -> str:
    """Every step counter in the base optimizer."""
    from ds_sparkling.engine import access

    return str(sorted({float(shard.scalars["step"]) for shard in access.shards(engine).values() if shard.scalars}))


@pytest.mark.parametrize(("case", "numbers"), shares(topologies(), len(GROWTHS), tiny.kind), ids=str)
def test_grown_engine_equals_reference(case: Case, numbers: tuple[int, ...], workers: Callable[[int], Workers]) -> None:
    answers = workers(case.ranks).run(chain, case, numbers)
    for number, *ranks in zip(numbers, *answers, strict=True):
        assert all(growth.plan == ranks[0].plan for growth in ranks)
        plan = ranks[0].plan
        expected = tiny.reference(plan, tiny.join([growth.before for growth in ranks]))
        found = tiny.join([growth.after for growth in ranks])
        assert expected.keys() == found.keys()
        for name, tensors in expected.items():
            for key, tensor in tensors.items():
                assert torch.equal(found[name][key], tensor), f"growth {number}: {key} of {name}"
        dropped = GROWTHS[number][1].optimizer_state is OptimizerState.DROP
        for growth in ranks:
            assert growth.counters[1] == ("[0.0]" if dropped else growth.counters[0])
            if number < INTEGER_COPIES and not case.bf16:
                assert growth.losses[1] == pytest.approx(growth.losses[0], rel=1e-6)
