"""Modules that a model holds under several names: they grow once, online as offline, and the function is kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint_files
import shared_factory
import tiny
from distributed import Workers
from ds_sparkling.discovery.find_axes import axes_to_grow
from ds_sparkling.errors import PlanError
from ds_sparkling.spec.strategy import OptimizerState, Strategy
from shared_factory import SHARE, WIDE, WIDTHS
from tiny import Case

STRATEGY = Strategy(optimizer_state=OptimizerState.COPY_SCALED, perturbation=0.1)


@pytest.mark.parametrize("how", [how for how in SHARE if how != "last"])
def test_what_is_shared_is_read_and_proven(how: str) -> None:
    build = partial(shared_factory.build, how)
    found = axes_to_grow(build, WIDTHS, [WIDE], [], Strategy(), {}, check=True)
    assert not found.proof.doubt
    assert list(found.axes) == [name for name, _ in build().named_parameters()]


def test_a_norm_that_must_have_two_factors_is_refused_by_name() -> None:
    with pytest.raises(PlanError, match=r"extra\.norm"):
        axes_to_grow(partial(shared_factory.build, "last"), WIDTHS, [WIDE], [], Strategy(), {}, check=True)


def grow_and_save(case: Case, directory: str) -> Any:
    """What a rank saw: its state before, the plan, its state after, and the losses."""
    import ds_sparkling

    engine = ds_sparkling.initialize(partial(shared_factory.build, "everything"), case.config)
    tiny.train(engine, 2)
    tiny.with_strategy(engine, STRATEGY)
    before, loss = tiny.local_state(engine), tiny.evaluate(engine)
    if case.stage:
        engine.save_checkpoint(directory, tag="before")
    engine = ds_sparkling.grow(engine, WIDE)
    after, grown_loss = tiny.local_state(engine), tiny.evaluate(engine)
    if case.stage:
        engine.save_checkpoint(directory, tag="after")
    tiny.train(engine, 4)
    return before, engine.sparkling.plan, after, (loss, grown_loss)


@pytest.mark.parametrize(
    "case",
    [Case(1, 3), Case(2, 3), Case(2, 2, bf16=True), Case(1, 1), Case(2, 1), Case(2, 0)],
    ids=str,
)
def test_online_offline_and_the_reference_are_equal(
    case: Case, workers: Callable[[int], Workers], tmp_path: Path
) -> None:
    answers = workers(case.ranks).run(grow_and_save, case, str(tmp_path / "saved"))
    before, after = (tiny.join([answer[place] for answer in answers]) for place in (0, 2))
    plan = answers[0][1]
    expected = tiny.reference(plan, before)
    assert expected.keys() == after.keys()
    for name, tensors in expected.items():
        for key, tensor in tensors.items():
            assert torch.equal(after[name][key], tensor), (name, key)
    for *_, (loss, grown) in answers:
        assert grown == pytest.approx(loss, rel=1e-2 if case.bf16 else 1e-5)
    if case.stage:
        block = checkpoint_files.block_of(STRATEGY, tmp_path / "ds.json")
        options: dict[str, Any] = {"tag": "before", "deepspeed_config": block}
        options["config"] = "shared_factory:build_everything"
        checkpoint_files.run(tmp_path / "saved", tmp_path / "wide", WIDE, **options)
        checkpoint_files.same_files(tmp_path / "saved/after", tmp_path / "wide/before")
        checkpoint_files.run(tmp_path / "saved", tmp_path / "universal", tag="before", format="universal")
        checkpoint_files.run(tmp_path / "universal", tmp_path / "back", WIDE, **options)
        checkpoint_files.same_tensors(tmp_path / "saved/after", tmp_path / "back/before")
