"""The state of other optimizers than torch's AdamW grows offline as it does online."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import checkpoint_files
import tiny
from distributed import Workers
from tiny import Case

#: They turn the order round that Muon sorts the experts' weights in.
WIDE = {"hidden_size": 13, "moe_intermediate_size": 20}
GROW: dict[str, Any] = {"stages": [{"at_step": 3, "widths": WIDE}], "rewarmup": {"steps": 4}}


def case(
    kind: str, stage: int, ep: int = 0, *, ranks: int = 2, zero: Any = None, sparkling: Any = None, **params: Any
) -> Case:
    top = {"optimizer": {"type": kind, "params": {"lr": 1e-2, **params}}, "zero_allow_untested_optimizer": True}
    return Case(ranks, stage, ep, zero=zero or {}, top=top, sparkling=sparkling or GROW)


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}

CASES = [
    case("Muon", 1, ranks=3, momentum=0.9),
    case("Muon", 2, momentum=0.9, zero={"reduce_scatter": False}),
    case("Muon", 3, 2, momentum=0.9, zero={"reduce_scatter": False}),
    case("Muon", 2, 2, momentum=0.9, zero={"reduce_scatter": True}),
    case("Muon", 2, momentum=0.9, zero={"reduce_scatter": False, **OFFLOAD}),
    case("AdamW", 3, 2, zero=OFFLOAD),
    case("AdamW", 2, 2, zero=OFFLOAD),
    case("SGD", 3, 2),
    case("SGD", 2, momentum=0.9),
    case("AdamW", 3, 2, torch_adam=True, fused=True),
    case("AdamW", 1, torch_adam=True, amsgrad=True),
]


def grow_and_save(case: Case, directory: str, steps: int) -> None:
    import ds_sparkling

    engine = tiny.initialize(case)
    tiny.train(engine, steps)
    engine.save_checkpoint(directory, tag="before")
    if steps == 3:
        engine = ds_sparkling.grow_if_due(engine)
    else:
        engine = ds_sparkling.grow(engine, WIDE)
    engine.save_checkpoint(directory, tag="after")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.top['optimizer']['type']}-{case}")
def test_any_optimizers_state_grows(case: Case, workers: Callable[[int], Workers], tmp_path: Path) -> None:
    workers(case.ranks).run(grow_and_save, case, str(tmp_path / "saved"), 3)
    checkpoint_files.run(tmp_path / "saved", tmp_path / "wide", WIDE, tag="before")
    checkpoint_files.same_files(tmp_path / "saved/after", tmp_path / "wide/before")
    # There and back over another number of ranks.
    checkpoint_files.run(tmp_path / "saved", tmp_path / "other", tag="before", world_size=5, expert_parallel=1)
    checkpoint_files.same_tensors(tmp_path / "saved/before", tmp_path / "other/before")
    topology: dict[str, Any] = {"world_size": case.ranks, "expert_parallel": max(case.ep, 1)}
    checkpoint_files.run(tmp_path / "other", tmp_path / "back", **topology)
    checkpoint_files.same_files(tmp_path / "saved/before", tmp_path / "back/before")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_checkpoint_from_before_the_first_step_grows(
    stage: int, workers: Callable[[int], Workers], tmp_path: Path
) -> None:
    first = Case(2, stage, 2, sparkling=GROW)
    workers(2).run(grow_and_save, first, str(tmp_path / "saved"), 0)
    checkpoint_files.run(tmp_path / "saved", tmp_path / "wide", WIDE, tag="before")
    checkpoint_files.same_tensors(tmp_path / "saved/after", tmp_path / "wide/before")
