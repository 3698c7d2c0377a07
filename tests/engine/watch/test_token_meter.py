"""Tokens and training compute, counted in any loop: over growths, accumulation and checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from distributed import Workers
from ds_sparkling.engine.watch.token_meter import token_ids
from ds_sparkling.spec.record import FILE_NAME, GrowthRecord, Spent, read_record
from tiny import Case, Logged

Pool = Callable[[int], Workers]

STAGES: dict[str, Any] = {
    "stages": [{"at_step": 2, "widths": {"hidden_size": 12, "moe_intermediate_size": 10}}],
    "checkpoint_before_growth": False,
    "log_every": 1,
}
#: tiny.batch gives every rank [2, 8] tokens.
TOKENS = 16
CASES = [Case(2, 3, 2, accumulation=2, sparkling=STAGES), Case(3, 1, sparkling=STAGES)]


def watched(engine: Any) -> dict[str, list[float]]:
    """From now on, the spending that is written into the engine's monitors."""
    events: dict[str, list[float]] = {"Train/tokens": [], "Train/compute_flops": []}

    def write_events(new: list[tuple[str, float, int]]) -> None:
        for tag, value, _ in new:
            if tag in events:
                events[tag].append(value)

    tiny.monitored(engine, write_events)
    return events


def spend(case: Case, directory: str) -> dict[str, Any]:
    """Two steps, a growth, two steps; then the last two again from a checkpoint, and from one that tells nothing."""
    import ds_sparkling

    engine = tiny.initialize(case)
    narrow = engine.sparkling.parameters[1]
    events = watched(engine)
    tiny.train(engine, 2)
    tiny.evaluate(engine)  # costs nothing here
    before = engine.sparkling.spent
    engine = ds_sparkling.grow_if_due(engine)
    assert engine.sparkling.spent == before
    grown = watched(engine)
    engine.save_checkpoint(directory, tag="grown")
    tiny.train(engine, 4)
    found = {
        "active": (narrow, engine.sparkling.parameters[1]),
        "events": {tag: values + grown[tag] for tag, values in events.items()},
        "spent": engine.sparkling.spent,
        "saved": read_record(Path(directory) / "grown"),
    }
    engine = tiny.initialize(case, checkpoint=directory)
    engine.load_checkpoint(directory)
    tiny.train(engine, 4)
    found["resumed"] = engine.sparkling.spent
    if torch.distributed.get_rank() == 0:
        record = replace(found["saved"], spent=None)
        record.write(Path(directory) / "grown")
    torch.distributed.barrier()
    engine = tiny.initialize(case, checkpoint=directory)
    engine.load_checkpoint(directory)
    found["untold"] = [engine.sparkling.spent]
    tiny.train(engine, 4)
    found["untold"].append(engine.sparkling.spent)
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_loop_counts_tokens_and_compute(case: Case, workers: Pool, tmp_path: Path) -> None:
    step = TOKENS * case.accumulation * case.ranks
    for found in workers(case.ranks).run(spend, case, str(tmp_path)):
        narrow, wide = found["active"]
        assert 0 < narrow < wide
        flops = [6.0 * narrow * step, 12.0 * narrow * step, 6.0 * (2 * narrow + wide) * step]
        flops.append(flops[-1] + 6.0 * wide * step)
        assert found["events"] == {"Train/tokens": [step, 2 * step, 3 * step, 4 * step], "Train/compute_flops": flops}
        assert found["saved"].spent == Spent(2 * step, flops[1])
        assert found["spent"] == found["resumed"] == Spent(4 * step, flops[3])
        # Steps before a checkpoint that doesn't tell count as if they had been like the first one after it.
        assert found["untold"] == [None, Spent(4 * step, 24.0 * wide * step)]


def untold_share(ep: int) -> tuple[list[str], tuple[int, int]]:
    """What is logged about a model whose config doesn't tell how many experts it has, and its parameters."""
    import ds_sparkling

    case = Case(2, 1, ep)

    def build_model(**widths: int) -> Any:
        model: Any = case.build_model(**widths)
        model.config = SimpleNamespace(**{**vars(model.config), "num_experts": None})
        return model

    logged = Logged()
    engine = ds_sparkling.initialize(build_model, case.config)
    logged.close()
    return [message for message in logged.messages if "active parameters" in message], engine.sparkling.parameters


def test_experts_that_all_count_as_active_are_told(workers: Pool) -> None:
    (((message,), (total, active)), (quiet, _)) = workers(2).run(untold_share, 0)
    assert "doesn't tell how many of its experts a token uses" in message
    assert (total, quiet) == (active, [])
    messages, (total, active) = workers(2).run(untold_share, 2)[0]  # AutoEP knows
    assert messages == []
    assert active < total


def test_tokens_are_found_among_a_modules_inputs() -> None:
    ids, mask = torch.zeros(2, 8, dtype=torch.long), torch.ones(2, 8)
    assert token_ids((), {"attention_mask": mask.long(), "input_ids": ids}) is ids
    assert token_ids((ids, ids.clone()), {}) is ids
    assert token_ids(({"attention": mask, "tokens": ids},), {}) is ids
    assert token_ids((torch.tensor(3), mask), {"labels": ids}) is ids
    assert token_ids((mask, True), {"n": 3}) is None


def test_a_record_tells_what_was_spent_if_it_knows(tmp_path: Path) -> None:
    for spent in (Spent(3, 1e15), Spent(), None):
        GrowthRecord({"hidden": 4}, {}, spent=spent).write(tmp_path)
        record = read_record(tmp_path)
        assert record is not None
        assert record.spent == spent
    told = json.loads((tmp_path / FILE_NAME).read_text())
    del told["spent"]  # which records of old didn't have
    (tmp_path / FILE_NAME).write_text(json.dumps(told))
    assert read_record(tmp_path) == GrowthRecord({"hidden": 4}, {})
