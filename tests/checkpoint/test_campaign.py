"""A few calls of each campaign; ``tests/campaign.py`` has the long ones."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

import campaign
from distributed import forking


def few(directory: Path) -> list[campaign.Table]:
    torch.set_num_threads(1)
    checkpoints = campaign.synthetic(directory)
    return [campaign.damage(checkpoints, directory, 25, seed=0), campaign.kills(checkpoints["zero3"], directory, 5, 0)]


def test_damaged_checkpoints_are_refused_and_kills_do_no_harm(tmp_path: Path) -> None:
    # Forks of a process that has no other threads.
    with ProcessPoolExecutor(1, forking()) as pool:
        tables = pool.submit(few, tmp_path).result()
    assert [(table.tried, table.failed) for table in tables] == [(25, []), (5, [])]
