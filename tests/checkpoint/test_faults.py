"""Kills, full disks, damaged files and malice: the input stays as it is, and no half-made output appears."""

from __future__ import annotations

import argparse
import errno
import fcntl
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint_files
import tiny
from benchmarks.synthetic_checkpoint import config_of, write_checkpoint
from distributed import Workers
from ds_sparkling.checkpoint import expand, pickles, publish
from ds_sparkling.checkpoint.expand import prepare
from ds_sparkling.checkpoint.opening import open_checkpoint
from ds_sparkling.checkpoint.request import Request
from ds_sparkling.checkpoint.team import Team
from ds_sparkling.errors import CheckpointError, ConfigError, PlanError, SparklingError, UnsupportedError
from tiny import Case

TOOL = Path(__file__).parents[2] / "tools/expand_zero_ckpt.py"
WIDE = {"hidden_size": 12, "moe_intermediate_size": 10}
FACTORY = "olmoe_factory:build_tied"
TAG = "global_step2"
CASES = {
    "experts": Case(2, 3, 2),
    "dense": Case(2, 3, frozen=True),
    "stage2": Case(2, 2, 2, bf16=True),
}
OPTIMIZER_0, OPTIMIZER_1 = (f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1))
MODEL_0, MODEL_1 = (f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in (0, 1))
MODEL, EXPERT = "mp_rank_00_model_states.pt", "layer_0_expert_3_mp_rank_00_model_states.pt"
RANDOM_KILLS = 6

Change = Callable[[Path], object]


def readable(value: Any) -> str | None:
    """A test's id from a parameter."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {content}" for key, content in value.items())
    if callable(value) and not isinstance(value, type):
        return str(value.__qualname__).split(".")[0].strip("<>")
    return None


def train_and_save(case: Case, directory: str) -> None:
    engine = tiny.initialize(case)
    for step in (1, 2):
        tiny.train(engine, step)
        engine.save_checkpoint(directory, client_state={"seen": 17})


@pytest.fixture(scope="module")
def originals(workers: Callable[[int], Workers], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of two steps, which tests copy before they damage them."""
    directory = tmp_path_factory.mktemp("saved")
    for kind, case in CASES.items():
        workers(case.ranks).run(train_and_save, case, str(directory / kind))
    return {kind: directory / kind for kind in CASES}


