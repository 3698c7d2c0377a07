"""Damaged files, killed calls and killed jobs in great numbers, with a fixed seed.

The suite runs a few of each (``checkpoint/test_campaign.py``). From the repository's root,
``PYTHONPATH=.:tools:tests python tests/campaign.py damage 1000`` runs many of one, and prints a table; so do
``... kills 200``, ``... growths 50`` and ``... events 300``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import math
import os
import random
import resource
import shutil
import signal
import struct
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import masked_crc32c
from tensorboard.util.tensor_util import make_tensor_proto
from torch import Tensor

import checkpoint_files
import event_files
import tiny
from benchmarks.common import free_port
from benchmarks.synthetic_checkpoint import config_of, write_checkpoint
from damage import hashes
from distributed import forking
from ds_sparkling.checkpoint import pickles, publish
from ds_sparkling.checkpoint.expand import expand, prepare
from ds_sparkling.checkpoint.opening import open_checkpoint
from ds_sparkling.checkpoint.request import Request
from ds_sparkling.checkpoint.team import Team
from ds_sparkling.errors import SparklingError
from ds_sparkling.report.command import main as main_of_report
from ds_sparkling.report.event_records import Unread, records
from ds_sparkling.report.events import ReadRun, read_run, read_runs
from ds_sparkling.report.page import text as page_text
from ds_sparkling.report.verdict import verdict
from hurry import in_a_hurry
from tiny import Case

#: Seconds of the processor and of the clock that a call may take, and bytes of memory.
_SECONDS, _PATIENCE, _MEMORY = 20, 300, 10**9
_HELD = "held"

#: What stands in a number's, a name's or anything else's place.
_HOSTILE: tuple[Any, ...] = (
    *(-1, 0, 3, 10**9, 10**30, True, 1.5, float("nan"), float("inf")),
    *("", "x", "../x", "n" * 5000, "a\0b", None, [], {}, (1, 2)),
)
_DTYPES = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.float64, torch.bfloat16, torch.float16)
_FORMATS = ("zero", "universal")


@dataclass
class Table:
    """What came of a campaign.

    Attributes:
        tried: how many calls.
        failed: what didn't hold: what was done, and what came of it.
        seconds: all of them took.
        memory: bytes that the largest call had, where that is looked at.
        kinds: how many of a kind there were.
    """

    campaign: str
    tried: int = 0
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0
    memory: int = 0
    kinds: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        held, megabytes = self.tried - len(self.failed), self.memory / 1e6
        of_a_kind = "".join(f"\n  {count} {kind}" for kind, count in sorted(self.kinds.items()))
        memory = f", {megabytes:.0f} MB at most" if self.memory else ""
        return f"{self.campaign}: {self.tried} tried, {held} held, {self.seconds:.0f} s{memory}{of_a_kind}"


def forked(job: Callable[[], str], *, killed_after: float | None = None) -> tuple[str, int]:
    """Run ``job`` in a fork; what it returns, or how it ended, and its peak memory in bytes.

    Args:
        killed_after: kill it after so many seconds.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS + 5))
            os.write(writing, job().encode(errors="replace")[:60000])
        except BaseException:
            os.write(writing, traceback.format_exc().encode(errors="replace")[-60000:])
        finally:
            os._exit(0)
    os.close(writing)
    deadline = time.monotonic() + (_PATIENCE if killed_after is None else killed_after)
    while True:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    code = os.waitstatus_to_exitcode(status)
    return said or f"ended with {code}", usage.ru_maxrss * 1024


# -- damage --------------------------------------------------------------------------------------------------------


