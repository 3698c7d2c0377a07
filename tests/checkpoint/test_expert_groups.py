"""DeepSpeed splits the experts' optimizer group by its size, so growing makes more groups, online and offline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import checkpoint_files
import tiny
from distributed import Workers
from ds_sparkling.checkpoint import layout
from ds_sparkling.checkpoint.opening import open_checkpoint
from tiny import Case

#: Elements; two of a rank's three expert weights fit into one group before the growth, one after it.
LIMIT = 400
WIDE = {"moe_intermediate_size": 10}
PLAN = {"stages": [{"at_step": 2, "widths": WIDE}], "rewarmup": {"steps": 4}}


def grow_and_save(case: Case, directory: str) -> list[int]:
    """How many groups there are before and after; the rates of all groups must go on as they were."""
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    import ds_sparkling

    defaults = split.__defaults__
    split.__defaults__ = (LIMIT,)
    try:
        engine = tiny.initialize(case)
        tiny.train(engine, 2)
        counts, rates = [len(engine.get_lr())], set(engine.get_lr())
        engine.save_checkpoint(directory, tag="before")
        engine = ds_sparkling.grow_if_due(engine)
        counts.append(len(engine.get_lr()))
        assert set(engine.get_lr()) == rates
        engine.save_checkpoint(directory, tag="after")
        tiny.train(engine, 4)
        return counts
    finally:
        split.__defaults__ = defaults


@pytest.mark.parametrize("case", [Case(2, 3, 2, groups=True, sparkling=PLAN), Case(2, 2, 2, sparkling=PLAN)], ids=str)
def test_split_groups_of_experts_grow(
    case: Case, workers: Callable[[int], Workers], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (before, after), _ = workers(case.ranks).run(grow_and_save, case, str(tmp_path / "saved"))
    assert after == before + 1
    monkeypatch.setattr(layout, "EXPERT_GROUP_LIMIT", LIMIT)
    checkpoint_files.run(tmp_path / "saved", tmp_path / "wide", WIDE, tag="before")
    checkpoint_files.same_files(tmp_path / "saved/after", tmp_path / "wide/before")
    # With experts on one rank every weight is twice as large, so each has a group of its own.
    checkpoint_files.run(tmp_path / "saved", tmp_path / "one", tag="before", world_size=1, expert_parallel=1)
    one = open_checkpoint(tmp_path / "one/before")
    assert sum(group.expert for group in one.layout.groups) == 3
    checkpoint_files.same_tensors(tmp_path / "saved/before", tmp_path / "one/before")
    checkpoint_files.run(tmp_path / "one", tmp_path / "back", world_size=2, expert_parallel=2)
    checkpoint_files.same_files(tmp_path / "saved/before", tmp_path / "back/before")
