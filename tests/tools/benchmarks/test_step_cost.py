"""The step benchmark runs and writes what it says; its figures are nobody's assertion."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from bench_step import main
from benchmarks.diagnosis_cost import summary
from benchmarks.step_cost import LAYOUTS, blocks_of, diagnosed_config, job_config, step_times
from ds_sparkling.spec.config import read_json, sparkling_config
from ds_sparkling.spec.strategy import BiasCorrection, Scope


def test_one_small_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    options = ["--optimizer", "adamw-fused", "--elements", "1e5", "--row", "64", "--threads", "1", "--repeat", "2"]
    main([*options, "--json", str(path)])
    rows = {row["step"]: row for row in json.loads(path.read_text())}
    assert list(rows) == [*(f"new {layout}" for layout in LAYOUTS), "curves met", "by hand", "by hand, buffer kept"]
    for row in rows.values():
        assert row["elements"] == 100_000 // 128 * 128
        assert 0 < row["plain_min_ms"] <= row["plain_median_ms"]
        assert 0 < row["min_ms"] <= row["median_ms"]
        assert row["ratio"] == pytest.approx(row["min_ms"] / row["plain_min_ms"])
    lines = capsys.readouterr().out.splitlines()
    assert "plain min [ms]" in lines[0]
    assert "curves met" in lines[4]


@pytest.mark.parametrize(
    ("layout", "rows"),
    [
        ("columns", [[0, 0, 1, 1]] * 4),
        ("rows", [[0] * 4, [0] * 4, [1] * 4, [1] * 4]),
        ("columns, then rows", [[0, 0, 1, 1], [0, 0, 1, 1], [2] * 4, [2] * 4]),
    ],
)
def test_layouts(layout: str, rows: list[list[int]]) -> None:
    births: list[int] = []
    for block in blocks_of(layout, 16, 4):
        row: list[int] = []
        for run in block.runs:
            row += [run.birth] * (run.stop - len(row))
        births += row * block.rows
    assert births == [stage for row in rows for stage in row]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--row", "7"], "--row 7: must be even"),
        (["--elements", "100"], "--elements 100: must be two rows at least, 2048"),
        (["--repeat", "0"], "argument --repeat: must be positive, got 0"),
        (["--threads", "0"], "argument --threads: must be positive, got 0"),
        (["--quickstart", "10"], "--quickstart 10: must be 60 steps at least"),
        (["--diagnostics", "0"], "argument --diagnostics: must be positive, got 0"),
        (["--diagnostics", "--hidden", "-1"], "argument --hidden: must be positive, got -1"),
        (["--optimizer", "adam"], "invalid choice: 'adam'"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(options)
    assert message in capsys.readouterr().err


def test_the_jobs_differ_in_how_new_elements_are_stepped_alone() -> None:
    aware, plain = (job_config(300, birth_aware=birth_aware) for birth_aware in (True, False))
    quickstart = read_json(Path(__file__).parents[3] / "configs" / "quickstart.json")
    assert sparkling_config(aware).strategy == sparkling_config(quickstart).strategy
    assert sparkling_config(aware).growths[0].at_step == 100
    strategy = sparkling_config(plain).strategy
    assert (strategy.rewarmup.scope, strategy.bias_correction) == (Scope.NONE, BiasCorrection.INHERIT)
    aware.pop("sparkling")
    plain.pop("sparkling")
    assert aware == plain


def test_the_price_of_a_diagnosis_is_shared_by_its_window() -> None:
    steps = [10.0, 11.0] * 24 + [10.0]
    found = summary([[*steps, 30.0], [*steps[:-1], 700.0, 30.0], [*steps, 900.0]])
    assert (found.steps, found.off, found.ordinary, found.diagnosed) == (150, 10.0, 11.0, 30.0)
    assert found.ratio == pytest.approx((49 * 11 + 30) / 500)


def test_the_diagnosed_model_doubles_its_widths() -> None:
    config = diagnosed_config(96, None)
    assert (config["model"]["hidden_size"], config["model"]["moe_intermediate_size"]) == (96, 32)
    assert config["sparkling"]["growths"][0]["widths"] == {"hidden_size": 192, "moe_intermediate_size": 64}


def test_step_times_begin_after_the_growth(tmp_path: Path) -> None:
    for engine, steps in enumerate([(1, 2), (3, 4, 5, 6)]):
        with SummaryWriter(str(tmp_path), filename_suffix=str(engine)) as writer:
            for step in steps:
                writer.add_scalar("Train/loss", 0.0, 16 * step, walltime=100.0 + step**2)
                writer.add_scalar("Train/tokens", 0.0, 16 * step, walltime=0.0)
    assert step_times(tmp_path, after=3, batch=16) == [7.0, 9.0, 11.0]
