"""Damaged checkpoints and killed calls in great numbers, with a fixed seed.

The suite runs a few of them (``test_campaign.py``). From the repository's root,
``PYTHONPATH=.:tools:tests python tests/campaign.py damage 1000`` or ``... kills 200`` runs many, and prints a table.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import checkpoint_files
from benchmarks.synthetic_checkpoint import config_of, write_checkpoint
from damage import hashes
from ds_sparkling.checkpoint import pickles, publish
from ds_sparkling.checkpoint.expand import expand, prepare
from ds_sparkling.checkpoint.opening import open_checkpoint
from ds_sparkling.checkpoint.request import Request
from ds_sparkling.checkpoint.team import Team
from ds_sparkling.errors import SparklingError

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
        memory: bytes that the largest call had.
    """

    campaign: str
    tried: int = 0
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0
    memory: int = 0

    def __str__(self) -> str:
        held, megabytes = self.tried - len(self.failed), self.memory / 1e6
        return f"{self.campaign}: {self.tried} tried, {held} held, {self.seconds:.0f} s, {megabytes:.0f} MB at most"


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
    path.unlink()
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a directory":
        path.mkdir()
    elif kind != "nothing":
        path.symlink_to("/dev/zero" if kind == "a device" else path.name)
    return f"is {kind}"


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


def synthetic(directory: Path) -> dict[str, Path]:
    """Checkpoints of stage 3 with experts, and the universal one of it."""
    write_checkpoint(directory / "zero3", config_of(100_000), ranks=2, expert_parallel=2)
    checkpoint_files.run(directory / "zero3", directory / "universal", format="universal")
    return {kind: directory / kind for kind in ("zero3", "universal")}


def main() -> None:
    parser = argparse.ArgumentParser(description="Damage checkpoints, or kill calls, many times.")
    parser.add_argument("campaign", choices=("damage", "kills"))
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, nargs="*", default=[], help="further ones to damage")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        checkpoints = synthetic(directory)
        if options.campaign == "damage":
            checkpoints |= {path.name: path for path in options.checkpoint}
            table = damage(checkpoints, directory, options.count, options.seed)
        else:
            table = kills(checkpoints["zero3"], directory, options.count, options.seed)
    print(*table.failed, table, sep="\n")


if __name__ == "__main__":
    main()
