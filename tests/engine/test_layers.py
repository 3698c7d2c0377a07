"""Growths that add layers: the grown engine against the one-process reference, and what new layers start as."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tiny
from distributed import Workers
from ds_sparkling.errors import PlanError
from ds_sparkling.growth import GrowthPlan
from ds_sparkling.spec.strategy import LayerContent, LayerOrder, Layers, OptimizerState, Strategy
from tiny import Case

#: One after the other: exact; with a width, and state copied; from a list, with what is new drawn.
GROWTHS = (
    ({"num_hidden_layers": 2}, Strategy()),
    (
        {"num_hidden_layers": 5, "hidden_size": 12},
        Strategy(
            layers=Layers(sources=LayerOrder.INTERPOSE, content=LayerContent.COPY),
            optimizer_state=OptimizerState.COPY,
        ),
    ),
    (
        {"num_hidden_layers": 6},
        Strategy(layers=Layers(sources=(0, 1, 4, 2, 3, 4), content=LayerContent.RANDOM), seed=3),
    ),
)
CASES = [
    Case(1, 3),
    Case(2, 3, 2, zero={"sub_group_size": 200, "stage3_param_persistence_threshold": 20}, frozen=True, groups=True),
    Case(3, 2),
    Case(4, 3, 2),
    Case(2, 1, 2, bf16=True),
    Case(3, 3, bf16=True, zero={"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}),
    Case(2, 0, 2),
]
Seen = tuple[Any, GrowthPlan, Any, tuple[float, float], dict[str, tuple[int, ...]]]


def chain(case: Case) -> list[Seen]:
    """Train, grow, train, grow ..."""
    import ds_sparkling

    engine = tiny.initialize(case)
    seen = []
    for widths, strategy in GROWTHS:
        tiny.train(engine, engine.global_steps + 1)
        tiny.with_strategy(engine, strategy)
        before, loss = tiny.local_state(engine), tiny.evaluate(engine)
        engine = ds_sparkling.grow(engine, widths)
        plan = engine.sparkling.plan
        losses = loss, tiny.evaluate(engine)
        seen.append((before, plan, tiny.local_state(engine), losses, engine.sparkling.record.layer_births))
    tiny.train(engine, engine.global_steps + 2)
    return seen


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layers_are_what_the_reference_makes_of_them(case: Case, workers: Callable[[int], Workers]) -> None:
    answers = workers(case.ranks).run(chain, case)
    for growth in range(len(GROWTHS)):
        seen = [answer[growth] for answer in answers]
        plan = seen[0][1]
        wanted = tiny.reference(plan, tiny.join([one[0] for one in seen]))
        found = tiny.join([one[2] for one in seen])
        assert found.keys() == wanted.keys()
        for name, tensors in wanted.items():
            for key, expected in tensors.items():
                assert torch.equal(found[name][key], expected), (growth, name, key)
    births = [answers[0][growth][4]["layers"] for growth in range(len(GROWTHS))]
    assert births == [(0, 1), (0, 2, 2, 1, 2), (0, 2, 2, 2, 1, 3)]
    before, after = answers[0][0][3]
    assert after == pytest.approx(before, rel=1e-2 if case.bf16 else 1e-6)
    assert answers[0][1][3][1] != pytest.approx(answers[0][1][3][0], rel=1e-6)


def planned(case: Case) -> tuple[str, list[tuple[float, list[int]]]]:
    """What a plan that can't be is refused with; then, of one that can, the rates of old and new elements."""
    with pytest.raises(PlanError) as refused:
        tiny.initialize(case)
    layers = {"sources": "stack", "content": "copy"}
    good = {**case.sparkling, "layers": layers, "rewarmup": {"ratio": 2.0, "steps": 4}}
    engine = tiny.initialize(Case(case.ranks, case.stage, sparkling=good))
    engine, seen = loop(engine, 4)
    return str(refused.value), seen


def loop(engine: Any, steps: int) -> tuple[Any, list[tuple[float, list[int]]]]:
    import ds_sparkling
    from ds_sparkling.engine.stepping import blocks_of

    seen = []
    while engine.global_steps < steps:
        engine = ds_sparkling.grow_if_due(engine)
        births: dict[int, int] = {}
        for blocks in blocks_of(engine).values():
            for block in blocks:
                start = 0
                for run in block.runs:
                    births[run.birth] = births.get(run.birth, 0) + block.rows * (run.stop - start)
                    start = run.stop
        seen.append((tiny.train(engine, engine.global_steps + 1)[-1], [births[birth] for birth in sorted(births)]))
    return engine, seen


def test_new_layers_are_born_whole_and_sources_that_lose_a_layer_are_refused(
    workers: Callable[[int], Workers],
) -> None:
    growth = {"at_step": 2, "widths": {"num_hidden_layers": 2}}
    lost = {"growths": [growth], "layers": {"sources": [0, 1]}}
    message, seen = workers(1).run(planned, Case(1, 3, sparkling=lost))[0]
    assert message == "layers.sources [0, 1] names layer 1; there are 1, from 0 on"
    (old,), (kept, new) = seen[1][1], seen[2][1]
    assert kept == old
    outside = 31 * 6 + 6  # the embedding, which is the head, and the last norm
    assert new == old - outside