def damage(checkpoints: Mapping[str, Path], directory: Path, count: int, seed: int) -> Table:
    """Damage copies of checkpoints in ``count`` ways; each must be refused by name at once, or change nothing."""
    table, began = Table("damage"), time.monotonic()
    chance = random.Random(seed)
    copy, out = directory / "damaged", directory / "out"
    expected = {}
    for kind, fmt in itertools.product(checkpoints, _FORMATS):
        checkpoint_files.run(checkpoints[kind], out, format=fmt)
        expected[kind, fmt] = checkpoint_files.logical(open_checkpoint(_tag(out)))
        expected[kind, fmt] = {key: tensor.clone() for key, tensor in expected[kind, fmt].items()}
        shutil.rmtree(out)
    for _ in range(count):
        kind, fmt = chance.choice(sorted(checkpoints)), chance.choice(_FORMATS)
        shutil.copytree(checkpoints[kind], copy)
        done = _damaged(_tag(copy), chance)
        result, memory = forked(partial(_attempt, copy, out, fmt, expected[kind, fmt]))
        if memory > _MEMORY:
            result = f"{memory / 1e6:.0f} MB"
        if result != _HELD:
            table.failed.append(f"{kind} as {fmt}, {done}: {result}")
        table.tried += 1
        table.memory = max(table.memory, memory)
        for left in (copy, out, publish.staging(out).parent):
            shutil.rmtree(left, ignore_errors=True)
    table.seconds = time.monotonic() - began
    return table


def _tag(directory: Path) -> Path:
    return next(path for path in directory.iterdir() if path.is_dir())


def _attempt(checkpoint: Path, out: Path, fmt: str, expected: Mapping[tuple[str, str], Tensor]) -> str:
    try:
        with Team() as team:
            expansion = prepare(Request(checkpoint=checkpoint, out=out, format=fmt, workers=1), team)
    except SparklingError as error:
        if str(checkpoint) not in str(error):
            return f"refused without a name: {error}"
        return _HELD if not out.exists() and not publish.staging(out).parent.exists() else "it wrote before it refused"
    with Team() as team:
        expand(expansion, team)
    found = checkpoint_files.logical(open_checkpoint(_tag(out)))
    if found.keys() != expected.keys():
        return f"other tensors: {sorted(found.keys() ^ expected.keys())[:3]}"
    wrong = [k for k, v in expected.items() if v.dtype != found[k].dtype or not torch.equal(v, found[k])]
    return f"{wrong[:3]} are others" if wrong else _HELD


def _damaged(tag: Path, chance: random.Random) -> str:
    """Damage a checkpoint; what was done."""
    path = chance.choice(sorted(tag.rglob("*.pt")))
    way = chance.choice((*_FILE_DAMAGE, *[_damage_content] * 6))
    return f"{path.relative_to(tag)} {way(path, chance)}"


def _damage_content(path: Path, chance: random.Random) -> str:
    """Put something else into one place of what a file holds, or of all files of its kind."""
    paths, all_alike = [path], chance.random() < 0.3
    kind = path.name.rpartition("_mp_rank")[2]
    if all_alike and kind.endswith("states.pt") and path.name.startswith(("zero", "bf16")):
        paths = sorted(other for other in path.parent.glob("*.pt") if other.name.endswith(kind))
    seed = chance.random()
    for each in paths:
        content = pickles.load(each)
        done = _change_somewhere(content, random.Random(seed))
        part = each.with_suffix(".part")
        torch.save(content, part, pickle_module=pickles._Named)
        os.replace(part, each)
    return f"{done}{' in all' if len(paths) > 1 else ''}"


def _change_somewhere(content: Any, chance: random.Random) -> str:
    if isinstance(content, Tensor) or not content:
        return "nothing"
    # Tensors and the upper levels are few, so they are drawn as often as all the rest.
    places = sorted(_places(content), key=lambda place: len(place[2]))
    tensors = [place for place in places if isinstance(place[0][place[1]], Tensor)]
    within, key, where = chance.choice(chance.choice([group for group in (places, places[:30], tensors) if group]))
    value = within[key]
    if isinstance(value, Tensor):
        changes: dict[str, Callable[[], Any]] = {
            **{str(dtype): partial(value.to, dtype) for dtype in _DTYPES if dtype != value.dtype},
            "repeated": lambda: value.new_zeros(1).expand(max(value.numel(), 2)),
            "longer": lambda: torch.cat([value.reshape(-1), value.new_zeros(3)]),
            "a string": lambda: "x",
        }
        name = chance.choice(sorted(changes))
        within[key] = changes[name]()
        return f"{where}: {name}"
    if isinstance(within, dict) and chance.random() < 0.2:
        del within[key]
        return f"{where} removed"
    within[key] = chance.choice(_HOSTILE)
    return f"{where} = {within[key]!r:.40}"


