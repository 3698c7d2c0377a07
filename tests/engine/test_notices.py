"""What a run is told: plans that come too late or aren't there, and each growth's plan, once, in any script."""

from __future__ import annotations

import functools
import os
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.lr_schedules import WarmupCosineLR, WarmupDecayLR, WarmupLR

import tiny
from distributed import Workers, forking
from ds_sparkling.integrations.trainer import SparklingCallback
from ds_sparkling.optim.scheduler import planned_end
from tiny import Case, Logged

STAGES = [{"at_step": step, "widths": {"hidden_size": width}} for step, width in ((2, 12), (39, 24), (40, 48))]


def told_at_the_start(case: Case) -> tuple[list[str], list[str], list[str], list[str]]:
    """What this rank logs when engines start: plans up to and beyond the end, and no block at all."""
    import deepspeed

    import ds_sparkling

    def told(start: Callable[[], Any]) -> list[str]:
        logged = Logged()
        start()
        logged.close()
        return logged.messages

    def adopted(stages: int, **arguments: Any) -> None:
        planned = replace(case, sparkling={**case.sparkling, "stages": STAGES[:stages]})
        engine, *_ = deepspeed.initialize(model=case.build_model(), config=planned.config)
        ds_sparkling.adopt(engine, case.build_model, **arguments)

    blockless = {key: value for key, value in case.config.items() if key != "sparkling"}
    return (
        told(lambda: adopted(2, read_only=True)),
        told(lambda: adopted(2)),
        told(lambda: adopted(3, read_only=True)),
        told(lambda: ds_sparkling.initialize(case.build_model, blockless)),
    )


def test_plans_that_come_too_late_or_are_not_there_are_told_at_the_start(workers: Callable[[int], Workers]) -> None:
    case = Case(2, 1, sparkling={"check": False})
    first, other = workers(2).run(told_at_the_start, case)
    assert other == ([], [], [], [])
    in_time, (unsaved,), (late,), (blockless,) = first
    assert in_time == []
    assert "pass checkpoint=DIR" in unsaved
    assert "planned at step 40 comes too late: its WarmupCosineLR ends after 40 steps" in late
    assert 'no "sparkling" block' in blockless


def test_the_main_jobs_steps_count_too(workers: Callable[[int], Workers]) -> None:
    case = Case(1, 1, sparkling={"check": False, "stages": STAGES[:2]}, top={"training": {"steps": 39}})
    logged = workers(1).run(started, case)[0]
    assert any("planned at step 39 comes too late: the run (training.steps) ends after 39 steps" in m for m in logged)


def started(case: Case) -> list[str]:
    logged = Logged()
    tiny.initialize(case)
    logged.close()
    return logged.messages


def test_schedulers_tell_where_they_end() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)

    def rule(step: int, *, num_training_steps: int) -> float:
        return 1.0 - step / num_training_steps

    torchs = torch.optim.lr_scheduler
    of_transformers = torchs.LambdaLR(optimizer, functools.partial(rule, num_training_steps=70))
    assert planned_end(of_transformers) == 70
    assert planned_end(WarmupCosineLR(optimizer, total_num_steps=50, warmup_num_steps=2)) == 50
    assert planned_end(WarmupDecayLR(optimizer, total_num_steps=60)) == 60
    assert planned_end(torchs.CosineAnnealingLR(optimizer, T_max=80)) == 80
    assert planned_end(torchs.OneCycleLR(optimizer, max_lr=0.1, total_steps=90)) == 90
    for endless in (
        WarmupLR(optimizer),
        torchs.LambdaLR(optimizer, lambda step: 1.0),
        torchs.LinearLR(optimizer),
        None,
    ):
        assert planned_end(endless) is None


def test_the_trainers_last_step_counts(caplog: pytest.LogCaptureFixture) -> None:
    from ds_sparkling.spec.config import SparklingConfig

    run = SimpleNamespace(config=SparklingConfig.from_dict({"stages": STAGES}), record=SimpleNamespace(growths=[]))
    arguments = SimpleNamespace(gradient_checkpointing=False)
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=object()), prepare=None)
    model, engine = SimpleNamespace(config=SimpleNamespace()), SimpleNamespace(sparkling=run)
    trainer = SimpleNamespace(accelerator=accelerator, args=arguments, model=model, model_wrapped=engine)
    callback = SparklingCallback(trainer, Case().build_model)
    for steps in (41, 40, 39):
        state = SimpleNamespace(is_world_process_zero=True, max_steps=steps)
        callback.on_train_begin(arguments, state, None)
    forty, thirty_nine = caplog.messages
    assert "planned at step 40 comes too late: the Trainer ends after 40 steps" in forty
    assert "planned at step 39 comes too late: the Trainer ends after 39 steps" in thirty_nine


#: A user's script that grows, with a line of its own about logging.
_SCRIPT = """
import logging
{logging}
import deepspeed, ds_sparkling, tiny
deepspeed.utils.logger.setLevel(logging.{deepspeed})
deepspeed.init_distributed(verbose=False)
engine = tiny.initialize(tiny.Case(1, 0, sparkling={{"check": False}}))
tiny.train(engine, 1)
engine = ds_sparkling.grow(engine, {{"hidden_size": 12}})
"""


def run_script(script: Path, said: Path) -> None:
    """A user's script in a process of its own, which writes what it says into a file."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("logging", "deepspeed"),
    [("", "WARNING"), ("logging.basicConfig(level=logging.INFO)", "INFO"), ("logging.basicConfig()", "ERROR")],
    ids=["unconfigured", "configured", "by default"],
)
def test_a_growths_plan_is_seen_once_in_any_script(logging: str, deepspeed: str, tmp_path: Path) -> None:
    script, said = tmp_path / "script.py", tmp_path / "said"
    script.write_text(_SCRIPT.format(logging=logging, deepspeed=deepspeed))
    process = forking().Process(target=run_script, args=(script, said))
    process.start()
    process.join()
    assert process.exitcode == 0, said.read_text()
    assert said.read_text().count("growth 1: hidden_size 6 -> 12") == 1
