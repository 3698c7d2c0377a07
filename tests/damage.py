"""Small checkpoints and what may happen to them, for the tests of damaged, mixed-up and malicious ones."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from distributed import Workers
from ds_sparkling.checkpoint.expand import prepare
from ds_sparkling.checkpoint.request import Request
from ds_sparkling.checkpoint.team import Team
from ds_sparkling.errors import CheckpointError, SparklingError
from tiny import Case

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


@pytest.fixture(scope="session")
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
    request = Request(checkpoint=checkpoint, out=out, **{"widths": WIDE, "config": FACTORY, "workers": 2, **options})
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


def copy(source: str, target: str) -> Change:
    return lambda path: shutil.copy(path / source, path / target)


def changed(change: Callable[[Any], object], *names: str) -> Change:
    def change_all(path: Path) -> None:
        for name in names:
            edit(path / name, change)

    return change_all


def replaced(name: str, content: Any) -> Change:
    return lambda path: torch.save(content, path / name)


def flipped(name: str, position: Callable[[bytes], int], bit: int = 0x10) -> Change:
    def flip(path: Path) -> None:
        content = bytearray((path / name).read_bytes())
        content[position(bytes(content))] ^= bit
        (path / name).write_bytes(content)

    return flip


def made(*names: str) -> Change:
    """Makes files, and folders where a name ends in a slash."""

    def make(directory: Path) -> None:
        for name in names:
            path = directory / name
            (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
            if not name.endswith("/"):
                path.write_text("precious")

    return make


def both(*changes: Change) -> Change:
    """One change after the other."""

    def change(path: Path) -> None:
        for each in changes:
            each(path)

    return change


def removed(*names: str) -> Change:
    def change(path: Path) -> None:
        for name in names:
            (path / name).unlink()

    return change