def _places(content: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, Any, tuple[Any, ...]]]:
    """Every place in nested mappings and lists: what holds it, its key there, and the way to it."""
    entries = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(entries):
        yield content, key, (*where, key)
        yield from _places(value, (*where, key))


def _emptied(path: Path, chance: random.Random) -> str:
    os.truncate(path, 0)
    return "emptied"


def _cut(path: Path, chance: random.Random) -> str:
    os.truncate(path, chance.randrange(path.stat().st_size))
    return "cut"


def _noise(path: Path, chance: random.Random) -> str:
    path.write_bytes(chance.randbytes(chance.randrange(10_000)))
    return "overwritten"


def _instead(path: Path, chance: random.Random) -> str:
    kind = chance.choice(("a FIFO", "a directory", "a loop of links", "a device", "nothing"))
    _become(path, kind)
    return f"is {kind}"


def _become(path: Path, kind: str) -> None:
    """Put something that isn't a regular file, or nothing, in a file's place."""
    path.unlink()
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a directory":
        path.mkdir()
    elif kind != "nothing":
        path.symlink_to({"a device": "/dev/zero", "a loop of links": path.name, "a link to nothing": "nowhere"}[kind])


_FILE_DAMAGE = (_emptied, _cut, _noise, _instead)


# -- kills ---------------------------------------------------------------------------------------------------------


def kills(checkpoint: Path, directory: Path, count: int, seed: int) -> Table:
    """Kill calls at ``count`` moments; the next call must give the undisturbed bytes, and leave nothing else."""
    table, chance, out = Table("kills"), random.Random(seed), directory / "out"
    incomplete, before = publish.staging(out).parent, hashes(checkpoint)
    job = partial(_expanded, checkpoint, out)
    began = time.monotonic()
    assert forked(job)[0] == _HELD
    took, expected = time.monotonic() - began, hashes(out)
    shutil.rmtree(out)
    for _ in range(count):
        after = chance.uniform(0, took)
        forked(job, killed_after=after)
        harmless = (not out.exists() or hashes(out) == expected) and hashes(checkpoint) == before
        shutil.rmtree(out, ignore_errors=True)
        result, memory = forked(job)
        if result == _HELD and (hashes(out) != expected or incomplete.exists() or not harmless):
            result = "other bytes"
        if result != _HELD:
            table.failed.append(f"killed after {after:.3f} s: {result}")
        table.tried += 1
        table.memory = max(table.memory, memory)
        shutil.rmtree(out, ignore_errors=True)
    table.seconds = time.monotonic() - began
    return table


def _expanded(checkpoint: Path, out: Path) -> str:
    checkpoint_files.run(checkpoint, out, {"hidden_size": 96})
    return _HELD


# -- kills around growths ------------------------------------------------------------------------------------------

#: Steps of a job, which grows after :data:`_GROWN_AT` of them; it is killed between two of its checkpoints.
_STEPS, _GROWN_AT = 5, 3
_FROM, _UNTIL = f"global_step{_GROWN_AT - 1}", f"global_step{_GROWN_AT + 1}"
_GROWING: dict[str, Any] = {
    "growths": [{"at_step": _GROWN_AT, "widths": {"hidden_size": 12, "moe_intermediate_size": 10}}],
    "rewarmup": {"ratio": 1.5, "steps": 3},
}
_CASES = {
    "stage 3 with experts": Case(2, 3, 2, sparkling=_GROWING, zero={"sub_group_size": 500}),
    "stage 3, groups, bf16": Case(2, 3, bf16=True, groups=True, sparkling=_GROWING),
    "stage 2 with experts": Case(2, 2, 2, accumulation=2, sparkling={**_GROWING, "bias_correction": "inherit"}),
    "stage 1, frozen, bf16": Case(2, 1, bf16=True, frozen=True, sparkling=_GROWING),
}
#: Seconds after which a rank that was left alone by the other should have ended.
_ALONE = 60.0


