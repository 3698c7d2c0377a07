"""Ranks of the suite that fail, die or hang."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from distributed import Workers
from launching import outcome
from patience import family


def be_there() -> int:
    return torch.distributed.get_rank()


def wait_for_the_other() -> None:
    if torch.distributed.get_rank() == 1:
        sleep_for_ever()
    torch.distributed.barrier()


def sleep_for_ever() -> None:
    while True:
        time.sleep(1)


def die() -> None:
    if torch.distributed.get_rank() == 1:
        os._exit(3)
    torch.distributed.barrier()


def fail() -> None:
    if torch.distributed.get_rank() == 1:
        raise KeyError("mine")
    wait_for_the_other()


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Workers]:
    pool = Workers(2)
    assert pool.run(be_there) == [0, 1]
    monkeypatch.setattr("distributed.AFTER_A_FAILURE", 1.0)
    yield pool
    pool.stop()


def test_ranks_that_hang_say_where(ranks: Workers) -> None:
    ranks.quiet = 3.0
    with pytest.raises(AssertionError) as failure:
        ranks.run(wait_for_the_other)
    waits, sleeps = str(failure.value).split("--- rank 1 ---")
    assert "rank 0 hangs" in waits
    assert "in wait_for_the_other" in waits
    assert "sleep_for_ever" not in waits
    assert "rank 1 hangs" in sleeps
    assert "in sleep_for_ever" in sleeps
    assert ranks.run(be_there) == [0, 1]  # started anew


@pytest.mark.parametrize(("job", "says"), [(die, "rank 1 died"), (fail, "KeyError: 'mine'")])
def test_the_failure_of_one_rank_is_told_soon(job: Callable[[], None], says: str, ranks: Workers) -> None:
    began = time.monotonic()
    with pytest.raises(AssertionError, match=says):
        ranks.run(job)
    assert time.monotonic() - began < ranks.quiet / 2


def start_another() -> int:
    return subprocess.Popen(["sleep", "1000"]).pid


def test_what_ranks_have_started_ends_with_them(ranks: Workers) -> None:
    started = ranks.run(start_another)
    assert all(family(pid) for pid in started)
    ranks.stop()
    deadline = time.monotonic() + 30
    while any(one.status() != "zombie" for pid in started for one in family(pid)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


#: Two processes, of which each waits for the other.
HANGING = """
import subprocess, sys, time

def sleep_for_ever():
    print("asleep", flush=True)
    time.sleep(1000)

if len(sys.argv) == 1:
    subprocess.Popen([sys.executable, __file__, "second"]).wait()
sleep_for_ever()
"""


def test_what_is_launched_and_hangs_says_where(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(HANGING)
    command = [sys.executable, str(script)]
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "asleep\n"
    with pytest.raises(AssertionError, match=r"script\.py'\] hangs:") as failure:
        outcome(process, quiet=2.0)
    assert "in sleep_for_ever" in str(failure.value)
    assert "in wait" in str(failure.value)
