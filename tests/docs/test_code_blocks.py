"""The code blocks of the pages: Python is run on two ranks, JSON is read as what it is, and nothing else is there."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from distributed import Workers
from docs_pages import EXAMPLES, NAMES, Block, all_blocks, blocks
from ds_sparkling.spec.config import SparklingConfig

#: Growth is planned when two steps are done; where a block takes an engine as given, they are.
CASE = tiny.Case(2, 1, sparkling={"growths": [{"at_step": 2, "widths": {"hidden_size": 12}}], "check": False})
SHOWN = [path.read_text() for path in EXAMPLES]
PYTHON = [block for block in all_blocks("python") if not any(block.text in text for text in SHOWN)]


@pytest.mark.parametrize("page", NAMES)
def test_every_block_is_one_that_a_test_knows(page: str) -> None:
    assert {block.language for block in blocks(page)} <= {"python", "json", "bash", "sh", "text"}


def given_names(code: str) -> set[str]:
    """The names that a block uses before it has made them, roughly: that it uses and doesn't import or assign first."""
    made: set[str] = set()
    needed: set[str] = set()
    for node in ast.parse(code).body:
        names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
        needed |= {n.id for n in names if isinstance(n.ctx, ast.Load)} - made
        made |= {n.id for n in names if isinstance(n.ctx, ast.Store)}
    return needed


def run_block(case: tiny.Case, code: str, directory: str) -> tuple[int, dict[str, int]] | None:
    """Run a block with the names that it takes as given.

    Returns:
        Steps done and widths of its engine, if there is one in the end.
    """
    import itertools

    import deepspeed
    import torch

    import ds_sparkling

    os.chdir(directory)
    Path("config.json").write_text(json.dumps(case.config))
    inputs = (dict(zip(("input_ids", "labels"), tiny.batch(step), strict=True)) for step in itertools.count())
    names: dict[str, Any] = {
        "build_model": case.build_model,
        "total_steps": 4,
        "batches": inputs,
        "deepspeed": deepspeed,
        "ds_sparkling": ds_sparkling,
        "torch": torch,
    }
    if "engine" in given_names(code):
        names["engine"] = ds_sparkling.initialize(case.build_model, case.config, checkpoint="checkpoints")
        tiny.train(names["engine"], 2)
    exec(code, names)
    engine = names.get("engine")
    return None if engine is None else (engine.global_steps, engine.sparkling.widths)


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_runs(block: Block, workers: Callable[[int], Workers], tmp_path: Path) -> None:
    for answer in workers(2).run(run_block, CASE, block.text, str(tmp_path)):
        if "grow_if_due(" in block.text or "grow(" in block.text:
            assert answer is not None
            assert answer[1]["hidden_size"] == 12


def test_the_loop_runs_under_zero_3_with_experts_in_parallel(workers: Callable[[int], Workers], tmp_path: Path) -> None:
    (loop,) = {block.text for block in PYTHON if "total_steps" in block.text}
    answers = workers(2).run(run_block, replace(CASE, stage=3, ep=2), loop, str(tmp_path))
    assert [steps for steps, _ in answers] == [4, 4]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "global_step4"


def test_what_isnt_run_here_stands_in_the_examples() -> None:
    """These are run by their own tests."""
    shown = [block for block in all_blocks("python") if block not in PYTHON]
    assert {block.page for block in shown} == {"docs/guide/trainer-accelerate.md"}


# -- JSON -------------------------------------------------------------------------------------------------------


def contents(block: Block) -> dict[str, Any]:
    text = block.text.strip()
    found: dict[str, Any] = json.loads(text if text.startswith("{") else "{" + text + "}")
    return found


def trained_by(config: dict[str, Any]) -> int:
    """The steps of an engine that is made by a config, with widths as small as the tiny model's."""
    import ds_sparkling

    config["sparkling"]["growths"][0]["widths"] = {"hidden_size": 12}
    engine = ds_sparkling.initialize(CASE.build_model, {**config, "steps_per_print": 10**9})
    tiny.train(engine, 1)
    return int(engine.global_steps)


@pytest.mark.parametrize("block", all_blocks("json"), ids=str)
def test_json_is_what_it_says(block: Block, workers: Callable[[int], Workers]) -> None:
    from deepspeed.monitor.config import get_monitor_config

    found = contents(block)
    monitors = {"tensorboard", "wandb", "csv_monitor", "comet"}
    if found.keys() <= monitors:
        get_monitor_config(found)
    else:
        SparklingConfig.from_dict(found["sparkling"])
    if not found.keys() <= {"sparkling", *monitors}:
        assert workers(1).run(trained_by, found) == [1]


def test_the_reference_shows_the_defaults() -> None:
    (block,) = (block for block in blocks("docs/reference/config.md") if block.language == "json")
    assert SparklingConfig.from_dict(contents(block)["sparkling"]) == SparklingConfig()
