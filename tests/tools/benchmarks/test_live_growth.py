"""The growth benchmark runs and writes what it says; its figures are nobody's assertion."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench_regrow import main


def test_one_small_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    main(["--ranks", "1", "--parameters", "1e5", "--repeat", "1", "--json", str(path)])
    (row,) = json.loads(path.read_text())
    assert row["ranks"] == 1
    assert row["parameters_after"] > 3 * row["parameters_before"]
    assert all(row[name] > 0 for name in ("grow_s", "engine_start_s", "memory_copy_s", "save_convert_load_s"))
    assert row["peak_over_budget"] == pytest.approx(row["peak_mib"] / row["budget_mib"])
    header = capsys.readouterr().out.splitlines()[0]
    assert "(grow-start)/copy" in header


def test_ranks_that_cannot_share_experts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--ranks", "3"])
    assert "--ranks 3: 1, or a multiple of 2" in capsys.readouterr().err
