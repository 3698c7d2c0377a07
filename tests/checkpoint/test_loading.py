"""What the file room writes is loaded by plain DeepSpeed, and resumed by a growing engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint_files
import tiny
from distributed import Workers
from ds_sparkling.checkpoint.opening import open_checkpoint
from ds_sparkling.checkpoint.source import WEIGHT
from tiny import Case

WIDE = {"hidden_size": 13, "moe_intermediate_size": 11}
PLAN = {"stages": [{"at_step": 3, "widths": WIDE}], "rewarmup": {"steps": 4}}


def cases() -> list[Case]:
    small = {"sub_group_size": 200}
    return [
        Case(2, 3, 2, zero=small, groups=True, sparkling=PLAN),
        Case(2, 2, 2, bf16=True, sparkling=PLAN),
        Case(3, 2, groups=True, frozen=True, sparkling=PLAN),
        Case(2, 1, bf16=True, top={"data_types": {"grad_accum_dtype": "fp32"}}, sparkling=PLAN),
        Case(3, 3, frozen=True, sparkling=PLAN),
    ]


def train_and_save(case: Case, directory: str) -> None:
    engine = tiny.initialize(case)
    tiny.train(engine, 3)
    engine.save_checkpoint(directory, client_state={"seen": 17})


def plain_engine(case: Case, widths: Mapping[str, int], partitioned: bool = False, universal: bool = False) -> Any:
    """An engine of DeepSpeed alone, of a model that is made under ``zero.Init`` if ``partitioned``."""
    import deepspeed

    config = {key: value for key, value in case.config.items() if key != "sparkling"}
    if universal:
        config["checkpoint"] = {"load_universal": True}
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=partitioned):
        model = case.build_model(**widths)
    parameters = tiny.decay_groups(model) if case.groups else None
    engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=parameters)
    return engine


def train_plainly(case: Case, directory: str, partitioned: bool) -> None:
    engine = plain_engine(case, {}, partitioned)
    tiny.train(engine, 3)
    engine.save_checkpoint(directory, client_state={"seen": 17})


def load_plainly(case: Case, directory: str, partitioned: bool, universal: bool) -> Any:
    """Load with DeepSpeed alone into the wide model; its state, the client state, and rates before one more step."""
    engine = plain_engine(case, WIDE, partitioned, universal)
    path, client = engine.load_checkpoint(directory)
    assert path is not None
    state = tiny.local_state(engine)
    rates = engine.get_lr()
    tiny.train(engine, engine.global_steps + 1)
    return state, client["seen"], engine.global_steps, rates


def resume(case: Case, directory: str) -> Any:
    """Go on from a checkpoint for some steps, through a re-warm-up; the losses and the state at the end."""
    import ds_sparkling

    engine = tiny.initialize(case, checkpoint=directory)
    engine.load_checkpoint(directory)
    engine = ds_sparkling.grow_if_due(engine)
    losses = tiny.train(engine, 9)
    return losses, tiny.local_state(engine)[0], [stage.planned_step for stage in engine.sparkling.record.growths]


def on(case: Case, ranks: int, expert_parallel: int) -> Case:
    return Case(**{**vars(case), "ranks": ranks, "ep": expert_parallel})


@pytest.mark.parametrize("case", cases(), ids=str)
def test_plain_deepspeed_loads_it_on_other_ranks(case: Case, workers: Callable[[int], Workers], tmp_path: Path) -> None:
    workers(case.ranks).run(train_and_save, case, str(tmp_path / "narrow"))
    topologies = [(case.ranks, case.ep), (4, 4) if case.ep else (4, 0), (1, 1) if case.ep else (2, 0)]
    for ranks, shared in dict.fromkeys(topologies):
        out = tmp_path / f"{ranks}-{shared}"
        checkpoint_files.run(tmp_path / "narrow", out, WIDE, world_size=ranks, expert_parallel=max(shared, 1))
        answers = workers(ranks).run(load_plainly, on(case, ranks, shared), str(out), False, False)
        assert {answer[1:3] for answer in answers} == {(17, 4)}
        same_state(out / "global_step3", [answer[0] for answer in answers])


@pytest.mark.parametrize(
    ("case", "partitioned"),
    [(Case(2, 3, 2, groups=True), False), (Case(2, 3, 2, groups=True), True), (Case(2, 2), False)],
)
def test_a_checkpoint_of_plain_deepspeed_grows(
    case: Case, partitioned: bool, workers: Callable[[int], Workers], tmp_path: Path
) -> None:
    workers(case.ranks).run(train_plainly, case, str(tmp_path / "narrow"), partitioned)
    for ranks, shared in [(2, case.ep), (4, 2 * case.ep)]:
        out = tmp_path / str(ranks)
        topology = {"world_size": ranks, "expert_parallel": max(shared, 1)}
        checkpoint_files.run(tmp_path / "narrow", out, WIDE, config="olmoe_factory:build_tied", **topology)
        answers = workers(ranks).run(load_plainly, on(case, ranks, shared), str(out), partitioned, False)
        same_state(out / "global_step3", [answer[0] for answer in answers])


@pytest.mark.parametrize("case", [case for case in cases() if not case.frozen], ids=str)
def test_plain_deepspeed_loads_universal_checkpoints(
    case: Case, workers: Callable[[int], Workers], tmp_path: Path
) -> None:
    workers(case.ranks).run(train_and_save, case, str(tmp_path / "narrow"))
    out = tmp_path / "universal"
    checkpoint_files.run(tmp_path / "narrow", out, WIDE, format="universal")
    for ranks, shared in [(case.ranks, case.ep), (4, 2) if case.ep else (3, 0)]:
        answers = workers(ranks).run(load_plainly, on(case, ranks, shared), str(out), False, True)
        same_state(out / "global_step3", [answer[0] for answer in answers])


@pytest.mark.parametrize(
    "case", [*cases()[:2], Case(3, 2, sparkling=PLAN, zero={"round_robin_gradients": True})], ids=str
)
def test_a_growing_engine_resumes_it_like_its_own(
    case: Case, workers: Callable[[int], Workers], tmp_path: Path
) -> None:
    workers(case.ranks).run(train_and_save, case, str(tmp_path / "narrow"))
    checkpoint_files.run(tmp_path / "narrow", tmp_path / "wide", WIDE)
    online = workers(case.ranks).run(resume, case, str(tmp_path / "narrow"))
    offline = workers(case.ranks).run(resume, case, str(tmp_path / "wide"))
    for first, second in zip(online, offline, strict=True):
        assert not list(checkpoint_files.differences(first, second))
        assert second[2] == [3]


def same_state(checkpoint: Path, answers: list[Any]) -> None:
    """Assert that engines hold what a checkpoint holds."""
    found = tiny.join(answers)
    source = open_checkpoint(checkpoint)
    assert found.keys() == source.layout.params.keys()
    for name, tensors in found.items():
        param = source.layout.params[name]
        for key, tensor in tensors.items():
            expected = source.elements(name, WEIGHT if key == "weight" else key, 0, param.numel).view(param.shape)
            assert torch.equal(tensor, expected), f"{key} of {name}"
