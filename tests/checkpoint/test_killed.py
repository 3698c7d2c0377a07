"""Killed at any moment: the output is absent or complete, and the next call succeeds."""

from __future__ import annotations

import itertools
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint_files
from benchmarks.synthetic_checkpoint import config_of, write_checkpoint
from damage import hashes
from distributed import forking
from ds_sparkling.checkpoint import expand, publish
from ds_sparkling.errors import CheckpointError

TOOL = Path(__file__).parents[2] / "tools/expand_zero_ckpt.py"


RANDOM_KILLS = 4


def test_killed_at_random_it_leaves_nothing_that_harms(tmp_path: Path) -> None:
    checkpoint, out = tmp_path / "saved", tmp_path / "out"
    config = config_of(2_000_000)
    write_checkpoint(checkpoint, config, ranks=2, expert_parallel=2)
    before = hashes(checkpoint)
    widths = {"hidden_size": config.hidden_size * 3 // 2}
    began, ended = run_tool(checkpoint, tmp_path / "undisturbed", widths)
    expected = hashes(tmp_path / "undisturbed")
    chance = random.Random()
    hits = 0
    for number in range(RANDOM_KILLS):
        if number == 0:
            run_tool(checkpoint, out, widths, after_start=chance.uniform(0, ended))
        else:  # writing takes a small part of the time: one as it begins, and others spread over it
            share = (number - 1) * chance.uniform(0.5, 1) / (RANDOM_KILLS - 2)
            run_tool(checkpoint, out, widths, after_begin=share * (ended - began))
        assert not out.exists() or hashes(out) == expected
        assert hashes(checkpoint) == before
        if out.exists():  # it was too late to disturb
            shutil.rmtree(out)
        else:
            hits += (tmp_path / "out.incomplete").exists()
        checkpoint_files.run(checkpoint, out, widths)
        assert hashes(out) == expected
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "saved", "undisturbed"]
        shutil.rmtree(out)
    assert hits


def run_tool(
    checkpoint: Path,
    out: Path,
    widths: Mapping[str, int],
    *,
    after_start: float = math.inf,
    after_begin: float = math.inf,
) -> tuple[float, float]:
    """Run the tool; when it began to write, and when it ended.

    Args:
        after_start, after_begin: kill it so many seconds after its start, or after it began to write.
    """
    command = [sys.executable, str(TOOL), str(checkpoint), str(out), "--workers", "2", "--widths"]
    command += [f"{axis}={width}" for axis, width in widths.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    incomplete = publish.staging(out).parent
    start, now, began = time.monotonic(), 0.0, math.inf
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment) as process:
        while process.poll() is None and now < min(after_start, began + after_begin):
            time.sleep(0.001)
            now = time.monotonic() - start
            if incomplete.exists():
                began = min(began, now)
        process.kill()
        _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors
    return began, now


@dataclass(frozen=True)
class Aftermath:
    """What a kill right before one step of the file system's left behind, and what the next call made of it.

    Attributes:
        step: the step that didn't happen any more.
        failing: whether the call was about to fail, and cleaned up.
        harmless: the output was absent or complete, and the input as before.
        unmarked: it left a directory without the lock that tells whose it is.
        next_call: what the next call raised; empty if it succeeded, with the right result and nothing beside it.
    """

    step: str
    failing: bool
    harmless: bool
    unmarked: bool
    next_call: str


@pytest.fixture(scope="module")
def aftermaths(originals: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Aftermath]:
    directory = tmp_path_factory.mktemp("killed")
    # Forks of a process that has no other threads.
    with ProcessPoolExecutor(1, forking()) as pool:
        return pool.submit(kill_before_each_step, originals["experts"], directory).result()


def kill_before_each_step(checkpoint: Path, directory: Path) -> list[Aftermath]:
    torch.set_num_threads(1)
    out, message = directory / "out", directory / "message"
    incomplete = publish.staging(out).parent
    before = hashes(checkpoint)
    assert forked(partial(call, checkpoint, out), message) == 0, message.read_text()
    expected = hashes(out)
    found = []
    for failing in (False, True):
        for number in itertools.count():
            for path in (out, incomplete):
                shutil.rmtree(path, ignore_errors=True)
            if forked(partial(call, checkpoint, out, message, number, failing), message) != -signal.SIGKILL:
                break
            step = message.read_text()
            harmless = (not out.exists() or hashes(out) == expected) and hashes(checkpoint) == before
            unmarked = incomplete.exists() and not (incomplete / "lock").exists()
            shutil.rmtree(out, ignore_errors=True)
            result = "" if forked(partial(call, checkpoint, out), message) == 0 else message.read_text()
            if not result and (hashes(out) != expected or incomplete.exists()):
                result = "the result is another one"
            found.append(Aftermath(step, failing, harmless, unmarked, result))
    return found


def call(
    checkpoint: Path, out: Path, message: Path | None = None, steps: int | None = None, failing: bool = False
) -> None:
    """Expand.

    Args:
        message: where the step goes that was too much.
        steps: die rather than take more of them that change something at ``out``; None to live.
        failing: fail before the output is published, and count the steps from there on.
    """
    counting = not failing

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal steps
        within = bool(args) and str(args[0]).startswith(str(out))
        if counting and (event in ("os.remove", "os.rmdir") or (within and event in ("open", "os.mkdir", "os.rename"))):
            assert message is not None
            assert steps is not None
            if steps == 0:
                message.write_text(f"{event} {args[0]}")
                os.kill(os.getpid(), signal.SIGKILL)
            steps -= 1

    def fail(expansion: expand.Expansion, root: Path) -> None:
        nonlocal counting
        counting = True
        raise CheckpointError("it fails")

    if failing:
        expand._finish = fail
    if steps is not None:
        sys.addaudithook(hook)
    checkpoint_files.run(checkpoint, out, world_size=1, expert_parallel=1)


def forked(job: Callable[[], None], message: Path) -> int:
    """Run ``job`` in a fork; its exit code. What it raises goes to ``message``."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            job()
            code = 0
        except BaseException as error:
            message.write_text(f"{type(error).__name__}: {error}")
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_killed_before_any_step_the_output_is_absent_or_complete(aftermaths: list[Aftermath]) -> None:
    steps = [aftermath.step.split()[0] for aftermath in aftermaths if not aftermath.failing]
    assert {"os.mkdir", "open", "os.rename", "os.remove", "os.rmdir"} <= set(steps)
    assert any(aftermath.failing for aftermath in aftermaths)
    assert not [aftermath for aftermath in aftermaths if not aftermath.harmless]


def test_the_call_after_a_kill_succeeds_where_the_lock_is_left(aftermaths: list[Aftermath]) -> None:
    assert not [aftermath for aftermath in aftermaths if aftermath.next_call and not aftermath.unmarked]


def test_the_call_after_a_kill_succeeds_wherever_it_came(aftermaths: list[Aftermath]) -> None:
    assert not [aftermath for aftermath in aftermaths if aftermath.next_call]
