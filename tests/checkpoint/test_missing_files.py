"""Files that are missing, too many, or can't be read at all are named."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import checkpoint_files
from damage import EXPERT, MODEL, MODEL_0, MODEL_1, OPTIMIZER_0, OPTIMIZER_1, TAG, Change, copy, readable, refused
from ds_sparkling.errors import CheckpointError


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
    ],
    ids=readable,
)
def test_missing_and_surplus_files_are_named(
    kind: str, damage: Change, words: tuple[str, ...], saved: Callable[[str], Path]
) -> None:
    checkpoint = saved(kind)
    damage(checkpoint / TAG)
    refused(checkpoint, str(checkpoint / TAG), *words)


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
