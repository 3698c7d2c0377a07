"""Written files hold the checksums that zip archives have, which this package, zipfile and unzip check."""

from __future__ import annotations

import itertools
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_sparkling.checkpoint import pickles
from ds_sparkling.checkpoint.checksums import combined
from ds_sparkling.checkpoint.output import ElementRange, Filler, PickledFile
from ds_sparkling.errors import CheckpointError


@settings(derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3000), st.binary(min_size=1, max_size=40))), st.integers(0, 50))
def test_parts_combine_to_the_checksum_of_the_whole(parts: list[tuple[int, bytes]], zeros: int) -> None:
    whole, placed = bytearray(), []
    for gap, part in parts:
        whole += bytes(gap)
        placed.append((7 + len(whole), len(part), zlib.crc32(part)))
        whole += part
    whole += bytes(zeros)
    assert combined(reversed(placed), 7, len(whole)) == zlib.crc32(whole)


class Counting:
    """Contents whose elements are their own indices, cut into uneven blocks."""

    def cuts(self, _name: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
        marks = [start, *range(start + 700, stop, 700), stop]
        return itertools.pairwise(marks)

    def make(self, _name: str, _key: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return torch.arange(start, stop).to(dtype)


def written(path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A file with tensors that are filled, filled in part, written as they are, and empty."""
    file = PickledFile({})
    flat = file.room((5000,), dtype, [ElementRange("w", "weight", 0, 3000, offset=100)])
    whole = file.room((30, 40), dtype, [ElementRange("w", "weight", 0, 1200)])
    file.content = {"step": 3, "state": {"flat": [flat, torch.arange(4)]}, "none": torch.empty(0), "whole": whole}
    contents: Any = Counting()
    Filler(contents, workers=2).fill(iter([(path, file)]))
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_written_file_has_its_checksums(tmp_path: Path, dtype: torch.dtype) -> None:
    path = written(tmp_path / "x.pt", dtype)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert all(entry.CRC for entry in archive.infolist() if entry.file_size)
    for content in (torch.load(path, mmap=True), torch.load(path), pickles.load(path, verify=True)):
        assert torch.equal(content["whole"], torch.arange(1200).view(30, 40).to(dtype))
        assert torch.equal(content["state"]["flat"][0][100:3100], torch.arange(3000).to(dtype))
        assert not content["state"]["flat"][0][3100:].any()


def test_a_written_file_has_the_bytes_that_torch_writes_behind_each_part(tmp_path: Path) -> None:
    """Readers that go by what follows a part, and not by the archive's directory, find the same checksum."""
    path = written(tmp_path / "x.pt")
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.file_size:
                assert b"PK\x07\x08" + entry.CRC.to_bytes(4, "little") in content


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("data/0", r"in the tensor \['state'\]\['flat'\]\[0\]"),
        ("data/3", r"in the tensor \['whole'\]"),
        ("data.pkl", ""),
    ],
)
def test_a_flipped_bit_of_a_written_file_is_named(tmp_path: Path, part: str, words: str) -> None:
    path = written(tmp_path / "x.pt")
    with zipfile.ZipFile(path) as archive:
        data = archive.read(f"archive/{part}")
    content = bytearray(path.read_bytes())
    content[content.rindex(data) + len(data) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"x\.pt is damaged, by its checksums.*{words}"):
        pickles.load(path, verify=True)
