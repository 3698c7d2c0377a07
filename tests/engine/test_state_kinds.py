"""Optimizer state that is a second set of weights grows as weights do; what can't be told is refused at the start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint_files
import tiny
from distributed import Workers
from ds_sparkling.errors import PlanError
from ds_sparkling.spec.strategy import Strategy
from optimizers import Keeping, ScheduleFreeAdam
from tiny import Case

Pool = Callable[[int], Workers]
WIDE = {"hidden_size": 12, "moe_intermediate_size": 9}
STATES = ("exp_avg_sq", "z")


def case(ranks: int, stage: int, init: dict[str, Any], *, bf16: bool = False, **sparkling: Any) -> Case:
    block = {"init": init, "check": False, "stages": [{"at_step": 3, "widths": WIDE}], **sparkling}
    return Case(ranks, stage, bf16=bf16, tied=False, top={"zero_allow_untested_optimizer": True}, sparkling=block)


def engine_with(case: Case, optimizer: Callable[[Any], torch.optim.Optimizer]) -> Any:
    import ds_sparkling

    config = {key: value for key, value in case.config.items() if key not in ("optimizer", "scheduler")}
    return ds_sparkling.initialize(case.build_model, config, optimizer=optimizer)


def averaged_loss(engine: Any) -> float:
    """The loss of the model with the optimizer's averaged weights."""
    from ds_sparkling.engine import access
    from ds_sparkling.engine.optimizers import adapter_of

    base: Any = adapter_of(engine).base
    masters = {master: base.param_groups[group] for master, group in access.master_groups(engine).items()}
    trained = {master: master.detach().clone() for master in masters}
    averages = {master: base.averaged(group, master) for master, group in masters.items()}
    losses = []
    for values in (averages, trained):
        adapter_of(engine).begin_writing()
        for master, value in values.items():
            master.data.copy_(value)
        adapter_of(engine).finish_writing()
        losses.append(tiny.evaluate(engine))
    return losses[0]


def grown(case: Case, counts: bool, directory: str) -> tuple[list[float], Any, Any, Any]:
    """Losses with averaged weights around a growth, the logical states, and the plan; checkpoints of both."""
    import ds_sparkling

    def optimizer(params: Any) -> torch.optim.Optimizer:
        made = ScheduleFreeAdam(params, counts=counts)
        made.train()
        return made

    engine = engine_with(case, optimizer)
    tiny.train(engine, 3)
    losses = [averaged_loss(engine)]
    before = tiny.local_state(engine, STATES)
    engine.save_checkpoint(directory, tag="before")
    engine = ds_sparkling.grow_if_due(engine)
    after = tiny.local_state(engine, STATES)
    engine.save_checkpoint(directory, tag="after")
    losses.append(averaged_loss(engine))
    tiny.train(engine, 5)
    return losses, before, after, engine.sparkling.plan


COUNTED: dict[str, Any] = {"rewarmup": {"scope": "none"}, "bias_correction": "inherit"}


@pytest.mark.parametrize(
    ("case", "counts", "keeps"),
    [
        (case(2, 3, {"perturbation": 0.5}, rewarmup={"steps": 3}), False, True),
        (case(2, 1, {"split": "1:2"}, optimizer_state="drop", **COUNTED), True, True),
        (case(1, 2, {"fan_out": "random", "fan_in": "random"}, bf16=True, **COUNTED), True, False),
    ],
    ids=str,
)
def test_averaged_weights_grow_with_the_model(
    case: Case, counts: bool, keeps: bool, workers: Pool, tmp_path: Path
) -> None:
    answers = workers(case.ranks).run(grown, case, counts, str(tmp_path / "saved"))
    for (before, after), _, _, _ in answers:
        assert (after == pytest.approx(before, rel=1e-6)) is keeps
    expected = tiny.reference(answers[0][3], tiny.join([before for _, before, _, _ in answers]))
    found = tiny.join([after for _, _, after, _ in answers])
    for name, tensors in expected.items():
        for key, tensor in tensors.items():
            assert torch.equal(found[name][key], tensor), (name, key)
    checkpoint_files.run(tmp_path / "saved", tmp_path / "wide", WIDE, tag="before")
    checkpoint_files.same_files(tmp_path / "saved/after", tmp_path / "wide/before")


def refusals(above: int) -> list[str]:
    """What a start with an optimizer that keeps something odd says, by whether its state is declared."""
    from ds_sparkling.errors import SparklingError

    keep: dict[str, Any] = {"ema": torch.clone} if not above else {"absmax": lambda param: torch.zeros(8)}
    said = []
    for stage, scope in ((0, "new"), (1, "none"), (3, "all")):
        for declared in ({}, {"ema": "weights"}):
            block: dict[str, Any] = {"rewarmup": {"scope": scope}, "state_kinds": declared}
            try:
                engine = engine_with(case(1, stage, {}, **block), lambda params: Keeping(params, keep, above))
                engine.destroy()
                said.append("starts")
            except SparklingError as error:
                said.append(str(error))
    return said


@pytest.mark.parametrize(("above", "name", "way_out"), [(0, "ema", "state_kinds"), (4095, "absmax", "AdamW")])
def test_odd_state_is_refused_at_the_start_at_every_stage_and_scope(
    above: int, name: str, way_out: str, workers: Pool
) -> None:
    (said,) = workers(1).run(refusals, above)
    for undeclared, declared in zip(said[::2], said[1::2], strict=True):
        assert repr(name) in undeclared
        assert way_out in undeclared
        assert declared == ("starts" if not above else undeclared)


def grown_with_declared_state(case: Case, directory: str) -> None:
    import ds_sparkling

    engine = engine_with(case, lambda params: Keeping(params, {"ema": torch.clone}))
    tiny.train(engine, 3)
    engine.save_checkpoint(directory, tag="before")
    ds_sparkling.grow_if_due(engine).save_checkpoint(directory, tag="after")


def test_offline_declared_state_grows_as_online_and_undeclared_is_refused(workers: Pool, tmp_path: Path) -> None:
    declared = case(1, 2, {"perturbation": 0.5}, state_kinds={"ema": "weights"}, rewarmup={"scope": "none"})
    workers(1).run(grown_with_declared_state, declared, str(tmp_path / "saved"))
    checkpoint_files.run(tmp_path / "saved", tmp_path / "wide", WIDE, tag="before")
    checkpoint_files.same_files(tmp_path / "saved/after", tmp_path / "wide/before")
    other = checkpoint_files.block_of(Strategy(), tmp_path / "undeclared.json")
    with pytest.raises(PlanError, match=r"'ema' of unknown kind.*state_kinds"):
        checkpoint_files.run(tmp_path / "saved", tmp_path / "no", WIDE, tag="before", deepspeed_config=other)
    assert not (tmp_path / "no").exists()
