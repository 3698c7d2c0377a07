"""The checkpoint before a growth: whose state of the script it carries, whether it is the latest, and where it goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import checkpoint_files
import tiny
from distributed import Workers
from ds_sparkling.errors import PlanError
from ds_sparkling.spec.record import recorded_widths
from tiny import Case, Logged

BEFORE = "global_step2-before-growth1"
PLANNED = {"stages": [{"at_step": 2, "widths": {"hidden_size": 12}}], "check": False}


def run_of_its_own(
    case: Case, directory: str, saves: dict[int, Any], given: Any, on_all: bool = True
) -> tuple[str, list[str], dict[str, Any]]:
    """A run that saves client states after some steps, and passes one (or None) for its growth after step 2.

    Returns:
        What is the latest checkpoint then, what was logged of it, and the client state in the one before the growth.
    """
    import torch

    import ds_sparkling
    from ds_sparkling.engine.internals import clients_own

    passed = on_all or torch.distributed.get_rank() == 0
    engine = tiny.initialize(case, checkpoint=directory)
    for step in (1, 2):
        tiny.train(engine, step)
        if step in saves:
            engine.save_checkpoint(directory, client_state=saves[step] if passed else {})
    logged = Logged()
    engine = ds_sparkling.grow_if_due(engine, client_state=given)
    logged.close()
    latest = (Path(directory) / "latest").read_text()
    engine = tiny.initialize(case, checkpoint=directory, tag=BEFORE)
    _, state = engine.load_checkpoint(directory, tag=BEFORE)
    return latest, [text for text in logged.messages if BEFORE in text], clients_own(state)


@pytest.mark.parametrize(
    ("saves", "given", "latest", "state"),
    [
        ({}, None, BEFORE, {}),
        ({1: {}}, None, BEFORE, {}),
        ({}, {"epoch": 2}, BEFORE, {"epoch": 2}),
        ({1: {"epoch": 1}}, {"epoch": 2}, BEFORE, {"epoch": 2}),
        ({2: {"epoch": 2}}, None, BEFORE, {"epoch": 2}),
        ({1: {"epoch": 1}}, {}, BEFORE, {}),
        ({1: {"epoch": 1}}, None, "global_step1", {"epoch": 1}),
        ({1: {"epoch": 1}, 2: {}}, None, "global_step2", {"epoch": 1}),
    ],
    ids=["none", "empty", "given", "newer", "of this step", "emptied", "older", "older, saved without"],
)
def test_what_a_resume_finds_is_the_state_of_its_step(
    saves: dict[int, Any],
    given: Any,
    latest: str,
    state: dict[str, Any],
    workers: Callable[[int], Workers],
    tmp_path: Path,
) -> None:
    """An older state is in the checkpoint, but isn't what is resumed from unasked."""
    answers = workers(2).run(run_of_its_own, Case(2, 2, sparkling=PLANNED), str(tmp_path), saves, given)
    for rank, (newest, said, found) in enumerate(answers):
        assert newest == latest
        assert found == state
        assert len(said) == (rank == 0 and latest != BEFORE)
        assert all("pass client_state= to grow_if_due" in text for text in said)


def test_ranks_that_pass_no_state_follow_the_first(workers: Callable[[int], Workers], tmp_path: Path) -> None:
    answers = workers(2).run(
        run_of_its_own, Case(2, 3, sparkling=PLANNED), str(tmp_path), {1: {"epoch": 1}}, None, False
    )
    assert [latest for latest, _, _ in answers] == ["global_step1"] * 2


def resumed(case: Case, directory: str) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """A client state over a resume, a growth, and another resume."""
    import ds_sparkling
    from ds_sparkling.engine.internals import clients_own

    engine = tiny.initialize(case, checkpoint=directory)
    tiny.train(engine, 2)
    engine.save_checkpoint(directory, client_state={"epoch": 7})
    engine = tiny.initialize(case, checkpoint=directory)
    _, first = engine.load_checkpoint(directory)
    ds_sparkling.grow_if_due(engine)
    engine = tiny.initialize(case, checkpoint=directory)
    path, second = engine.load_checkpoint(directory)
    return clients_own(first), Path(path).parent.name, clients_own(second)


