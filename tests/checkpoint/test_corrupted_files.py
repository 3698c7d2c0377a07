"""Files that are truncated, overwritten or have flipped bits are named, and no result is changed unnoticed."""

from __future__ import annotations

import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import checkpoint_files
from damage import (
    EXPERT,
    MODEL,
    MODEL_0,
    MODEL_1,
    OPTIMIZER_0,
    OPTIMIZER_1,
    TAG,
    Change,
    flipped,
    hashes,
    readable,
    refused,
)


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


def flipped_tensor(name: str) -> Change:
    """A byte in the middle of the largest tensor's data."""

    def flip(path: Path) -> None:
        with zipfile.ZipFile(path / name) as archive:
            largest = max((e for e in archive.infolist() if "/data/" in e.filename), key=lambda e: e.file_size)
            data = archive.read(largest)
        flipped(name, lambda content: content.index(data) + len(data) // 2)(path)

    return flip


@pytest.mark.parametrize(
    ("kind", "damage", "words"),
    [
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
        ("experts", lambda path: (path / "ds_sparkling.json").write_text("{"), ("ds_sparkling.json", "can't be read")),
    ],
    ids=readable,
)
def test_truncated_and_overwritten_files_are_named(
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