def growth_kills(directory: Path, count: int, seed: int) -> Table:
    """Kill one or both ranks of a job around its growth at ``count`` moments, and resume it in new processes.

    A rank that is left must end by itself. Going on must end with the undisturbed job's checkpoint.
    """
    table, chance = Table("kills around growths"), random.Random(seed)
    expected: dict[str, tuple[Path, float]] = {}
    run, began = directory / "run", time.monotonic()
    for _ in range(count):
        name = chance.choice(sorted(_CASES))
        if name not in expected:
            with _Job(_CASES[name], run) as job:
                took = -job.seconds_until(_FROM) + job.seconds_until(_UNTIL)
                assert job.ends(_PATIENCE) == [0, 0], job.said()
            expected[name] = run.rename(directory / name), took
        undisturbed, took = expected[name]
        after, victims = chance.uniform(0, took), chance.choice(((0, 1), (0,), (1,)))
        with _Job(_CASES[name], run) as job:
            job.seconds_until(_FROM)
            time.sleep(after)
            killed = job.kill(victims)
            result = _HELD if None not in job.ends(_ALONE) else f"the rank that is left goes on: {job.said()}"
        moment = f"latest {(run / 'latest').read_text()}, killed rank(s) {victims}"
        table.kinds[moment if killed else "too late"] += 1
        if result == _HELD:
            with _Job(_CASES[name], run) as job:
                ended = job.ends(_PATIENCE)
                result = _same_end(undisturbed, run) if ended == [0, 0] else f"ended with {ended}: {job.said()}"
        if result != _HELD:
            table.failed.append(f"{name}, {moment} {after:.3f} s after {_FROM}: {result}")
        table.tried += 1
        shutil.rmtree(run)
    table.seconds = time.monotonic() - began
    return table