@pytest.mark.parametrize("case", [Case(2, 1), Case(2, 3, ep=2), Case(2, 0)], ids=str)
def test_a_loaded_state_is_the_last_one_known(case: Case, workers: Callable[[int], Workers], tmp_path: Path) -> None:
    for first, tag, second in workers(2).run(resumed, replace(case, sparkling=PLANNED), str(tmp_path)):
        assert (first, tag, second) == ({"epoch": 7}, BEFORE, {"epoch": 7})


def adopted(case: Case, directory: str, **arguments: Any) -> None:
    import deepspeed

    import ds_sparkling

    engine, *_ = deepspeed.initialize(model=case.build_model(**recorded_widths(directory)), config=case.config)
    ds_sparkling.adopt(engine, case.build_model, **arguments)
    engine.load_checkpoint(directory)
    tiny.train(engine, 2)
    ds_sparkling.grow_if_due(engine)
    assert engine.module.config.hidden_size == 12


def places(case: Case, root: str) -> None:
    """Where checkpoints before a growth appear, by what ``adopt`` is told."""
    own, json = Path(root, "own"), Path(root, "json")
    planned = replace(case, sparkling={**PLANNED, "checkpoint_dir": str(json)})
    adopted(case, str(own), checkpoint=own)
    assert (own / BEFORE).is_dir()
    adopted(planned, str(json))
    assert (json / BEFORE).is_dir()
    adopted(case, str(own), checkpoint=own)  # goes on from its checkpoint
    read = Path(root, "read")
    adopted(case, str(read), checkpoint=read, read_only=True)
    assert not read.exists()


def test_checkpoint_means_the_same_in_adopt_as_in_initialize(workers: Callable[[int], Workers], tmp_path: Path) -> None:
    workers(2).run(places, Case(2, 2, sparkling=PLANNED), str(tmp_path))


# -- universal checkpoints of grown models -------------------------------------------------------------------------


def grown(case: Case, directory: str) -> list[float]:
    import ds_sparkling

    engine = tiny.initialize(case)
    tiny.train(engine, 2)
    engine = ds_sparkling.grow_if_due(engine)
    tiny.train(engine, 3)
    engine.save_checkpoint(directory)
    return tiny.train(engine, 5)


def resumed_universally(case: Case, directory: str, asked: bool | None) -> list[float]:
    """As the Trainer does it: the engine is made first, adopted, and loads."""
    import deepspeed

    import ds_sparkling

    widths = recorded_widths(directory, universal=asked)
    engine, *_ = deepspeed.initialize(model=case.build_model(**widths), config=case.config)
    ds_sparkling.adopt(engine, case.build_model, checkpoint=directory, read_only=True)
    path, _ = engine.load_checkpoint(directory)
    assert path is not None
    assert engine.module.config.hidden_size == 12
    return tiny.train(engine, 5)


def told_the_way(case: Case, directory: str) -> str:
    with pytest.raises(PlanError) as error:
        resumed_universally(case, directory, None)
    return str(error.value)


@pytest.mark.parametrize("stage", [1, 3])
def test_universal_checkpoints_of_grown_models_are_resumed(
    stage: int, workers: Callable[[int], Workers], tmp_path: Path
) -> None:
    case = Case(2, stage, sparkling=PLANNED)
    universal = replace(case, top={"checkpoint": {"load_universal": True}})
    losses = workers(2).run(grown, case, str(tmp_path / "saved"))
    checkpoint_files.run(tmp_path / "saved", tmp_path / "universal", format="universal")
    directory = tmp_path / "universal"
    assert recorded_widths(directory)["hidden_size"] == 12
    assert workers(2).run(resumed_universally, universal, str(directory), None) == losses
    # Beside an ordinary one of other widths, the engine's config tells which counts.
    (directory / "global_step1").mkdir()
    (directory / "latest").write_text("global_step1")
    assert recorded_widths(directory) == {}
    assert all("universal=True" in said for said in workers(2).run(told_the_way, universal, str(directory)))
    assert workers(2).run(resumed_universally, universal, str(directory), True) == losses
