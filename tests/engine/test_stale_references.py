"""What was held of an engine from before a growth goes on working, or says what became of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from distributed import Workers
from ds_sparkling.errors import GrowthError
from tiny import Case

WIDER = {"hidden_size": 12, "moe_intermediate_size": 10}


def complaint(use: Callable[[], Any]) -> str:
    with pytest.raises(GrowthError) as error:
        use()
    return str(error.value)


def held_over_a_growth(case: Case) -> dict[str, str]:
    """What each thing that was held says when it is used after the growth."""
    import deepspeed

    import ds_sparkling

    engine = tiny.initialize(case)
    old, model, optimizer, scheduler = engine, engine.module, engine.optimizer, engine.lr_scheduler
    base, base_scheduler, (name, param) = optimizer.optimizer, scheduler.base, next(iter(model.named_parameters()))
    submodule = model.get_submodule(name.rpartition(".")[0])
    tiny.train(engine, 1)
    engine = ds_sparkling.grow(engine, WIDER)
    tiny.train(engine, 2)

    assert isinstance(old, deepspeed.DeepSpeedEngine)
    assert isinstance(model, nn.Module)
    assert isinstance(base, torch.optim.Optimizer)
    assert isinstance(param, nn.Parameter)
    assert param.untyped_storage().nbytes() == 0  # nothing of the old weights is kept by whoever holds one
    assert all("is gone" in repr(thing) for thing in (old, model, optimizer, base, scheduler, param))
    uses: dict[str, Callable[[], Any]] = {
        "engine": lambda: old.global_steps,
        "engine called": lambda: old(*tiny.batch(0)),
        "engine stepped": lambda: old.step(),
        "engine set": lambda: setattr(old, "global_steps", 0),
        "engine grown": lambda: ds_sparkling.grow_if_due(old),
        "model": lambda: list(model.parameters()),
        "model called": lambda: model(*tiny.batch(0)),
        "model copied": lambda: copy.deepcopy(model),
        "optimizer": lambda: optimizer.param_groups,
        "optimizer's own": lambda: base.zero_grad(),
        "scheduler": lambda: scheduler.get_last_lr(),
        "scheduler's own": lambda: base_scheduler.get_last_lr(),
        "parameter": lambda: param.shape,
        "parameter used": lambda: torch.ones(3) * param,
        "parameter copied": lambda: copy.deepcopy(param),
        "module in it": lambda: submodule.weight.sum(),
    }
    return {what: complaint(use) for what, use in uses.items()}


@pytest.mark.parametrize("case", [Case(2, 3), Case(2, 1, bf16=True)], ids=str)
def test_what_a_growth_has_replaced_says_so(case: Case, workers: Callable[[int], Workers]) -> None:
    instead = {
        "engine": "the one that grow() returned",
        "model": "engine.module of the grown engine",
        "optimizer": "engine.optimizer of the grown engine",
        "scheduler": "engine.lr_scheduler of the grown engine",
        "parameter": "(embed_tokens.weight)",
        "module": "(embed_tokens.weight)",
    }
    for said in workers(2).run(held_over_a_growth, case):
        for what, text in said.items():
            assert "was grown and is gone" in text, what
            assert instead[what.split("'")[0].split()[0]] in text, what


def copied(case: Case) -> None:
    """Copies of the module are made where DeepSpeed's own are, before and after a growth, and spend nothing."""
    import ds_sparkling

    engine = tiny.initialize(case)
    for step in (1, 2):
        twin = copy.deepcopy(engine.module)
        if case.stage < 3:  # whose partitions are no weights that a copy could compute with
            twin(*tiny.batch(0))
        tiny.train(engine, step)
        assert engine.sparkling.spent.tokens == 2 * 16 * step
        engine = ds_sparkling.grow(engine, WIDER if step == 1 else {"hidden_size": 24})


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_module_can_be_copied(stage: int, workers: Callable[[int], Workers]) -> None:
    workers(2).run(copied, Case(2, stage))


def returned_by_deepspeed(case: Case) -> None:
    """The optimizer and the scheduler that ``deepspeed.initialize`` returned, over a growth of an adopted engine."""
    import deepspeed

    import ds_sparkling

    engine, optimizer, _, scheduler = deepspeed.initialize(model=case.build_model(), config=case.config)
    base = engine.optimizer.optimizer if hasattr(engine.optimizer, "optimizer") else engine.optimizer
    ds_sparkling.adopt(engine, case.build_model)
    rewarming = engine.lr_scheduler
    tiny.train(engine, 3)
    ds_sparkling.grow_if_due(engine)
    assert engine.module.config.hidden_size == 12
    tiny.train(engine, 5)
    assert engine.optimizer is optimizer
    assert engine.lr_scheduler is rewarming
    assert scheduler.get_last_lr() == rewarming.get_last_lr() == engine.get_lr()
    assert [group["lr"] for group in base.param_groups] == engine.get_lr()
    assert len(rewarming.births) == 1
    scheduler.last_batch_iteration = 20  # by whichever reference it is changed
    tiny.train(engine, 6)
    assert rewarming.base.last_batch_iteration == 21
    for group in base.param_groups:
        group["weight_decay"] = 0.5
    assert all(group["weight_decay"] == 0.5 for group in optimizer.param_groups)


@pytest.mark.parametrize(
    "case", [Case(2, 3), Case(2, 2), Case(2, 1, bf16=True), Case(2, 0), Case(2, 0, bf16=True)], ids=str
)
def test_what_deepspeed_initialize_returned_stays_valid(case: Case, workers: Callable[[int], Workers]) -> None:
    stages = [{"at_step": 3, "widths": WIDER}]
    workers(2).run(returned_by_deepspeed, Case(2, case.stage, bf16=case.bf16, sparkling={"stages": stages}))
