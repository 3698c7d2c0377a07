"""Engines made by plain ``deepspeed.initialize``: adopted, grown in place, and equal to those made to grow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from distributed import Workers
from ds_sparkling.errors import CheckpointError
from ds_sparkling.spec.record import recorded_widths
from tiny import Case

STAGES = [{"at_step": 2, "widths": {"hidden_size": 12, "moe_intermediate_size": 10}}]
GROWING = {"stages": STAGES, "rewarmup": {"ratio": 1.5, "steps": 3}}


def plain(case: Case, **widths: int) -> Any:
    import deepspeed

    engine, *_ = deepspeed.initialize(model=case.build_model(**widths), config=case.config)
    return engine


def grown_in_place(case: Case, directory: str) -> tuple[list[float], Any]:
    """Train over a growth with nothing but the first engine in hand, and compare with an engine made to grow."""
    import ds_sparkling

    reference = tiny.initialize(case)
    losses = tiny.train(reference, 2)
    reference = ds_sparkling.grow_if_due(reference)
    losses += tiny.train(reference, 4)

    seen: list[Any] = []
    engine = plain(case)
    module = engine.module
    assert ds_sparkling.adopt(engine, case.build_model, on_growth=seen.append) is engine
    own = tiny.train(engine, 2)
    assert ds_sparkling.grow_if_due(engine) is engine
    assert engine.module is module
    assert module.config.hidden_size == 12
    assert len(seen) == 1
    assert seen[0] is engine
    own += tiny.train(engine, 4)
    assert own == losses
    assert ds_sparkling.rebuild(engine) is engine
    tiny.train(engine, 5)
    tiny.train(reference, 5)
    engine.save_checkpoint(directory)
    for (state, _), (expected, _) in [(tiny.local_state(engine), tiny.local_state(reference))]:
        assert all(torch.equal(state[n][k], t) for n, ts in expected.items() for k, t in ts.items())
    return tiny.train(engine, 7), tiny.local_state(engine)[0]


def resumed(case: Case, directory: str) -> tuple[list[float], Any]:
    import ds_sparkling

    engine = plain(case, **recorded_widths(directory))
    ds_sparkling.adopt(engine, case.build_model, checkpoint=directory)
    engine.load_checkpoint(directory)
    return tiny.train(engine, 7), tiny.local_state(engine)[0]


@pytest.mark.parametrize(
    "case",
    [Case(2, 3, 2, sparkling=GROWING), Case(2, 2, bf16=True, sparkling=GROWING), Case(2, 0, sparkling=GROWING)],
    ids=str,
)
def test_an_adopted_engine_grows_in_place_like_one_made_to_grow(
    case: Case, workers: Callable[[int], Workers], tmp_path: Path
) -> None:
    whole = workers(2).run(grown_in_place, case, str(tmp_path))
    for (losses, state), (rest, end) in zip(whole, workers(2).run(resumed, case, str(tmp_path)), strict=True):
        assert rest == losses
        assert all(torch.equal(end[n][k], t) for n, ts in state.items() for k, t in ts.items())


def optimizer_by_hand(case: Case) -> list[tuple[int, list[float]]]:
    """Hidden size and the groups' rates in each step over a growth, with optimizer and groups made in Python."""
    import deepspeed

    import ds_sparkling

    def optimizer(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)

    config = {key: value for key, value in case.config.items() if key not in ("optimizer", "scheduler")}
    config["zero_allow_untested_optimizer"] = True
    makers: Any = {"optimizer": optimizer, "model_parameters": tiny.decay_groups}
    reference = ds_sparkling.initialize(case.build_model, config, **makers)
    model = case.build_model()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer(tiny.decay_groups(model)), config=config)
    ds_sparkling.adopt(engine, case.build_model, **makers)
    both = []
    for step in range(1, 5):
        reference = ds_sparkling.grow_if_due(reference)
        ds_sparkling.grow_if_due(engine)
        assert tiny.train(engine, step) == tiny.train(reference, step)
        both.append((engine.module.config.hidden_size, engine.get_lr()))
    return both


@pytest.mark.parametrize("stage", [2, 3])
def test_an_optimizer_made_by_hand(stage: int, workers: Callable[[int], Workers]) -> None:
    for steps in workers(2).run(optimizer_by_hand, Case(2, stage, sparkling=GROWING)):
        assert steps == [(width, [1e-2, 1e-2, 1e-3]) for width in (6, 6, 12, 12)]


def boundary_set_by_hand(case: Case) -> tuple[int, bool, bool]:
    """As accelerate does it: two backwards, one step; a growth waits in between, after it not."""
    import ds_sparkling

    engine = plain(case)
    ds_sparkling.adopt(engine, case.build_model)
    for micro_step in range(6):
        engine.set_gradient_accumulation_boundary(micro_step % 2 == 1)
        engine.backward(engine(*tiny.batch(micro_step)))
        if micro_step % 2 == 1:
            engine.step()
        else:
            waiting = engine.sparkling.gradients.waiting
    ds_sparkling.grow_if_due(engine)
    return engine.global_steps, waiting, engine.module.config.hidden_size == 12


def test_accumulation_that_the_loop_counts_itself(workers: Callable[[int], Workers]) -> None:
    case = Case(2, 2, accumulation=2, sparkling={"stages": [{"at_step": 3, "widths": {"hidden_size": 12}}]})
    assert workers(2).run(boundary_set_by_hand, case) == [(3, True, True)] * 2


def refusals(case: Case, directory: str) -> list[str]:
    import deepspeed

    import ds_sparkling
    from ds_sparkling.errors import SparklingError

    def message(engine: Any, **arguments: Any) -> str:
        try:
            ds_sparkling.adopt(engine, case.build_model, **arguments)
        except SparklingError as error:
            return f"{type(error).__name__}: {error}"
        return "adopted"

    model = case.build_model()
    config = {key: value for key, value in case.config.items() if key not in ("optimizer", "scheduler")}
    by_hand, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
    first, wide = plain(case), plain(case, hidden_size=12, moe_intermediate_size=10)
    return [
        message(by_hand),
        message(by_hand, optimizer=torch.optim.AdamW(model.parameters())),
        message(by_hand, optimizer=lambda params: torch.optim.AdamW(params)),
        message(wide),
        message(wide, checkpoint=directory),
        message(first, checkpoint=directory),
        message(first),
        message(first),
    ]


def test_what_cannot_grow_is_refused_at_once(workers: Callable[[int], Workers], tmp_path: Path) -> None:
    case = Case(2, 3, sparkling=GROWING)
    workers(2).run(grown_in_place, case, str(tmp_path))
    unmade, no_function, by_hand, unknown, grown, narrow, adopted, again = workers(2).run(
        refusals, case, str(tmp_path)
    )[0]
    assert "pass optimizer=lambda" in unmade
    assert "optimizer must be a function" in no_function
    assert "build_model(**ds_sparkling.recorded_widths(checkpoint))" in unknown
    assert "PlanError" in narrow
    assert by_hand == grown == adopted == "adopted"
    assert "can grow already" in again


def test_the_widths_of_a_checkpoint(tmp_path: Path) -> None:
    assert recorded_widths(None) == recorded_widths(tmp_path) == {}
    (tmp_path / "plain").mkdir()
    assert recorded_widths(tmp_path, "plain") == {}
    with pytest.raises(CheckpointError, match="doesn't exist"):
        recorded_widths(tmp_path, "absent")
