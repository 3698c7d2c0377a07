"""What the docs' page "After a growth" says of a training loop's own things, where no other test does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from torch import nn

import tiny
from distributed import Workers
from ds_sparkling.errors import GrowthError, PlanError
from tiny import Case

WIDER = {"hidden_size": 12}
PLANNED: dict[str, Any] = {"growths": [{"at_step": 1, "widths": WIDER}], "check": False}
Pool = Callable[[int], Workers]


def adopted(case: Case, **arguments: Any) -> Any:
    import deepspeed

    import ds_sparkling

    engine, *_ = deepspeed.initialize(model=case.build_model(), config=case.config)
    return ds_sparkling.adopt(engine, case.build_model, **arguments)


def hooks_called(case: Case, in_place: bool) -> list[int]:
    """How often a hook on the model and one on a parameter are called: before a growth, after it, and anew."""
    import ds_sparkling

    engine = adopted(case) if in_place else tiny.initialize(case)
    calls = [0]

    def count(*_: object) -> None:
        calls[0] += 1

    def watch(engine: Any) -> None:
        engine.module.register_forward_hook(count)
        next(engine.module.parameters()).register_post_accumulate_grad_hook(count)

    seen = []
    for step, anew in enumerate((True, False, True), start=1):
        engine = ds_sparkling.grow_if_due(engine)
        if anew:
            watch(engine)
        before = calls[0]
        tiny.train(engine, step)
        seen.append(calls[0] - before)
    assert engine.module.config.hidden_size == 12
    return seen


@pytest.mark.parametrize("in_place", [False, True], ids=["replaced", "in place"])
def test_hooks_are_lost_and_can_be_registered_anew(in_place: bool, workers: Pool) -> None:
    (seen,) = workers(1).run(hooks_called, Case(1, 1, sparkling=PLANNED), in_place)
    assert seen[0] > 0
    assert seen[1] == 0
    assert seen[2] > 0


def frozen_outside(case: Case) -> str:
    import ds_sparkling

    engine = tiny.initialize(case)
    next(engine.module.parameters()).requires_grad_(False)
    tiny.train(engine, 1)
    with pytest.raises(GrowthError) as error:
        ds_sparkling.grow(engine, WIDER)
    return str(error.value)


def test_what_was_frozen_outside_build_model_is_named(workers: Pool) -> None:
    for said in workers(2).run(frozen_outside, Case(2, 1)):
        assert "requires_grad of ['embed_tokens.weight']" in said
        assert "freeze parameters inside build_model" in said


def told(case: Case) -> list[tuple[int, int]]:
    """What ``on_growth`` finds: the engine's width and that of a parameter that is taken anew."""
    import ds_sparkling

    found: list[tuple[int, int]] = []

    def take(engine: Any) -> None:
        found.append((engine.module.config.hidden_size, next(engine.module.parameters()).shape[-1]))

    engine = adopted(case, on_growth=take)
    tiny.train(engine, 1)
    assert ds_sparkling.grow_if_due(engine) is engine
    return found


def test_on_growth_is_called_with_the_grown_engine(workers: Pool) -> None:
    assert workers(2).run(told, Case(2, 1, sparkling=PLANNED)) == [[(12, 12)]] * 2


def attributes(case: Case) -> tuple[bool, bool]:
    """Whether a module's mode and an attribute that a loop has set are still there after a growth."""
    import ds_sparkling

    engine: Any = tiny.initialize(case)
    tiny.train(engine, 1)
    engine.module.layers[0].eval()
    engine.module.layers[0].note = 1
    engine = ds_sparkling.grow_if_due(engine)
    return engine.module.layers[0].training, hasattr(engine.module.layers[0], "note")


def test_modes_carry_over_and_attributes_dont(workers: Pool) -> None:
    assert workers(1).run(attributes, Case(1, 1, sparkling=PLANNED)) == [(False, False)]


class Wrapped:
    """Builds the tiny model inside a ``DistributedDataParallel``."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __call__(self, hidden_size: int = 6, moe_intermediate_size: int = 5) -> nn.Module:
        model = self.case.build_model(hidden_size=hidden_size, moe_intermediate_size=moe_intermediate_size)
        return nn.parallel.DistributedDataParallel(model)


def wrapped(case: Case) -> str:
    import ds_sparkling

    with pytest.raises(PlanError) as error:
        ds_sparkling.initialize(Wrapped(case), case.config)
    return str(error.value)


def test_a_ddp_of_ones_own_inside_build_model_is_refused(workers: Pool) -> None:
    for said in workers(2).run(wrapped, Case(2, 1, sparkling=PLANNED)):
        assert "build_model(**{'hidden_size': 6}) failed" in said


# -- monitors ---------------------------------------------------------------------------------------------------


def sent(case: Case) -> tuple[int, set[str], set[str]]:
    """How often ``wandb.init`` is called over a growth, and the curves that are sent before and after it."""
    import ds_sparkling

    runs, logged = [], []
    stand_in: Any = ModuleType("wandb")
    stand_in.init = lambda **settings: runs.append(settings)
    stand_in.log = lambda data, step=None, commit=None: logged.append(data)
    sys.modules["wandb"] = stand_in
    try:
        engine = tiny.initialize(case)
        tiny.train(engine, 1)
        before = {key for data in logged for key in data}
        engine = ds_sparkling.grow_if_due(engine)
        logged.clear()
        tiny.train(engine, 2)
    finally:
        del sys.modules["wandb"]
    return len(runs), before, {key for data in logged for key in data}


def test_wandb_gets_the_curves(workers: Pool) -> None:
    top = {"wandb": {"enabled": True, "project": "growth"}}
    case = Case(1, 1, top=top, sparkling={**PLANNED, "log_every": 1, "diagnose_every": 1})
    ((starts, before, after),) = workers(1).run(sent, case)
    assert starts == 2
    assert "Train/tokens" in before
    assert {"Train/tokens", "lr/old", "lr/new", "twins/cosine", "update_rms/new"} <= after