class _Job:
    """A run of two ranks in processes of their own, resumed if ``directory`` has checkpoints.

    Both write there what they print.
    """

    def __init__(self, case: Case, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        port, context = free_port(), forking()
        self._latest, self._log = directory / "latest", directory / "said"
        self._began = time.monotonic()
        self._ranks = [context.Process(target=_train, args=(rank, port, case, directory, self._log)) for rank in (0, 1)]

    def __enter__(self) -> _Job:
        for rank in self._ranks:
            rank.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill((0, 1))
        for rank in self._ranks:
            rank.join()

    def seconds_until(self, tag: str) -> float:
        """Wait until a checkpoint is the latest; how long that was from the job's start."""
        while not self._latest.exists() or self._latest.read_text() != tag:
            if time.monotonic() - self._began > _PATIENCE or not any(rank.is_alive() for rank in self._ranks):
                raise AssertionError(f"{tag} doesn't come: {self.said()}")
            time.sleep(0.001)
        return time.monotonic() - self._began

    def kill(self, ranks: Sequence[int]) -> bool:
        """Kill ranks; whether one of them still ran."""
        ran = [self._ranks[rank].is_alive() for rank in ranks]
        for rank in ranks:
            self._ranks[rank].kill()
        return any(ran)

    def ends(self, seconds: float) -> list[int | None]:
        """The ranks' exit codes when they have ended, or so many seconds are over."""
        deadline = time.monotonic() + seconds
        for rank in self._ranks:
            rank.join(max(deadline - time.monotonic(), 0))
        return [rank.exitcode for rank in self._ranks]

    def said(self) -> str:
        return self._log.read_text(errors="replace")[-5000:] if self._log.exists() else "nothing was said"


def _train(rank: int, port: int, case: Case, directory: Path, log: Path) -> None:
    """What a rank of the job does."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import deepspeed

    import ds_sparkling

    torch.set_num_threads(1)
    deepspeed.init_distributed(verbose=False)
    with in_a_hurry():
        engine = tiny.initialize(case, checkpoint=directory)
        engine.load_checkpoint(str(directory))
        while engine.global_steps < _STEPS:
            engine = ds_sparkling.grow_if_due(engine)
            tiny.train(engine, engine.global_steps + 1)
            engine.save_checkpoint(str(directory), client_state={"seen": engine.global_steps})
    torch.distributed.destroy_process_group()


def _same_end(expected: Path, run: Path) -> str:
    try:
        checkpoint_files.same_files(expected / f"global_step{_STEPS}", run / f"global_step{_STEPS}")
    except AssertionError as error:
        return f"other files: {error}"
    return _HELD


# -- event files ---------------------------------------------------------------------------------------------------

#: What stands where numbers, tags and texts are expected in event files.
_NO_NUMBERS = (math.nan, math.inf, -math.inf, -1.0, 0.5, 3e38)
_ODD_TEXT = (b"$\\frac{", b"\xff\xfe", b"a$b", b"<b>", b"\n", b"\x00", b"x" * 100_000, "\u202e".encode())
_ODD_SUMMARIES = (
    *(b"", b"{", b"[" * 100_000, b'{"a": ' * 10_000, b'{"steps": ' + b"9" * 5000 + b"}", b"\xff\xfe", b"null"),
    *(b'{"variant": 1}', b'{"validations": [[NaN, 1, 1]]}', b"\0" * 50),
)


def damaged_runs(directory: Path, count: int, seed: int) -> Table:
    """Damage copies of a grown run's files in ``count`` ways.

    The report must show the run's own points and no others, and say what is missing.
    """
    table, chance = Table("event files"), random.Random(seed)
    original, copy, began = directory / "run", directory / "damaged", time.monotonic()
    event_files.grown(original / "tensorboard", event_files.job(), event_files.diagnosis())
    event_files.SUMMARY.write(original)
    expected = _points(read_run(original, "run"))
    for _ in range(count):
        shutil.copytree(original, copy)
        way = chance.choice(sorted(_EVENT_DAMAGE))
        done, path = _EVENT_DAMAGE[way](copy, chance)
        result, memory = forked(partial(_report_on, path, expected, done))
        if memory > _MEMORY:
            result = f"{memory / 1e6:.0f} MB"
        if result != _HELD:
            table.failed.append(f"{way}, {done.what}: {result}")
        table.kinds[way] += 1
        table.tried += 1
        table.memory = max(table.memory, memory)
        for left in (copy, path, directory / "page"):
            shutil.rmtree(left, ignore_errors=True)
    table.seconds = time.monotonic() - began
    return table


@dataclass(frozen=True)
class _Done:
    """What was done to a run.

    Attributes:
        lossless: whether all of its points can still be read.
        told: what the report must say of it; None if it may be silent.
        added: a point that the run has now, besides.
        drawn: whether the pictures are looked at, too, which takes longer.
    """

    what: str
    lossless: bool = False
    told: str | None = None
    added: tuple[str, float, float] | None = None
    drawn: bool = False


def _report_on(run: Path, expected: set[tuple[str, float, float]], done: _Done) -> str:
    read = read_runs([run])
    found, findings = _points(read[0]), verdict(read)
    expected = expected | ({done.added} if done.added else set())
    said = page_text(read, findings)
    if done.drawn:
        with contextlib.redirect_stdout(io.StringIO()):
            main_of_report([str(run), "--output", str(run.parent / "page")])
        said += (run.parent / "page" / "report.html").read_text()
    if more := found - expected:
        return f"points that the run hasn't: {sorted(more)[:3]}"
    if found != expected and done.lossless:
        return f"points are missing: {sorted(expected - found)[:3]}"
    if found != expected and not read[0].notes:
        return f"{len(expected - found)} points are missing, without a word"
    if done.told is not None and not any(done.told in note for note in read[0].notes):
        return f"{done.told!r} isn't told, but {read[0].notes}"
    return _HELD if all(note in said for note in read[0].notes) else "not all is told on the page"


def _points(run: ReadRun) -> set[tuple[str, float, float]]:
    return {
        (tag, *point) for tag, curve in run.curves.items() for point in zip(curve.samples, curve.values, strict=True)
    }


def _event_file(run: Path, chance: random.Random) -> Path:
    return chance.choice(sorted((run / "tensorboard").iterdir()))


def _changed_bytes(run: Path, chance: random.Random) -> tuple[_Done, Path]:
    path = _event_file(run, chance)
    data = bytearray(path.read_bytes())
    place, size = chance.randrange(len(data)), chance.choice((1, 1, 1, 30, 3000))
    way = chance.choice(("flipped", "flipped", "flipped", "noise", "zeros", "removed", "doubled"))
    part = bytes(data[place : place + size])
    if way == "flipped":
        data[place] ^= 1 << chance.randrange(8)
    else:
        put = {"noise": chance.randbytes(len(part)), "zeros": bytes(len(part)), "removed": b"", "doubled": part * 2}[
            way
        ]
        data[place : place + len(part)] = put
    same = bytes(data) == path.read_bytes()
    path.write_bytes(data)
    return _Done(f"{path.name} {way} {len(part)} from {place:,}", same, None if same else path.name), run


def _cut_off(run: Path, chance: random.Random) -> tuple[_Done, Path]:
    path = _event_file(run, chance)
    # A file that ends with a record is one of a run that was stopped there: nobody can tell it from a damaged one.
    begins = {record[0] for record in records(path) if not isinstance(record, Unread)} - {0}
    size = chance.choice([size for size in range(path.stat().st_size) if size not in begins])
    os.truncate(path, size)
    return _Done(f"{path.name} cut to {size:,} bytes", told=path.name), run


def _odd_event(run: Path, chance: random.Random) -> tuple[_Done, Path]:
    """Another event at the end of a file, well-formed and sound."""
    path = _event_file(run, chance)
    event = Event(wall_time=time.time(), step=chance.choice((0, 16, 800, 2**40)))
    kind = chance.choice(("number", "tensor", "plan", "text", "time"))
    told: str | None = "left out"
    if kind == "number":
        tag, value = chance.choice(("number", "hidden_size", "parameters")), chance.choice(_NO_NUMBERS)
        event.summary.value.add(tag=f"Growth/{tag}", simple_value=value)
        what = f"Growth/{tag} {value}"
    elif kind == "tensor":
        tensor = make_tensor_proto(chance.choice((["a"], [1.0, 2.0], [True, False], [1 + 2j])))
        event.summary.value.add(tag="Train/loss", tensor=tensor)
        what = f"a Train/loss of {tensor.dtype}"
    elif kind == "plan":
        event.summary.value.add(tag="Growth/plan/text_summary", tensor=make_tensor_proto([1.0]))
        what = "a plan of numbers"
    elif kind == "text":
        text, told = chance.choice(_ODD_TEXT), None
        event.summary.value.add(tag="Growth/plan/text_summary", tensor=make_tensor_proto([text]))
        event.step = event_files.SAMPLES * event_files.GROWN_AT
        what = f"the plan {text[:20]!r}"
    else:
        event.wall_time, told = chance.choice(_NO_NUMBERS), None
        what = f"an empty one at {event.wall_time}"
    _append(path, event.SerializeToString())
    return _Done(f"{what} in {path.name}", lossless=True, told=told, drawn=kind == "text"), run


def _odd_tag(run: Path, chance: random.Random) -> tuple[_Done, Path]:
    """One more curve, whose name is a formula, or no text."""
    path = max((run / "tensorboard").iterdir())
    tag, name = chance.choice(("effective_rank", "activation_rms", "router/load_max")), chance.choice(_ODD_TEXT)
    event = Event(wall_time=time.time(), step=event_files.SAMPLES * event_files.STEPS)
    event.summary.value.add(tag=f"{tag}/{'@' * len(name)}", simple_value=1.5)
    _append(path, event.SerializeToString().replace(b"@" * len(name), name))
    try:
        added = (f"{tag}/{name.decode()}", float(event.step), 1.5)
    except UnicodeDecodeError:
        return _Done(f"{tag}/{name!r}", lossless=True, told=path.name), run
    return _Done(f"{tag}/{name[:20]!r}", lossless=True, added=added, drawn=True), run


def _append(path: Path, data: bytes) -> None:
    """One more record at the end of an event file."""
    header = struct.pack("<Q", len(data))
    with path.open("ab") as file:
        file.write(header + struct.pack("<I", masked_crc32c(header)) + data + struct.pack("<I", masked_crc32c(data)))


def _odd_name(run: Path, chance: random.Random) -> tuple[_Done, Path]:
    name = chance.choice([text for text in _ODD_TEXT if b"\0" not in text and len(text) < 255])
    path = Path(os.fsdecode(os.path.join(os.fsencode(run.parent), name)))
    return _Done(f"the run is called {name!r}", lossless=True, drawn=True), run.rename(path)


def _no_file(run: Path, chance: random.Random) -> tuple[_Done, Path]:
    """One more event file, which is none."""
    path = run / "tensorboard" / f"events.out.tfevents.{chance.choice((1, 2**40))}.host"
    kind = chance.choice(
        ("a FIFO", "a directory", "a loop of links", "a device", "a link to nothing", "empty", "noise")
    )
    if kind in ("empty", "noise"):
        path.write_bytes(b"" if kind == "empty" else chance.randbytes(500))
    else:
        path.touch()
        _become(path, kind)
    return _Done(f"{path.name} is {kind}", lossless=True, told=path.name), run


def _odd_summary(run: Path, chance: random.Random) -> tuple[_Done, Path]:
    path = run / "summary.json"
    content = chance.choice((*_ODD_SUMMARIES, "a FIFO", "a directory", "a loop of links", "a device"))
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        _become(path, content)
    return _Done(f"summary.json {content[:20]!r}", lossless=True, told=str(path)), run


_EVENT_DAMAGE: dict[str, Callable[[Path, random.Random], tuple[_Done, Path]]] = {
    "bytes changed": _changed_bytes,
    "cut off": _cut_off,
    "odd events": _odd_event,
    "odd tags": _odd_tag,
    "odd names": _odd_name,
    "no files": _no_file,
    "odd summaries": _odd_summary,
}


def synthetic(directory: Path) -> dict[str, Path]:
    """Checkpoints of stage 3 with experts, and the universal one of it."""
    write_checkpoint(directory / "zero3", config_of(100_000), ranks=2, expert_parallel=2)
    checkpoint_files.run(directory / "zero3", directory / "universal", format="universal")
    return {kind: directory / kind for kind in ("zero3", "universal")}


def main() -> None:
    parser = argparse.ArgumentParser(description="Damage files, or kill calls and jobs, many times.")
    parser.add_argument("campaign", choices=("damage", "kills", "growths", "events"))
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, nargs="*", default=[], help="further ones to damage")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if options.campaign == "growths":
            table = growth_kills(directory, options.count, options.seed)
        elif options.campaign == "events":
            table = damaged_runs(directory, options.count, options.seed)
        elif options.campaign == "kills":
            table = kills(synthetic(directory)["zero3"], directory, options.count, options.seed)
        else:
            checkpoints = synthetic(directory) | {path.name: path for path in options.checkpoint}
            table = damage(checkpoints, directory, options.count, options.seed)
    print(*table.failed, table, sep="\n")


if __name__ == "__main__":
    main()