@pytest.fixture
def saved(originals: Mapping[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def copied(kind: str) -> Path:
        shutil.copytree(originals[kind], tmp_path / "saved")
        return tmp_path / "saved"

    return copied


def hashes(directory: Path) -> dict[str, str]:
    """What lies under ``directory``: links and folders by kind, files by content."""
    found = {}
    for path in directory.rglob("*"):
        kind = "link" if path.is_symlink() else "folder"
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else kind
        found[str(path.relative_to(directory))] = content
    return found


def refused(
    checkpoint: Path,
    *words: str,
    error: type[SparklingError] = CheckpointError,
    out: Path | None = None,
    **options: Any,
) -> None:
    """Assert that a call is refused with these words while it only looks, and that nothing is there or changed then."""
    out = checkpoint.parent / "out" if out is None else out
    before = hashes(checkpoint.parent)
    request = Request(checkpoint, out, **{"widths": WIDE, "config": FACTORY, "workers": 2, **options})
    with Team() as team, pytest.raises(error) as caught:
        prepare(request, team)
    assert all(word in str(caught.value) for word in words), caught.value
    assert hashes(checkpoint.parent) == before


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change what a file of DeepSpeed's holds."""
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def optimizer_file(rank: int) -> str:
    return (OPTIMIZER_0, OPTIMIZER_1)[rank]


def base_of(content: Mapping[str, Any]) -> Any:
    optimizer = content["optimizer_state_dict"]
    return optimizer["optimizer_state_dict" if "optimizer_state_dict" in optimizer else "base_optimizer_state"]


def out_of_space(*_: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# -- kills ------------------------------------------------------------------------------------------------------------


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
        else:  # writing takes a small part of the time: spread the others over it
            share = (number - chance.random()) / (RANDOM_KILLS - 1)
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
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
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


# -- disks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [0, 1, 7, 20])
@pytest.mark.parametrize("format", ["zero", "universal"])
def test_a_write_that_fails_names_the_file_and_leaves_nothing(
    format: str, calls: int, saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = saved("stage2")
    before = hashes(checkpoint.parent)
    write, left = os.pwrite, itertools.count(calls, -1)
    monkeypatch.setattr(os, "pwrite", lambda *args: write(*args) if next(left) > 0 else out_of_space())
    with pytest.raises(CheckpointError, match=r"can't write .*out.*\.pt: No space left on device"):
        checkpoint_files.run(checkpoint, checkpoint.parent / "out", WIDE, config=FACTORY, format=format)
    assert hashes(checkpoint.parent) == before


def test_a_file_is_closed_when_nobody_writes_to_it_any_more(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = saved("experts")
    pwrite, arrivals, meeting = os.pwrite, itertools.count(), threading.Barrier(2, timeout=20)
    closed: list[int] = []

    def write(descriptor: int, data: memoryview, position: int) -> int:
        """The first of two workers fails; the second one takes its time."""
        if threading.current_thread() is not threading.main_thread():
            if next(arrivals) >= 2 or meeting.wait() == 0:
                out_of_space()
            time.sleep(0.3)
            try:
                os.fstat(descriptor)
            except OSError:
                closed.append(descriptor)
        return pwrite(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", write)
    with pytest.raises(CheckpointError):
        checkpoint_files.run(checkpoint, tmp_path / "out")
    assert not closed


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (OPTIMIZER_1, f"out.*{OPTIMIZER_1}"),
        (MODEL_0, f"out.*{MODEL_0}"),
        ("latest", "out"),
        (TAG, "out"),
        ("data", "out"),
    ],
)
def test_what_cant_be_brought_to_the_disk_is_named(
    name: str, words: str, saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = saved("experts")
    before = hashes(checkpoint.parent)
    sync = os.fsync

    def fails(descriptor: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).name == name:
            out_of_space()
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fails)
    try:
        with pytest.raises(CheckpointError, match=f"{words}.*No space left on device"):
            checkpoint_files.run(checkpoint, checkpoint.parent / "out", WIDE, config=FACTORY)
    finally:
        assert hashes(checkpoint.parent) == before


@pytest.mark.parametrize("target", ["shutil.copy2", "ds_sparkling.spec.record.GrowthRecord.write"])
def test_small_files_that_cant_be_written_are_named(
    target: str, saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = saved("experts")
    before = hashes(checkpoint.parent)
    monkeypatch.setattr(target, out_of_space)
    try:
        with pytest.raises(CheckpointError, match=r"out.*No space left on device"):
            checkpoint_files.run(checkpoint, checkpoint.parent / "out", WIDE, config=FACTORY)
    finally:
        assert hashes(checkpoint.parent) == before


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system in memory."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        path = tmp_path / f"disk{len(mounted)}"
        path.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"can't mount a tmpfs: {done.stderr.strip()}")
        mounted.append(path)
        return path

    if shutil.which("mount") is None:
        pytest.skip("no mount")
    yield mount
    for path in mounted:
        subprocess.run(["umount", path], check=True)


def test_a_full_disk_is_named_and_left_empty(
    disk: Callable[[str], Path], saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = saved("stage2")
    before = hashes(checkpoint)
    checkpoint_files.run(checkpoint, tmp_path / "out", WIDE, config=FACTORY)
    tensors = sum(path.stat().st_size for path in (tmp_path / "out" / TAG).glob("*.pt"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=10**12))
    for part in range(6):
        full = disk(f"size={max(tensors * part // 6, 4096)}")
        with pytest.raises(CheckpointError, match=rf"can't write {full}/out.*\.pt: No space left on device"):
            checkpoint_files.run(checkpoint, full / "out", WIDE, config=FACTORY)
        assert not list(full.iterdir())
    large = disk("size=10m")
    checkpoint_files.run(checkpoint, large / "out", WIDE, config=FACTORY)
    assert hashes(large / "out") == hashes(tmp_path / "out")
    assert hashes(checkpoint) == before


def test_a_disk_that_cant_be_written_is_named(disk: Callable[[str], Path], saved: Callable[[str], Path]) -> None:
    with pytest.raises(CheckpointError, match=r"out.*Read-only file system"):
        checkpoint_files.run(saved("experts"), disk("ro") / "out", WIDE, config=FACTORY)


def test_too_little_space_is_noticed_before_anything_is_written(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = saved("experts")
    before = hashes(checkpoint.parent)
    monkeypatch.setattr(expand, "published", lambda _: pytest.fail("it has begun to write"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=12_345))
    with pytest.raises(CheckpointError, match=r"out needs \d+\.\d\d kB, but only 12\.35 kB are free there"):
        checkpoint_files.run(checkpoint, checkpoint.parent / "out", WIDE, config=FACTORY)
    assert hashes(checkpoint.parent) == before


# -- files ------------------------------------------------------------------------------------------------------------


def copy(source: str, target: str) -> Change:
    return lambda path: shutil.copy(path / source, path / target)


def from_other_step(*names: str) -> Change:
    return lambda path: [shutil.copy(path.parent / "global_step1" / name, path / name) for name in names]


def changed(change: Callable[[Any], object], *names: str) -> Change:
    def change_all(path: Path) -> None:
        for name in names:
            edit(path / name, change)

    return change_all


def replaced(name: str, content: Any) -> Change:
    return lambda path: torch.save(content, path / name)


def cut(name: str, size: Callable[[int], int]) -> Change:
    return lambda path: os.truncate(path / name, size((path / name).stat().st_size))


def garbage(name: str) -> Change:
    return lambda path: (path / name).write_bytes(random.Random(0).randbytes(9000))


def patched(name: str, old: bytes, new: bytes) -> Change:
    def patch(path: Path) -> None:
        content = (path / name).read_bytes()
        assert old in content
        (path / name).write_bytes(content.replace(old, new, 1))

    return patch


def flipped(name: str, position: Callable[[bytes], int], bit: int = 0x10) -> Change:
    def flip(path: Path) -> None:
        content = bytearray((path / name).read_bytes())
        content[position(bytes(content))] ^= bit
        (path / name).write_bytes(content)

    return flip


def flipped_tensor(name: str) -> Change:
    """A byte in the middle of the largest tensor's data."""

    def flip(path: Path) -> None:
        with zipfile.ZipFile(path / name) as archive:
            largest = max((e for e in archive.infolist() if "/data/" in e.filename), key=lambda e: e.file_size)
            data = archive.read(largest)
        flipped(name, lambda content: content.index(data) + len(data) // 2)(path)

    return flip


def larger_shape(model: Any) -> None:
    name, shape = next(iter(model["param_shapes"][0].items()))
    model["param_shapes"][0][name] = torch.Size((shape[0] + 1, *shape[1:]))


def shorter_norm(model: Any) -> None:
    model["module"]["norm.weight"] = model["module"]["norm.weight"][:-1].clone()


def one_list_less(model: Any) -> None:
    model["param_shapes"].pop()


def swapped_shapes(model: Any) -> None:
    model["param_shapes"][0] = OrderedDict(reversed(model["param_shapes"][0].items()))


def of_version(version: str) -> Callable[[Any], object]:
    return lambda content: content.update(ds_version=version)


@pytest.mark.parametrize(
    ("kind", "damage", "words"),
    [
        ("experts", lambda path: (path / OPTIMIZER_1).unlink(), (OPTIMIZER_1, "missing", "2 ranks")),
        ("experts", lambda path: (path / OPTIMIZER_0).unlink(), (OPTIMIZER_0, "missing")),
        ("experts", lambda path: (path / MODEL_1).unlink(), (MODEL_1, "missing")),
        ("experts", lambda path: (path / MODEL_0).unlink(), (MODEL_0, "missing")),
        ("stage2", lambda path: (path / f"bf16_{OPTIMIZER_1}").unlink(), (OPTIMIZER_1, "missing")),
        ("stage2", lambda path: (path / MODEL).unlink(), (MODEL, "missing")),
        ("stage2", lambda path: (path / EXPERT).unlink(), (EXPERT, "missing")),
        ("experts", lambda path: [file.unlink() for file in path.glob("*.pt")], (TAG, "no checkpoint files")),
        ("experts", copy(OPTIMIZER_1, "zero_pp_rank_2_mp_rank_00_optim_states.pt"), ("zero_pp_rank_2", "too many")),
        ("experts", copy(MODEL_1, "zero_pp_rank_2_mp_rank_00_model_states.pt"), ("zero_pp_rank_2", "too many")),
        ("stage2", copy(EXPERT, "layer_0_expert_12_mp_rank_00_model_states.pt"), ("expert_12", "too many")),
        ("experts", copy(OPTIMIZER_1, f"bf16_{OPTIMIZER_1}"), (TAG, "of bf16 and of other runs")),
        ("experts", cut(OPTIMIZER_1, lambda size: size // 2), (OPTIMIZER_1, "truncated")),
        ("experts", cut(OPTIMIZER_1, lambda size: size - 1), (OPTIMIZER_1, "truncated")),
        ("experts", cut(OPTIMIZER_0, lambda size: 0), (OPTIMIZER_0, "truncated")),
        ("stage2", cut(MODEL, lambda size: size - 100), (MODEL, "truncated")),
        ("stage2", cut(EXPERT, lambda size: size // 3), (EXPERT, "truncated")),
        ("experts", garbage(OPTIMIZER_1), (OPTIMIZER_1, "damaged")),
        ("experts", garbage(MODEL_0), (MODEL_0, "damaged")),
        ("stage2", garbage(EXPERT), (EXPERT, "damaged")),
        ("experts", patched(OPTIMIZER_1, b"\x80\x02}", b"\xff\xff\xff"), (OPTIMIZER_1, "damaged")),
        ("experts", patched(MODEL_0, b"\x80\x02}", b"\x80\x02."), (MODEL_0, "damaged")),
        ("experts", replaced(OPTIMIZER_1, {}), ("optimizer_state_dict",)),
        ("experts", from_other_step(OPTIMIZER_1), (OPTIMIZER_1, "another run or step")),
        ("experts", from_other_step(OPTIMIZER_0), (OPTIMIZER_1, "another run or step than rank 0's")),
        ("experts", from_other_step(MODEL_1), (MODEL_1, "another run or step", "global_steps is 1, there 2")),
        ("experts", from_other_step(MODEL_0), (MODEL_1, "another run or step", "global_steps is 2, there 1")),
        ("stage2", from_other_step(f"bf16_{OPTIMIZER_1}"), (OPTIMIZER_1, "another run or step")),
        ("experts", copy(OPTIMIZER_0, OPTIMIZER_1), (OPTIMIZER_1, "another rank")),
        ("experts", copy(OPTIMIZER_1, OPTIMIZER_0), (OPTIMIZER_0, "another rank")),
        ("stage2", changed(larger_shape, MODEL), (OPTIMIZER_0, "has 214 elements", "metadata it is 218")),
        ("stage2", changed(shorter_norm, MODEL), (MODEL, "norm.weight is (5,)", "metadata it is (6,)")),
        ("experts", changed(larger_shape, MODEL_0, MODEL_1), (OPTIMIZER_0, "has 214 elements", "metadata it is 217")),
        ("experts", changed(larger_shape, MODEL_1), (MODEL_1, "param_shapes")),
        ("experts", changed(one_list_less, MODEL_0), (MODEL_0, "1 lists of param_shapes for 2 flat tensors")),
        ("experts", changed(swapped_shapes, MODEL_1), (MODEL_1, "param_shapes")),
        ("stage2", changed(lambda c: c.pop(next(iter(c))), EXPERT), (EXPERT, "layers.0.mlp.experts.w1.3 is missing")),
        ("experts", lambda path: (path / "ds_sparkling.json").write_text("{"), ("ds_sparkling.json", "can't be read")),
    ],
    ids=readable,
)
def test_damaged_files_are_named(
    kind: str, damage: Change, words: tuple[str, ...], saved: Callable[[str], Path]
) -> None:
    checkpoint = saved(kind)
    damage(checkpoint / TAG)
    refused(checkpoint, str(checkpoint / TAG), *words)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("experts", OPTIMIZER_0),
        ("experts", OPTIMIZER_1),
        ("stage2", f"bf16_{OPTIMIZER_0}"),
        ("stage2", MODEL),
        ("stage2", EXPERT),
        ("dense", MODEL_1),
    ],
)
def test_a_flipped_byte_of_a_tensor_is_found(kind: str, name: str, saved: Callable[[str], Path]) -> None:
    checkpoint = saved(kind)
    flipped_tensor(name)(checkpoint / TAG)
    refused(checkpoint, str(checkpoint / TAG / name), "is damaged", "checksum", verify=True)


@pytest.mark.parametrize("name", [OPTIMIZER_1, MODEL_0])
def test_no_flipped_byte_changes_the_result_unnoticed(name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = saved("dense")
    checkpoint_files.run(checkpoint, tmp_path / "good")
    good, path = hashes(tmp_path / "good"), checkpoint / TAG / name
    content = path.read_bytes()
    noticed = 0
    for position in range(0, len(content), len(content) // 40):
        flipped(name, lambda _, at=position: at)(path.parent)  # type: ignore[misc]
        try:
            checkpoint_files.run(checkpoint, tmp_path / "out", verify=True)
        except Exception:
            noticed += 1
            assert not (tmp_path / "out").exists()
        else:
            assert hashes(tmp_path / "out") == good
            shutil.rmtree(tmp_path / "out")
        path.write_bytes(content)
    assert noticed > 10


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(flipped(OPTIMIZER_1, lambda c: c.index(b"PK\x03\x04") + 32, 0x80), id="a part's name"),
        pytest.param(flipped(OPTIMIZER_0, lambda c: c.index(b"optimizer_state_dict")), id="a key in the pickle"),
    ],
)
def test_a_flipped_byte_anywhere_is_named(damage: Change, saved: Callable[[str], Path]) -> None:
    checkpoint = saved("dense")
    damage(checkpoint / TAG)
    refused(checkpoint, str(checkpoint / TAG), "damaged", verify=True)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (replaced(OPTIMIZER_0, {}), (OPTIMIZER_0,)),
        (replaced(OPTIMIZER_0, ["nothing"]), (OPTIMIZER_0,)),
        (replaced(MODEL_0, ["nothing"]), (MODEL_0,)),
        (changed(lambda model: model.pop("dp_world_size"), MODEL_0), (MODEL_0, "dp_world_size")),
        (changed(lambda model: model.update(dp_world_size=0), MODEL_0), (MODEL_0, "dp_world_size")),
        (changed(lambda model: model.update(dp_world_size="2"), MODEL_0), (MODEL_0, "dp_world_size")),
        (changed(lambda model: model.update(module=None), MODEL_0), (MODEL_0, "module")),
    ],
    ids=readable,
)
def test_rank_0s_metadata_is_looked_at(damage: Change, words: tuple[str, ...], saved: Callable[[str], Path]) -> None:
    checkpoint = saved("experts")
    damage(checkpoint / TAG)
    refused(checkpoint, str(checkpoint / TAG), *words)


def without(key: str) -> Callable[[Any], object]:
    return lambda content: [state.pop(key) for state in base_of(content)["state"].values()]


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_keep_different_states_are_refused(rank: int, saved: Callable[[str], Path]) -> None:
    checkpoint = saved("experts")
    edit(checkpoint / TAG / optimizer_file(rank), without("exp_avg_sq"))
    refused(checkpoint, OPTIMIZER_1, "exp_avg_sq")


def test_a_file_of_a_rank_with_the_same_experts_is_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint_files.run(saved("experts"), tmp_path / "four", world_size=4)
    name = "zero_pp_rank_2_mp_rank_00_optim_states.pt"
    copy(OPTIMIZER_0, name)(tmp_path / "four" / TAG)
    refused(tmp_path / "four", name, "another rank")


@pytest.mark.parametrize("pair", [(0, 1), (1, 0)])
def test_a_file_of_another_rank_is_refused_under_stage_2(pair: tuple[int, int], saved: Callable[[str], Path]) -> None:
    checkpoint = saved("stage2")
    copy(f"bf16_{optimizer_file(pair[0])}", f"bf16_{optimizer_file(pair[1])}")(checkpoint / TAG)
    refused(checkpoint, optimizer_file(pair[1]), "another rank")


def test_the_same_file_for_two_ranks_is_refused(saved: Callable[[str], Path]) -> None:
    checkpoint = saved("dense")
    copy(OPTIMIZER_0, OPTIMIZER_1)(checkpoint / TAG)
    refused(checkpoint, OPTIMIZER_1, "another rank")


@pytest.mark.parametrize("names", [(MODEL_0, MODEL_1), (MODEL_1, MODEL_0)])
def test_model_states_of_another_rank_are_refused(names: tuple[str, str], saved: Callable[[str], Path]) -> None:
    checkpoint = saved("experts")
    copy(*names)(checkpoint / TAG)
    refused(checkpoint, names[1], "another rank", widths={})


def test_model_states_of_another_step_are_refused_under_stage_2(saved: Callable[[str], Path]) -> None:
    checkpoint = saved("stage2")
    edit(checkpoint / TAG / MODEL, lambda model: model["module"]["norm.weight"].add_(0.5))
    refused(checkpoint, MODEL, "norm.weight isn't the rounded master weight", "another step")


@pytest.mark.parametrize(("kind", "name"), [("experts", MODEL_0), ("stage2", MODEL)])
def test_files_of_another_deepspeed_are_refused(kind: str, name: str, saved: Callable[[str], Path]) -> None:
    checkpoint = saved(kind)
    edit(checkpoint / TAG / name, of_version("0.17.0"))
    words = str(checkpoint / TAG / name), "DeepSpeed 0.17.0", "known: 0.19.8"
    refused(checkpoint, *words, error=UnsupportedError)


@pytest.mark.parametrize(("name", "error"), [(MODEL_1, UnsupportedError), (OPTIMIZER_1, CheckpointError)])
def test_a_file_of_another_deepspeed_among_others_is_named(
    name: str, error: type[SparklingError], saved: Callable[[str], Path]
) -> None:
    checkpoint = saved("experts")
    edit(checkpoint / TAG / name, of_version("0.20.0"))
    refused(checkpoint, str(checkpoint / TAG / name), "0.20.0", error=error)


def made_in(name: str) -> Change:
    return lambda path: (path / name).write_bytes(b"")


def without_module(content: Any) -> None:
    content.update(module=None, ds_config={"zero_optimization": {"stage": 1}})


def native_experts(content: Any) -> None:
    content.update(num_experts=[2], ds_autoep_layers=None)


def both(*changes: Change) -> Change:
    """One change after the other."""

    def change(path: Path) -> None:
        for each in changes:
            each(path)

    return change


def put(*keys: str, value: Any) -> Callable[[Any], None]:
    """Sets ``content[key][key]...``"""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content.setdefault(key, {})
        content[keys[-1]] = value

    return change


def moved(first: str, second: str) -> Change:
    return lambda path: (path / first).rename(path / second)


def removed(*names: str) -> Change:
    def change(path: Path) -> None:
        for name in names:
            (path / name).unlink()

    return change


#: What tells such runs' checkpoints from others, as DeepSpeed 0.19.8 writes them.
DEGREES = "checkpoint_parallel_dimensions"
PIPELINE, TENSOR, SEQUENCE = (
    "pipeline parallelism",
    r"tensor or model parallelism \(AutoTP, tp_model_init",
    "sequence parallelism",
)
SPLIT: dict[str, tuple[str, Change, str]] = {
    "pipeline of one stage": ("stage2", made_in("layer_00-model_states.pt"), PIPELINE),
    "pipeline": ("stage2", both(made_in("layer_00-model_states.pt"), made_in("mp_rank_01_model_states.pt")), PIPELINE),
    "pipeline's degree": ("stage2", lambda path: edit(path / MODEL, put(DEGREES, "pp_degree", value=2)), PIPELINE),
    "no module": ("stage2", lambda path: edit(path / MODEL, without_module), PIPELINE),
    "tensor": ("stage2", copy(MODEL, "mp_rank_01_model_states.pt"), TENSOR),
    "tensor under stage 3": ("dense", moved(MODEL_1, "zero_pp_rank_0_mp_rank_01_model_states.pt"), TENSOR),
    "AutoTP": (
        "stage2",
        lambda path: edit(path / MODEL, put("ds_config", "tensor_parallel", "autotp_size", value=2)),
        TENSOR,
    ),
    "tp_model_init": (
        "stage2",
        lambda path: edit(path / MODEL, put("ds_config", "tensor_parallel", "tp", "tp_size", value=2)),
        TENSOR,
    ),
    "sequence": (
        "stage2",
        lambda path: edit(path / MODEL, put("ds_config", "sequence_parallel_size", value=2)),
        SEQUENCE,
    ),
    "sequence by mpu": ("dense", lambda path: edit(path / MODEL_0, put(DEGREES, "tp_degree", value=2)), SEQUENCE),
    "sequence by mesh_param": (
        "dense",
        both(removed(MODEL_1, OPTIMIZER_1), lambda path: edit(path / MODEL_0, put("dp_world_size", value=1))),
        SEQUENCE,
    ),
    "native experts": ("stage2", lambda path: edit(path / MODEL, native_experts), "native DeepSpeed MoE layers"),
}


@pytest.mark.parametrize("kind", SPLIT)
def test_runs_that_are_split_otherwise_are_refused_by_what_they_are(kind: str, saved: Callable[[str], Path]) -> None:
    case, change, words = SPLIT[kind]
    checkpoint = saved(case)
    change(checkpoint / TAG)
    with Team() as team, pytest.raises(UnsupportedError, match=f"{TAG}.*: checkpoints with {words}.* aren't supported"):
        prepare(Request(checkpoint, checkpoint.parent / "out"), team)


# -- what is asked for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words", "error"),
    [
        ({"tag": "../saved/global_step2"}, ("tag '../saved/global_step2'", "name of a directory"), CheckpointError),
        ({"tag": ".."}, ("tag '..'", "name of a directory"), CheckpointError),
        ({"tag": "global_step2/"}, ("tag 'global_step2/'", "name of a directory"), CheckpointError),
        ({"tag": "/"}, ("tag '/'", "name of a directory"), CheckpointError),
        ({"tag": ""}, ("tag ''", "name of a directory"), CheckpointError),
        ({"tag": "global_step3"}, ("saved/global_step3", "doesn't exist"), CheckpointError),
        ({"world_size": 3}, ("3 ranks", "expert-parallel groups of 2"), CheckpointError),
        ({"world_size": 4, "expert_parallel": 3}, ("4 ranks", "expert-parallel groups of 3"), CheckpointError),
        ({"world_size": 0}, ("--world-size", "at least 1"), CheckpointError),
        ({"world_size": 5, "expert_parallel": 5}, ("layers.0.mlp has 12 experts", "5 ranks"), CheckpointError),
        ({"widths": {"hidden": 8}}, ("'hidden'",), PlanError),
        ({"widths": {"hidden": 8}, "config": None}, (TAG, "hidden", "--config"), PlanError),
        ({"widths": {"hidden_size": 5}}, ("hidden_size", "6 -> 5 shrinks"), PlanError),
        ({"widths": {"hidden_size": 6}}, ("hidden_size", "6 -> 6 changes nothing"), PlanError),
        ({"format": "gguf"}, ("'gguf'", "zero, universal, hf"), CheckpointError),
        ({"deepspeed_config": Path("nowhere.json")}, ("nowhere.json", "doesn't exist"), ConfigError),
    ],
    ids=readable,
)
def test_what_cant_be_done_is_named(
    options: dict[str, Any], words: tuple[str, ...], error: type[SparklingError], saved: Callable[[str], Path]
) -> None:
    refused(saved("experts"), *words, error=error, **options)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"../saved/global_step2", ("isn't the name of a directory",)),
        (b"global_step3", ("global_step3", "doesn't exist")),
        (b"", ("isn't the name of a directory",)),
        (b"\xff\xfe\x00", ("latest",)),
        (b"x" * 5000, ("latest",)),
    ],
    ids=["leads out", "nowhere", "empty", "no text", "too long"],
)
def test_a_wrong_latest_is_named(content: bytes, words: tuple[str, ...], saved: Callable[[str], Path]) -> None:
    checkpoint = saved("experts")
    (checkpoint / "latest").write_bytes(content)
    refused(checkpoint, *words)


@pytest.mark.parametrize("format", ["zero", "universal"])
def test_the_directory_of_a_tag_is_understood(
    format: str, saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself, as it is after a download of one step, from within it, and with its own tag."""
    checkpoint = saved("experts")
    checkpoint_files.run(checkpoint, tmp_path / "whole", format=format)
    (tmp_path / "whole" / ("latest" if format == "zero" else "latest_universal")).unlink()
    monkeypatch.chdir(tmp_path / "whole" / TAG)
    for number, (path, tag) in enumerate([(tmp_path / "whole" / TAG, None), (Path(), None), (Path(), TAG)]):
        out = tmp_path / f"out{number}"
        checkpoint_files.run(path, out, WIDE, config=FACTORY, tag=tag)
        assert (out / "latest").read_text() == TAG
    refused(tmp_path / "whole" / TAG, TAG, "is itself a checkpoint", "'global_step3'", tag="global_step3")


@pytest.mark.parametrize("name", [OPTIMIZER_1, MODEL_0])
@pytest.mark.parametrize("verify", [False, True])
def test_a_file_that_cant_be_read_isnt_called_damaged(
    name: str, verify: bool, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    """Permissions don't bind the superuser, who runs tests in containers, but a folder can't be read by anybody."""
    checkpoint = saved("experts")
    (checkpoint / TAG / name).unlink()
    (checkpoint / TAG / name).mkdir()
    with pytest.raises(CheckpointError) as caught:
        checkpoint_files.run(checkpoint, tmp_path / "out", verify=verify)
    assert f"{checkpoint / TAG / name} can't be read: Is a directory" in str(caught.value)
    assert "damaged" not in str(caught.value)


def test_a_directory_that_cant_be_read_is_named(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, listed = saved("experts"), Path.iterdir

    def denied(path: Path) -> Iterator[Path]:
        if path == checkpoint / TAG:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(CheckpointError, match=f"{TAG} can't be read: Permission denied"):
        checkpoint_files.run(checkpoint, tmp_path / "out")


def test_experts_of_another_parallel_size_need_experts(saved: Callable[[str], Path]) -> None:
    refused(saved("dense"), "no experts that AutoEP has split", expert_parallel=2)


def made(*names: str) -> Change:
    """Makes files, and folders where a name ends in a slash."""

    def make(directory: Path) -> None:
        for name in names:
            path = directory / name
            (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
            if not name.endswith("/"):
                path.write_text("precious")

    return make


@pytest.mark.parametrize(
    ("obstacle", "out", "words"),
    [
        (made("out/mine"), "out", ("out", "exists and isn't an empty directory")),
        (made("out"), "out", ("out", "exists and isn't an empty directory")),
        (lambda path: (path / "out").symlink_to("nowhere"), "out", ("out", "exists and isn't an empty directory")),
        (made(), "saved", ("saved", "exists and isn't an empty directory")),
        (made(), f"saved/{TAG}/out", ("out", "lies in the checkpoint", TAG)),
        (made("folder/"), f"folder/../saved/{TAG}/out", ("out", "lies in the checkpoint", TAG)),
        (lambda path: (path / "link").symlink_to(f"saved/{TAG}"), "link/out", ("out", "lies in the checkpoint", TAG)),
        (made(), "no/out", ("no isn't a directory",)),
        (made("file"), "file/out", ("file isn't a directory",)),
        (made("out.incomplete/data/mine"), "out", ("out.incomplete", "in the way")),
        (made("out.incomplete"), "out", ("out.incomplete", "in the way")),
    ],
    ids=readable,
)
def test_an_output_in_the_way_is_left_alone(
    obstacle: Change, out: str, words: tuple[str, ...], saved: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = saved("experts")
    obstacle(tmp_path)
    refused(checkpoint, *words, out=tmp_path / out)


LONG = ["o" * 244, "o" * 246, "o" * 255, "ö" * 122 + "o", "ö" * 127]


@pytest.mark.parametrize("name", LONG, ids=lambda name: f"{len(os.fsencode(name))} bytes")
def test_an_output_may_have_the_longest_name(name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint_files.run(saved("experts"), tmp_path / name, verify=True)
    assert {path.name for path in tmp_path.iterdir()} == {"saved", name}
    # Another long name has another place for what isn't finished.
    assert publish.staging(tmp_path / name) != publish.staging(tmp_path / f"{name[:-1]}p")


@pytest.mark.parametrize("out", ["o" * 256, "ö" * 128, f"{'o' * 256}/out"], ids=["ascii", "utf-8", "on the way"])
def test_an_output_whose_name_is_too_long_is_refused_at_once(
    out: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    refused(saved("experts"), "o" * 256 if "/" in out else "its name has 256 bytes, of 255 at most", out=tmp_path / out)


@pytest.mark.parametrize("obstacle", ["out.incomplete/mine", "out.incomplete/data/mine", "out.incomplete"])
def test_an_empty_output_doesnt_give_others_files_away(
    obstacle: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = saved("experts")
    made("out/", obstacle)(tmp_path)
    with pytest.raises(CheckpointError, match="in the way"):
        checkpoint_files.run(checkpoint, tmp_path / "out")
    assert (tmp_path / obstacle).read_text() == "precious"


def test_an_empty_output_is_taken(saved: Callable[[str], Path], tmp_path: Path) -> None:
    made("out/")(tmp_path)
    checkpoint_files.run(saved("experts"), tmp_path / "out")
    assert (tmp_path / "out/latest").read_text() == TAG


def test_a_link_to_an_empty_directory_is_refused_or_filled(saved: Callable[[str], Path], tmp_path: Path) -> None:
    made("real/")(tmp_path)
    (tmp_path / "out").symlink_to("real")
    try:
        checkpoint_files.run(saved("experts"), tmp_path / "out")
    except CheckpointError as error:
        assert "out" in str(error)  # noqa: PT017
    else:
        assert (tmp_path / "out/latest").read_text() == TAG


def test_the_current_directory_is_filled(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made("here/")(tmp_path)
    monkeypatch.chdir(tmp_path / "here")
    checkpoint_files.run(saved("experts"), Path("."))
    assert (tmp_path / "here/latest").read_text() == TAG


# -- several calls at once --------------------------------------------------------------------------------------------


def test_what_another_process_is_writing_is_left_alone(saved: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = saved("experts")
    made("out.incomplete/data/theirs")(tmp_path)
    with open(tmp_path / "out.incomplete/lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = hashes(tmp_path)
        with pytest.raises(CheckpointError, match=r"another process is writing .*out .*out\.incomplete/lock"):
            checkpoint_files.run(checkpoint, tmp_path / "out")
        assert hashes(tmp_path) == before
    checkpoint_files.run(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out.incomplete").exists()


def test_of_two_calls_one_is_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint, out = saved("experts"), tmp_path / "out"
    with publish.published(out) as data:
        (data / "theirs").write_text("whole")
        command = [sys.executable, str(TOOL), str(checkpoint), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 1
        assert f"error: another process is writing {out}" in done.stderr
    assert hashes(out) == {"theirs": hashlib.sha256(b"whole").hexdigest()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "saved"]


@pytest.mark.parametrize("third", [False, True])
def test_a_lock_removed_by_its_holder_counts_for_nothing(
    third: bool, saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another call ends between opening the lock and locking it, and a third one may begin then."""
    checkpoint, incomplete = saved("experts"), tmp_path / "out.incomplete"
    flock = fcntl.flock
    calls, thirds = itertools.count(), []

    def late(lock: Any, operation: int) -> None:
        if next(calls) == 0:
            shutil.rmtree(incomplete)
            if third:
                made("out.incomplete/data/theirs")(tmp_path)
                thirds.append(open(incomplete / "lock", "a"))  # noqa: SIM115
                flock(thirds[0], fcntl.LOCK_EX)
        flock(lock, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    try:
        if third:
            with pytest.raises(CheckpointError, match="another process is writing"):
                checkpoint_files.run(checkpoint, tmp_path / "out")
            assert (incomplete / "data/theirs").read_text() == "precious"
        else:
            checkpoint_files.run(checkpoint, tmp_path / "out")
            assert not incomplete.exists()
    finally:
        for lock in thirds:
            lock.close()


# -- malice -----------------------------------------------------------------------------------------------------------


def leave_marker(path: str) -> str:
    Path(path).write_text("ran")
    return path


class Trap:
    """Pickled as a call of :func:`leave_marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return leave_marker, (str(self.marker),)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("experts", MODEL_0), ("experts", MODEL_1), ("experts", OPTIMIZER_0), ("stage2", MODEL), ("stage2", EXPERT)],
)
def test_code_in_a_checkpoint_doesnt_run(kind: str, name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint, marker = saved(kind), tmp_path / "marker"
    edit(checkpoint / TAG / name, lambda content: content.update(client=Trap(marker)))
    words = str(checkpoint / TAG / name), f"{__name__}.leave_marker", "--trust-checkpoint"
    refused(checkpoint, *words)
    refused(checkpoint, *words, verify=True, format="universal", widths={})
    assert not marker.exists()
    pickles.load(checkpoint / TAG / name, trust=True)
    assert marker.read_text() == "ran"


def test_known_names_dont_smuggle_code(saved: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint, marker = saved("experts"), tmp_path / "marker"
    code = f"from pathlib import Path; Path({str(marker)!r}).write_text('ran')"

    class Smuggler:
        def __reduce__(self) -> tuple[Any, ...]:
            return exec, (code,)

    edit(checkpoint / TAG / MODEL_1, lambda content: content.update(client=[{"deep": Smuggler()}]))
    refused(checkpoint, MODEL_1, "builtin", "exec")
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["experts", "stage2"])
def test_unknown_classes_need_trust_and_then_survive(kind: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = saved(kind)
    name = MODEL if kind == "stage2" else MODEL_0
    options = argparse.Namespace(epochs=3, weights=torch.arange(5))
    for path in (checkpoint / TAG).glob("*model_states.pt"):
        if "expert" not in path.name:
            edit(path, lambda content: content.update(options=options))
    refused(checkpoint, str(checkpoint / TAG / name), "argparse.Namespace", "--trust-checkpoint")
    checkpoint_files.run(checkpoint, tmp_path / "out", WIDE, config=FACTORY, trust=True, verify=True)
    found = pickles.load(tmp_path / "out" / TAG / name, trust=True)
    assert found["seen"] == 17
    assert isinstance(found["options"], argparse.Namespace)
    assert found["options"].epochs == 3
    assert torch.equal(found["options"].weights, torch.arange(5))


def renamed(name: str) -> Callable[[Any], object]:
    """Gives the first parameter another name."""

    def rename(model: Any) -> None:
        old = next(iter(model["param_shapes"][0]))
        for mapping in (model["param_shapes"][0], model["module"]):
            items = [(name if key == old else key, value) for key, value in mapping.items()]
            mapping.clear()
            mapping.update(items)

    return rename


@pytest.mark.parametrize("name", ["../evil", "../../../evil", "a/b", "/evil", "..", ".", "a\0b"])
@pytest.mark.parametrize("kind", ["experts", "stage2"])
def test_names_that_lead_out_of_the_output_are_refused(
    kind: str, name: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = saved(kind)
    changed(renamed(name), *((MODEL_0, MODEL_1) if kind == "experts" else (MODEL,)))(checkpoint / TAG)
    before = hashes(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        checkpoint_files.run(checkpoint, tmp_path / "out", format="universal")
    # Under stage 2 the optimizer states name the parameters, too.
    assert kind == "stage2" or f"parameter name {name!r} can't be the name of a directory" in str(caught.value)
    assert hashes(tmp_path) == before


@pytest.mark.parametrize("name", ["../evil", "a/b"])
def test_names_that_lead_out_of_a_universal_checkpoint_are_refused(
    name: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint_files.run(saved("experts"), tmp_path / "universal", format="universal")
    edit(tmp_path / "universal" / TAG / MODEL_0, renamed(name))
    refused(tmp_path / "universal", f"parameter name {name!r}", widths={})


@pytest.mark.parametrize("key", ["../evil", "../../../../../evil", "a/b"])
def test_states_that_lead_out_of_the_output_are_refused(key: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = saved("experts")

    def rename(content: Any) -> None:
        for state in base_of(content)["state"].values():
            state[key] = state.pop("exp_avg")

    changed(rename, OPTIMIZER_0, OPTIMIZER_1)(checkpoint / TAG)
    before = hashes(tmp_path)
    try:
        with pytest.raises(CheckpointError, match=key):
            checkpoint_files.run(checkpoint, tmp_path / "out", format="universal")
    finally:
        assert hashes(tmp_path) == before


# -- numbers ----------------------------------------------------------------------------------------------------------


def poison(checkpoint: Path, rank: int, *values: float) -> str:
    """Put numbers at the beginning of a rank's master weights; whose they are."""
    layout = open_checkpoint(checkpoint / TAG).layout
    segment = next(layout.segments(layout.flats[-1], rank))
    assert segment.stop - segment.start >= len(values)

    def put(content: Any) -> None:
        optimizer = content["optimizer_state_dict"]
        flats = optimizer.get("fp32_flat_groups") or optimizer["single_partition_of_fp32_groups"]
        flats[-1].detach()[segment.offset : segment.offset + len(values)] = torch.tensor(values)

    (path,) = (checkpoint / TAG).glob(f"*{optimizer_file(rank)}")
    edit(path, put)
    return segment.name


@pytest.mark.parametrize(
    "values", [(float("nan"),), (float("inf"),), (float("-inf"),), (float("inf"), float("-inf"))], ids=str
)
@pytest.mark.parametrize(
    ("kind", "widths", "format"),
    [
        ("experts", {}, "zero"),
        ("experts", WIDE, "zero"),
        ("experts", WIDE, "universal"),
        ("stage2", WIDE, "zero"),
        ("dense", WIDE, "zero"),
        ("dense", {}, "hf"),
    ],
    ids=readable,
)
def test_weights_that_arent_finite_are_named(
    kind: str,
    widths: dict[str, int],
    format: str,
    values: tuple[float, ...],
    saved: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    checkpoint = saved(kind)
    (checkpoint / "config.json").write_text(json.dumps({"hidden_size": 6}))
    name = poison(checkpoint, 1, *values)
    options = {"config": FACTORY} if widths else {}
    summary = checkpoint_files.run(checkpoint, tmp_path / "out", widths, format=format, verify=True, **options)
    assert summary["not_finite"] == [name]
    assert f"NaN or Inf in the weights of {name}" in caplog.text


def test_large_weights_are_finite(
    saved: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = saved("experts")
    poison(checkpoint, 1, 3e38, 3e38)
    assert checkpoint_files.run(checkpoint, tmp_path / "out")["not_finite"] == []
    assert "NaN" not in caplog.text
