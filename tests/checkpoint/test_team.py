"""Several processes that write one checkpoint, as a launcher starts them, but without its own start."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import checkpoint_files
from benchmarks.common import free_port
from damage import hashes
from distributed import forking
from ds_sparkling.checkpoint import output
from ds_sparkling.checkpoint.command import main

RANKS = 3


def lose(descriptor: int) -> None:
    os._exit(9)


def member(rank: int, port: int, said: str, arguments: Sequence[str], lost: int | None) -> None:
    """One process of the team; ``lost`` is the one that ends without a word when it has filled a file."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), TORCHELASTIC_RUN_ID="team")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with open(said, "w") as file:
        os.dup2(file.fileno(), 2)
    if rank == lost:
        output._sync = lose
    main(arguments)


def ran(directory: Path, arguments: Sequence[str], lost: int | None = None) -> tuple[list[int | None], list[str]]:
    """The processes' statuses, and what they say on standard error."""
    context, port = forking(), free_port()
    said = [directory / f"said-by-{rank}" for rank in range(RANKS)]
    team = [
        context.Process(target=member, args=(rank, port, str(said[rank]), arguments, lost)) for rank in range(RANKS)
    ]
    for process in team:
        process.start()
    for process in team:
        process.join(120)
        process.kill()
    texts = [path.read_text() for path in said]
    for path in said:
        path.unlink()
    return [process.exitcode for process in team], texts


@pytest.mark.ranks
def test_processes_share_the_files_and_fail_together(saved: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint, out = saved("experts"), tmp_path / "three"
    checkpoint_files.run(checkpoint, tmp_path / "one", world_size=4)
    arguments = [str(checkpoint), str(out), "--world-size", "4", "--verify"]
    statuses, texts = ran(tmp_path, arguments)
    assert statuses == [0] * RANKS, texts
    assert hashes(tmp_path / "one") == hashes(out)
    before = hashes(tmp_path)
    statuses, texts = ran(tmp_path, [str(checkpoint), str(tmp_path / "lost"), "--world-size", "4"], lost=1)
    assert statuses == [1, 9, 1], texts
    assert [text.count("another process of this job has ended") for text in texts] == [1, 0, 1], texts
    assert not any("Traceback" in text for text in texts)
    assert hashes(tmp_path) == before
