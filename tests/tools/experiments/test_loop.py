"""One process that trains and grows by the engine's functions: the same run, branched off a trunk or not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_sparkling.growth import Widener
from experiments.loop import Trainer, active_parameters, train
from experiments.muon import newton_schulz
from experiments.runs import HIDDEN, INNER, Outcome, Stage, TrainingRun, block_text, widths_of
from experiments.scales import SCALES

CPU = torch.device("cpu")
NARROW = replace(SCALES["tiny"].base(""), steps=12)
REWARMUP = {"rewarmup": {"steps": 2}}


WIDE = {INNER: 16, HIDDEN: 32}


def grown(run: TrainingRun = NARROW, wide: dict[str, int] = WIDE) -> TrainingRun:
    return replace(run, stages=(Stage(6, widths_of(**wide)),), block=block_text(REWARMUP))


def finished(run: TrainingRun, snapshots: Path) -> Outcome:
    outcome = train(run, snapshots)
    assert outcome is not None
    return outcome


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_that_branches_off_a_trunk_is_the_run_from_the_start(optimizer: str, tmp_path: Path) -> None:
    run = grown(replace(NARROW, optimizer=optimizer))
    assert train(run.trunk, tmp_path, keep=(6,), until=6) is None
    assert [path.name for path in tmp_path.iterdir()] == [f"{run.trunk.key}-6.pt"]
    branched, whole = finished(run, tmp_path), finished(run, tmp_path / "none")
    assert branched.loss == whole.loss
    assert branched.flops == whole.flops
    assert branched.curve == whole.curve[-len(branched.curve) :]


def test_the_growth_keeps_loss_state_and_step_counts() -> None:
    trainer = Trainer(grown(), CPU)
    for _ in range(6):
        trainer.train_step()
    old = {name: param.detach().clone() for name, param in trainer.model.named_parameters()}
    moments = {
        name: trainer.optimizers[0].state[param]["exp_avg"].clone() for name, param in trainer.model.named_parameters()
    }
    before = trainer.validate(32)
    plan = trainer.grow({INNER: 16, HIDDEN: 32}, trainer.run.config.strategy)
    assert trainer.validate(32) == pytest.approx(before, rel=1e-6)
    for name, param in trainer.model.named_parameters():
        state, expected = trainer.optimizers[0].state[param], torch.empty_like(param)
        Widener(plan, name).state("exp_avg", moments[name], expected.view(-1))
        assert torch.equal(state["exp_avg"], expected)
        Widener(plan, name).weight(old[name], expected.view(-1))
        assert torch.equal(param, expected)
        assert float(state["step"]) == 6
    assert trainer.twins() == pytest.approx(1.0)
    trainer.train_step()
    assert float(next(iter(trainer.optimizers[0].state.values()))["step"]) == 7


def test_what_a_growth_showed_is_in_the_outcome(tmp_path: Path) -> None:
    outcome = finished(grown(), tmp_path)
    assert outcome.before is not None
    assert outcome.after is not None
    assert outcome.after == pytest.approx(outcome.before, rel=1e-6)
    assert outcome.drift == pytest.approx(1.0, abs=1e-4)
    assert outcome.twins is not None
    assert 0.5 < outcome.twins < 0.99999
    assert outcome.shock == max(point.loss for point in outcome.curve if point.step >= 6) - outcome.before
    assert outcome.jump == outcome.after - outcome.before
    assert [point.loss for point in outcome.curve if point.step == 6][-2:] == [outcome.before, outcome.after]
    shape, tokens = NARROW.shape, 6 * NARROW.shape.tokens
    narrow, wide = (active_parameters(shape, widths) for widths in (dict(NARROW.widths), {INNER: 16, HIDDEN: 32}))
    assert outcome.flops == 6.0 * tokens * (narrow + wide)
    never = finished(NARROW, tmp_path)
    assert (never.jump, never.shock, never.twins, never.drift) == (None,) * 4


def test_growing_twice_has_a_rate_for_every_stage(tmp_path: Path) -> None:
    stages = (Stage(4, widths_of(**{INNER: 16})), Stage(8, widths_of(**{HIDDEN: 32})))
    trainer = Trainer(replace(NARROW, stages=stages, block=block_text(REWARMUP)), CPU)
    strategy = trainer.run.config.strategy
    for step in range(10):
        if step in (4, 8):
            trainer.grow(dict(stages[step // 8].widths), strategy)
        trainer.train_step()
    rates = trainer.schedulers[0].rates(0)
    assert len(set(rates)) == 3
    assert trainer.widths == {INNER: 16, HIDDEN: 32}


def test_the_same_run_has_the_same_name_and_another_one_has_not() -> None:
    assert grown().key == grown().key
    changes: list[dict[str, Any]] = [{"seed": 1}, {"lr": 0.1}, {"block": "{}"}]
    others = [NARROW, grown(wide={INNER: 16}), *(replace(grown(), **change) for change in changes)]
    assert len({run.key for run in [grown(), *others]}) == 1 + len(others)
    assert block_text({"scaling": "rms", "rewarmup": {"steps": 2, "ratio": 1.3}}) == block_text(REWARMUP)
    assert grown().trunk == NARROW


@pytest.mark.parametrize("shape", [(3, 8, 5), (4, 6), (2, 3, 3)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = newton_schulz(matrices)
    assert found.shape == matrices.shape
    values = torch.linalg.svdvals(found)
    assert 0.5 < float(values.min()) <= float(values.max()) < 1.5
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    assert float((found - u @ v).abs().max()) < 0.5
