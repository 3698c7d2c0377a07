"""Weights that aren't finite are named, and large ones aren't."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint_files
from damage import FACTORY, TAG, WIDE, edit, optimizer_file, readable
from ds_sparkling.checkpoint.opening import open_checkpoint


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
