"""Stopping and resuming at any step around two growths equals the run that never stopped, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from distributed import Workers
from tiny import Case

STEPS = 9
STAGES = [
    {"at_step": 3, "widths": {"hidden_size": 12, "moe_intermediate_size": 10}},
    {"at_step": 6, "widths": {"moe_intermediate_size": 15}},
]
LAYERS = [
    {"at_step": 3, "widths": {"num_hidden_layers": 2}},
    {"at_step": 6, "widths": {"num_hidden_layers": 5, "hidden_size": 12}},
]
GROWING = {"stages": STAGES, "rewarmup": {"ratio": 1.5, "steps": 3}}
CASES = [
    Case(2, 3, 2, sparkling=GROWING, zero={"sub_group_size": 500}),
    Case(2, 2, 2, accumulation=2, sparkling={**GROWING, "bias_correction": "inherit"}),
    Case(2, 3, bf16=True, groups=True, sparkling=GROWING),
    Case(3, 1, bf16=True, frozen=True, sparkling={"stages": STAGES, "rewarmup": {"steps": 2, "curve": "factor"}}),
    Case(2, 3, 2, sparkling={"growths": LAYERS, "rewarmup": {"ratio": 1.5, "steps": 3}}),
    Case(1, 0, sparkling={"stages": STAGES, "rewarmup": {"steps": 1, "scope": "all"}}),
]


def loop(engine: Any, steps: int, save_dir: str | None = None) -> tuple[Any, list[float]]:
    """The training loop of a user: grow if due, step; with ``save_dir``, a checkpoint after every step."""
    import ds_sparkling

    losses = []
    while engine.global_steps < steps:
        engine = ds_sparkling.grow_if_due(engine)
        losses += tiny.train(engine, engine.global_steps + 1)
        if save_dir is not None:
            engine.save_checkpoint(save_dir, client_state={"seen": engine.global_steps})
    return engine, losses


def uninterrupted(case: Case, directory: str) -> tuple[list[float], Any]:
    engine = tiny.initialize(case, checkpoint=directory)
    engine, losses = loop(engine, STEPS, directory)
    return losses, summary(engine)


def resumed(case: Case, directory: str, tag: str) -> tuple[int, list[float], Any]:
    engine = tiny.initialize(case, checkpoint=directory, tag=tag)
    path, client_state = engine.load_checkpoint(directory, tag=tag)
    assert path is not None
    assert client_state["seen"] == engine.global_steps
    start = engine.global_steps
    engine.sparkling = without_checkpoints(engine.sparkling)
    engine, losses = loop(engine, STEPS)
    return start, losses, summary(engine)


def without_checkpoints(run: Any) -> Any:
    from dataclasses import replace

    return replace(run, checkpoint_dir=None)


def summary(engine: Any) -> tuple[Any, tuple[Any, ...]]:
    counters = (
        engine.global_steps,
        engine.global_samples,
        engine.skipped_steps,
        engine.get_lr(),
        [engine.lr_scheduler.rates(group) for group in range(len(engine.get_lr()))],
        engine.sparkling.widths,
    )
    return tiny.local_state(engine), counters


@pytest.mark.parametrize("case", CASES, ids=str)
def test_resume_equals_the_uninterrupted_run(case: Case, workers: Callable[[int], Workers], tmp_path: Path) -> None:
    pool = workers(case.ranks)
    whole = pool.run(uninterrupted, case, str(tmp_path))
    tags = [
        "global_step2",
        "global_step3",
        "global_step3-before-growth1",
        "global_step4",
        "global_step5",
        "global_step6-before-growth2",
    ]
    assert {*tags} <= {path.name for path in tmp_path.iterdir()}
    for tag in [*tags, "global_step7", "global_step8"]:
        for (losses, end), (start, rest, end_resumed) in zip(
            whole, pool.run(resumed, case, str(tmp_path), tag), strict=True
        ):
            assert rest == losses[start * case.accumulation :], tag
            assert end_resumed[1] == end[1], tag
            (state, _), (expected, _) = end_resumed[0], end[0]
            assert all(torch.equal(state[n][k], t) for n, ts in expected.items() for k, t in ts.items()), tag


def wrong_widths(case: Case, directory: str) -> str:
    from ds_sparkling.errors import CheckpointError

    engine = tiny.initialize(case)
    try:
        engine.load_checkpoint(directory, tag="global_step4")
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_a_checkpoint_of_other_widths_is_refused(workers: Callable[[int], Workers], tmp_path: Path) -> None:
    case = CASES[-1]
    workers(1).run(uninterrupted, case, str(tmp_path))
    (message,) = workers(1).run(wrong_widths, case, str(tmp_path))
    assert "global_step4" in message
    assert "'hidden_size': 12" in message
    assert f"checkpoint='{tmp_path}'" in message


def from_plain_deepspeed(case: Case, directory: str) -> tuple[int, float, float]:
    """A checkpoint written by DeepSpeed alone has no record; it is taken as one at the starting widths."""
    import deepspeed

    from ds_sparkling.spec.record import FILE_NAME

    plain, *_ = deepspeed.initialize(model=case.build_model(), config=case.config)
    tiny.train(plain, 2)
    plain.save_checkpoint(directory, tag="plain")
    assert not (Path(directory) / "plain" / FILE_NAME).exists()
    engine = tiny.initialize(case, checkpoint=directory)
    engine.load_checkpoint(directory)
    return engine.global_steps, tiny.evaluate(plain), tiny.evaluate(engine)


def test_a_plain_deepspeed_checkpoint_can_be_grown(workers: Callable[[int], Workers], tmp_path: Path) -> None:
    for steps, plain, engine in workers(2).run(from_plain_deepspeed, CASES[0], str(tmp_path)):
        assert steps == 2
        assert plain == engine
