"""The examples in docs/examples: started by their launchers, resumed, exported and loaded by transformers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed import Workers
from ds_sparkling.checkpoint.command import main as expand
from launching import ROOT, Launch

EXAMPLES = ROOT / "docs" / "examples"
STEPS, GROWTH, EVERY = 8, 4, 2
AUTOEP = {"enabled": True, "autoep_size": 2, "preset_model": "qwen3_moe", "use_grouped_mm": False}
#: MKL's matrix products would round by where their operands lie in memory.
SAME_ROUNDING = {"MKL_CBWR": "COMPATIBLE"}
IDS = torch.arange(3, 35)[None]


def short(name: str, path: Path, **changes: Any) -> str:
    """An example's JSON, growing at step ``GROWTH`` of ``STEPS``, with ``changes`` to its blocks (None: without)."""
    config = json.loads((EXAMPLES / name).read_text())
    config["sparkling"]["growths"][0]["at_step"] = GROWTH
    config["sparkling"]["rewarmup"]["steps"] = 2
    if config["scheduler"]["params"]["total_num_steps"] != "auto":
        config["scheduler"]["params"]["total_num_steps"] = STEPS
    for block, change in changes.items():
        config[block] = {**config.get(block, {}), **(change or {})}
        if change is None:
            del config[block]
    path.mkdir(parents=True, exist_ok=True)
    (path / "deepspeed.json").write_text(json.dumps(config))
    return str(path / "deepspeed.json")


def arguments(config: str, output: Path, *more: str) -> list[str]:
    return ["--deepspeed", config, "--output", str(output), "--steps", str(STEPS), "--every", str(EVERY), *more]


def run_again(script: str, given: list[str]) -> None:
    """The example's own main, on a rank that outlives it."""
    import runpy
    from unittest import mock

    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    argv = [script, *given]
    with mock.patch.object(sys, "argv", argv), mock.patch("torch.distributed.destroy_process_group"):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()


def states(checkpoint: Path) -> list[dict[str, Any]]:
    """The optimizer files of a DeepSpeed checkpoint, which hold the master weights too."""
    files = sorted(checkpoint.glob("*optim_states.pt"))
    assert files
    return [torch.load(file, weights_only=False)["optimizer_state_dict"] for file in files]


