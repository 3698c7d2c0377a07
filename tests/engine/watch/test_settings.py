"""A run's settings in TensorBoard: what it can't hold is left out, with one warning."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

from ds_sparkling.engine.watch import tensorboard
from ds_sparkling.spec.strategy import Strategy

CYCLE: dict[str, Any] = {}
CYCLE["itself"] = CYCLE


@pytest.mark.parametrize(
    ("more", "warned"),
    [
        ({"comment": "as it should be"}, False),
        ({"huge": 10**5000}, True),
        ({"huge": [10**5000]}, True),
        ({"half": "\ud83d"}, True),
        ({"\ud83d": 1}, True),
        ({"keys": {(1, 2): 3}}, True),
        ({"cycle": CYCLE}, True),
    ],
    ids=["plain", "huge", "huge in a list", "half a character", "in a key", "tuple", "cycle"],
)
def test_what_tensorboard_can_not_hold_is_told_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    more: dict[str, Any],
    warned: bool,
) -> None:
    run = SimpleNamespace(
        ds_config={"train_batch_size": 8, **more},
        config=SimpleNamespace(strategy=Strategy()),
        record=SimpleNamespace(initial_widths={"hidden_size": 4}),
        plan=None,
    )
    writer = SummaryWriter(str(tmp_path))
    engine: Any = SimpleNamespace(monitor=SimpleNamespace(tb_monitor=SimpleNamespace(summary_writer=writer)))
    monkeypatch.setattr(tensorboard, "run_of", lambda engine: run)
    with caplog.at_level(logging.WARNING):
        tensorboard.introduce_run(engine)
    writer.add_scalar("Train/loss", 1.0, 1)
    writer.close()
    told = [record.getMessage() for record in caplog.records if "TensorBoard can't hold" in record.getMessage()]
    assert len(told) == warned
    assert all(len(message) < 1000 for message in told)
