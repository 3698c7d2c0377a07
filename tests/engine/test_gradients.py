"""A growth never drops a gradient: while one is held it is refused or waits, whatever optimizer holds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tiny
from distributed import Workers
from ds_sparkling.errors import GrowthError
from tiny import Case

Pool = Callable[[int], Workers]
WIDE = {"moe_intermediate_size": 8}
GROWING: dict[str, Any] = {"stages": [{"at_step": 1, "widths": WIDE}], "check": False, "rewarmup": {"scope": "none"}}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def case(stage: int, **settings: Any) -> Case:
    settings.setdefault("tied", False)
    return Case(1, stage, sparkling=GROWING, **settings)


UNMANAGED = {"managed_gradient_accumulation": False}
CASES = [
    case(0),
    case(0, bf16=True, accumulation=2),
    case(0, accumulation=2, top=UNMANAGED),
    case(1, accumulation=2),
    case(1, bf16=True, top={"data_types": {"grad_accum_dtype": "fp32"}}),
    case(2),
    case(2, accumulation=2, zero=OFFLOAD),
    case(2, bf16=True, accumulation=2, top=UNMANAGED),
    case(3, accumulation=2, zero=OFFLOAD),
    case(3, bf16=True),
    case(3, accumulation=3, top=UNMANAGED),
]


def refused(grow: Callable[[], object]) -> str:
    try:
        grow()
    except GrowthError as error:
        return str(error)
    return "not refused"


def around_one_step(case: Case) -> tuple[list[str], list[float], list[float], dict[str, Any]]:
    """What a growth says at every place of a step, and the losses of the run; at the end it grows.

    Returns:
        What was said, the losses, those of a run without attempts, and the widths at the end.
    """
    import ds_sparkling

    said: list[str] = []

    def train(engine: Any, attempts: bool) -> list[float]:
        losses = tiny.train(engine, 1) if engine.managed_gradient_accumulation() else []
        accumulation, managed = engine.gradient_accumulation_steps(), engine.managed_gradient_accumulation()
        first = len(losses)
        for micro_step in range(first, first + (1 if losses else 2) * accumulation):
            last = micro_step % accumulation == accumulation - 1
            loss = engine(*tiny.batch(micro_step))
            engine.backward(loss)
            losses.append(float(loss))
            if attempts and engine.global_steps == 1:
                said.append(refused(lambda: ds_sparkling.grow(engine, WIDE)))
                said.append(refused(lambda: ds_sparkling.grow_if_due(engine)))
            if managed or last:
                engine.step()
            if attempts and managed and not last and engine.global_steps == 1:
                assert ds_sparkling.grow_if_due(engine) is engine  # due, and waits for the rest of the step
                said.append(refused(lambda: ds_sparkling.grow(engine, WIDE)))
        return losses

    undisturbed = tiny.initialize(case)
    expected = train(undisturbed, attempts=False)
    undisturbed.destroy()
    engine = tiny.initialize(case)
    losses = train(engine, attempts=True)
    assert not engine.sparkling.gradients.held
    engine = ds_sparkling.grow_if_due(engine)
    losses.append(tiny.evaluate(engine))
    expected.append(tiny.evaluate(engine))
    widths = engine.sparkling.widths
    engine.destroy()
    return said, losses, expected, widths


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case}-accumulation{case.accumulation}-{sorted(case.top)}")
def test_growth_with_a_gradient_in_hand_is_refused_and_nothing_is_touched(case: Case, workers: Pool) -> None:
    ((said, losses, expected, widths),) = workers(1).run(around_one_step, case)
    assert said
    for message in said:
        assert "before the forward pass" in message
    assert losses == expected
    assert widths["moe_intermediate_size"] == 8


def held_after(stage: int, what: str) -> bool:
    """Whether a gradient is held after something that a loop may do without ``engine.backward`` and ``engine.step``."""
    engine = tiny.initialize(case(stage, top=UNMANAGED))
    loss = engine(*tiny.batch(0))
    if what == "backward of the loss itself":
        loss.backward()
    elif what == "a gradient set by hand":
        parameter = next(engine.module.parameters())
        (parameter.grad,) = torch.autograd.grad(engine.module(*tiny.batch(0)), parameter)
    elif what == "gradients that don't reach parameters":
        loss.sum().detach().requires_grad_().square().backward()
    elif what == "a batch that is skipped":
        engine.backward(loss)
        engine.zero_grad()
    held: bool = engine.sparkling.gradients.held
    engine.destroy()
    return held


@pytest.mark.parametrize(
    ("stage", "what", "held"),
    [
        (2, "backward of the loss itself", True),
        (3, "backward of the loss itself", True),
        (0, "a gradient set by hand", True),
        (1, "gradients that don't reach parameters", False),
        (0, "a batch that is skipped", False),
    ],
)
def test_what_counts_is_what_the_next_step_would_use(stage: int, what: str, held: bool, workers: Pool) -> None:
    assert workers(1).run(held_after, stage, what) == [held]


def one_rank_holds(case: Case) -> tuple[str, int]:
    import ds_sparkling

    engine = tiny.initialize(case)
    tiny.train(engine, 1)
    if engine.global_rank == 1:
        parameter = next(engine.module.parameters())
        parameter.grad = torch.ones_like(parameter)
    return refused(lambda: ds_sparkling.grow(engine, WIDE)), len(tiny.train(engine, 2))


def test_all_ranks_refuse_if_one_holds_a_gradient(workers: Pool) -> None:
    first, second = workers(2).run(one_rank_holds, Case(2, 1, sparkling={"check": False}))
    assert first == second
    assert "before the forward pass" in first[0]
    assert "rank 1" in first[0]


def two_stages_late() -> dict[str, int]:
    import ds_sparkling

    stages = [{"at_step": at, "widths": {"moe_intermediate_size": width}} for at, width in ((1, 8), (2, 10))]
    engine = tiny.initialize(Case(1, 1, top=UNMANAGED, sparkling={**GROWING, "stages": stages}))
    for step in range(2):
        engine.backward(engine(*tiny.batch(step)))
        engine.step()
    widths: dict[str, int] = ds_sparkling.grow_if_due(engine).sparkling.widths
    return widths


def test_all_stages_that_are_due_happen_before_the_step(workers: Pool) -> None:
    (widths,) = workers(1).run(two_stages_late)
    assert widths["moe_intermediate_size"] == 10