def same(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    return not isinstance(first, (int, float, str)) or first == second


def loaded(directory: Path) -> Any:
    """The grown model, by ``from_pretrained``."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.hidden_size == 64
    return model.eval()


def losses(output: Path) -> list[tuple[int, float]]:
    """What the Trainer has logged: training and evaluation losses by step."""
    history = json.loads((output / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry.get("loss", entry.get("eval_loss"))) for entry in history if "epoch" in entry]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Workers]:
    """Processes of their own: the libraries keep global state."""
    pool = Workers(2, environment=SAME_ROUNDING)
    yield pool
    pool.stop()


# -- transformers.Trainer ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trainer")
    run = launch(
        "docs/examples/trainer.py", *arguments(short("trainer.json", output / "config"), output), **SAME_ROUNDING
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert f"the best model so far, {output}/checkpoint-{GROWTH}, doesn't fit the grown one" in run.stderr
    return output


def test_the_trainer_grows_evaluates_and_saves(trained: Path) -> None:
    widths = {
        step: json.loads((trained / f"checkpoint-{step}" / "config.json").read_text())["hidden_size"]
        for step in range(EVERY, STEPS + 1, EVERY)
    }
    assert widths == {2: 32, 4: 32, 6: 64, 8: 64}
    assert [step for step, _ in losses(trained)] == [1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8]
    state = json.loads((trained / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    assert state["best_global_step"] == STEPS
    last = losses(trained)[-1][1]
    assert last < losses(trained)[2][1]


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_resumed_trainer_ends_like_the_one_that_never_stopped(
    step: int, trained: Path, ranks: Workers, tmp_path: Path
) -> None:
    config = str(trained / "config" / "deepspeed.json")
    resume = str(trained / f"checkpoint-{step}")
    ranks.run(run_again, "docs/examples/trainer.py", arguments(config, tmp_path, "--resume", resume))
    assert losses(tmp_path) == losses(trained)
    last = f"checkpoint-{STEPS}/global_step{STEPS}"
    assert same(states(tmp_path / last), states(trained / last))


@pytest.mark.parametrize(
    "changes",
    [
        {"zero_optimization": {"stage": 2}},
        {"scheduler": None},
        {"zero_optimization": {"stage3_gather_16bit_weights_on_model_save": False}, "expert_parallel": AUTOEP},
    ],
    ids=["zero2-accumulation", "its-own-scheduler", "zero3-autoep"],
)
def test_the_trainer_on_other_engines(changes: dict[str, Any], ranks: Workers, tmp_path: Path) -> None:
    config = short("trainer.json", tmp_path / "config", **changes)
    more = ["--accumulation", "2"] if changes.keys() == {"zero_optimization"} else []
    ranks.run(run_again, "docs/examples/trainer.py", arguments(config, tmp_path / "whole", *more))
    resume = str(tmp_path / "whole" / "checkpoint-6")
    ranks.run(run_again, "docs/examples/trainer.py", arguments(config, tmp_path / "two", "--resume", resume, *more))
    last = f"checkpoint-{STEPS}/global_step{STEPS}"
    assert same(states(tmp_path / "two" / last), states(tmp_path / "whole" / last))
    assert losses(tmp_path / "two") == losses(tmp_path / "whole")


def test_the_trainers_checkpoint_exports_to_what_it_saves(trained: Path, tmp_path: Path) -> None:
    expand([str(trained / f"checkpoint-{STEPS}"), str(tmp_path / "hf"), "--format", "hf"])
    exported, saved = (loaded(path) for path in (tmp_path / "hf", trained))
    assert same(exported.state_dict(), saved.state_dict())


# -- accelerate -------------------------------------------------------------------------------------------------


def test_accelerate_grows_and_resumes(ranks: Workers, launch: Launch, tmp_path: Path) -> None:
    script, config = "docs/examples/accelerate_loop.py", short("zero3.json", tmp_path)
    run = launch(script, *arguments(config, tmp_path / "whole"), **SAME_ROUNDING)
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(re.findall(r"^step \d+: loss", run.stdout, re.MULTILINE)) == STEPS
    for step in (2, 4, 6):
        resume = str(tmp_path / "whole" / f"step-{step}")
        ranks.run(run_again, script, arguments(config, tmp_path / str(step), "--resume", resume))
        ends = [states(tmp_path / run / f"step-{STEPS}" / "pytorch_model") for run in ("whole", str(step))]
        assert same(*ends)
    record = json.loads((tmp_path / f"whole/step-{STEPS}/pytorch_model/ds_sparkling.json").read_text())
    assert record["widths"] == {"hidden_size": 64, "moe_intermediate_size": 64}


# -- a loop of one's own, and the way to from_pretrained --------------------------------------------------------


def engine_logits(config: str, directory: str) -> torch.Tensor:
    import runpy

    import ds_sparkling
    from ds_sparkling.discovery.factory import HuggingFaceFactory

    model = runpy.run_path(str(EXAMPLES / "training_loop.py"))["MODEL"]
    engine = ds_sparkling.initialize(HuggingFaceFactory(model), config, checkpoint=directory)
    path, _ = engine.load_checkpoint(directory)
    assert path is not None
    engine.eval()
    with torch.no_grad():
        return engine(input_ids=IDS).logits.float()


def test_the_plain_loop_grows_resumes_and_exports(ranks: Workers, launch: Launch, tmp_path: Path) -> None:
    config = short("zero3.json", tmp_path, expert_parallel=AUTOEP)
    run = launch("docs/examples/training_loop.py", *arguments(config, tmp_path / "run"), **SAME_ROUNDING)
    assert run.returncode == 0, run.stderr[-3000:]
    whole = states(tmp_path / "run" / f"global_step{STEPS}")
    assert "nan" not in run.stdout

    shutil.copytree(tmp_path / "run" / f"global_step{STEPS - EVERY}", tmp_path / "two" / f"global_step{STEPS - EVERY}")
    (tmp_path / "two" / "latest").write_text(f"global_step{STEPS - EVERY}")
    ranks.run(run_again, "docs/examples/training_loop.py", arguments(config, tmp_path / "two"))
    assert same(states(tmp_path / "two" / f"global_step{STEPS}"), whole)

    logits = ranks.run(engine_logits, config, str(tmp_path / "run"))[0]
    expand([str(tmp_path / "run"), str(tmp_path / "hf"), "--format", "hf"])
    with torch.no_grad():
        exported = loaded(tmp_path / "hf")(input_ids=IDS).logits
    assert torch.allclose(exported, logits, rtol=1e-5, atol=1e-5)


# -- all of them ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_help(script: Path) -> None:
    shown = subprocess.run(
        [sys.executable, str(script), "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert "--deepspeed FILE" in shown.stdout
