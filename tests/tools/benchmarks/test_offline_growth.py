"""The offline benchmark runs, and its made-up checkpoints are sound."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench_expand import main
from benchmarks.synthetic_checkpoint import config_of, write_checkpoint
from ds_sparkling.checkpoint.opening import open_checkpoint


def test_it_measures_reshaping_and_growing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "figures.json"
    main(["--sizes", "0.01", "--ranks", "2", "--repeat", "1", "--no-universal", "--json", str(figures)])
    rows = json.loads(figures.read_text())
    assert [row["what"] for row in rows] == ["reshape", "grow"]
    assert all(row[name] > 0 for row in rows for name in ("seconds", "copy_s", "copy_sync_s", "peak_mib"))
    assert rows[1]["output_gb"] > 1.5 * rows[0]["output_gb"]
    assert "peak [MiB]" in capsys.readouterr().out


def test_a_synthetic_checkpoint_is_as_large_as_asked_for_and_sound(tmp_path: Path) -> None:
    parameters = 10**6
    size = write_checkpoint(tmp_path, config_of(parameters), ranks=4, expert_parallel=2)
    assert 0.5 < size / (12 * parameters) < 2
    source = open_checkpoint(tmp_path / "global_step1")
    assert len(list(source.check())) == 8
    assert source.layout.settings.expert_parallel == 2
