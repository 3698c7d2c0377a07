"""The benchmark of draws runs and writes what it says; its figures are nobody's assertion."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench_draws import main


def test_a_small_weight(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, threads = tmp_path / "rows.json", torch.get_num_threads()
    try:
        main(["--elements", "5e4", "--row", "32", "--threads", "1", "--repeat", "1", "--json", str(path)])
    finally:
        torch.set_num_threads(threads)
    rows = json.loads(path.read_text())
    assert [row["what"] for row in rows] == ["random", "cancelling", "perturbed", "perturbed, tripled"]
    for row in rows:
        assert 49_000 < row["elements"] <= 50_000
        assert row["ratio"] == pytest.approx(row["millions_per_second"] / row["normal_millions_per_second"])
    assert "times normal_" in capsys.readouterr().out.splitlines()[0]
