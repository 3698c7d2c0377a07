"""A config trained three ways, and what is printed in the end."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from distributed import Workers
from ds_sparkling.errors import ConfigError, SparklingError
from ds_sparkling.job import compare, side_by_side
from ds_sparkling.job.command import job_parser
from ds_sparkling.job.loss_picture import loss_picture
from ds_sparkling.job.variant_config import as_variant, equal_steps
from ds_sparkling.job.variants import Variant
from ds_sparkling.report.command import main as report
from ds_sparkling.spec.config import read_json
from ds_sparkling.spec.run_summary import RunSummary, read_summary

ROOT = Path(__file__).parents[2]
NAMES = [variant.value for variant in Variant]
PNG = b"\x89PNG"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The quickstart's config, much shorter."""
    data: dict[str, Any] = read_json(ROOT / "configs" / "quickstart.json")
    data["model"] |= {"hidden_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 8}
    data["training"] |= {"steps": 4, "sequence_length": 32, "evaluate_every": 1, "evaluate_batches": 1, "log_every": 1}
    data["sparkling"]["growths"] = [{"at_step": 2, "widths": {"hidden_size": 32, "moe_intermediate_size": 16}}]
    path = tmp_path / "short.json"
    path.write_text(json.dumps(data))
    return path


def run_job(arguments: list[str]) -> None:
    from ds_sparkling.job.main_job import run

    run(job_parser("train.py").parse_args(arguments))


def job_of(command: Sequence[str]) -> list[str]:
    """The job's arguments in a launcher's command."""
    return list(command[command.index("ds_sparkling.train") + 1 :])


def rows(printed: str) -> list[list[str]]:
    """The table's cells, without its header."""
    cells = [line.split() for line in printed.splitlines()]
    return [row for row in cells if len(row) == 7 and row[0] in NAMES]


def test_three_runs_and_their_comparison(
    config: Path,
    tmp_path: Path,
    workers: Callable[[int], Workers],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The jobs run in processes that are there already, instead of the launcher's."""
    (tmp_path / "text").write_bytes(bytes(range(256)) * 200)

    def launched(command: Sequence[str]) -> int:
        workers(2).run(run_job, job_of(command))
        return 0

    monkeypatch.setattr(side_by_side, "run_job", launched)
    output = tmp_path / "out"
    arguments = ["--deepspeed_config", str(config), "--output", str(output), "--data", str(tmp_path / "text")]
    compare.main(arguments)
    printed = capsys.readouterr().out
    runs = {name: read_summary(output / name) for name in NAMES}
    grown, scratch, narrow, longer = (run for run in runs.values() if run is not None)
    assert [run.variant for run in (grown, scratch, narrow, longer)] == NAMES
    assert (grown.parameters, grown.active_parameters) == (scratch.parameters, scratch.active_parameters)
    assert narrow.parameters < grown.parameters
    assert grown.tokens == scratch.tokens == narrow.tokens == 4 * 16 * 32
    assert grown.flops == pytest.approx((scratch.flops + narrow.flops) / 2)
    assert all(run.seconds > 0 and run.steps == 4 for run in (grown, scratch, narrow))
    # The third control: narrow to the end, and as close to the grown run's compute as whole steps come.
    assert (longer.parameters, longer.active_parameters) == (narrow.parameters, narrow.active_parameters)
    assert abs(longer.flops - grown.flops) <= 0.5 * narrow.flops / narrow.steps
    assert longer.tokens == longer.steps * 16 * 32 > grown.tokens
    everything = (grown, scratch, narrow, longer)
    assert len({run.validation_loss for run in everything}) == 4
    table = rows(printed)
    assert [(row[0], row[1], row[2], row[4], row[5]) for row in table] == [
        (run.variant, f"{run.validation_loss:.4f}", f"{run.parameters:,}", f"{run.tokens:,}", f"{run.flops:.3e}")
        for run in everything
    ]
    assert (output / "loss.png").read_bytes().startswith(PNG)
    assert (output / "grown" / "loss.png").read_bytes().startswith(PNG)
    # As every step, and right before and right after the growth.
    assert [point[0] for point in grown.validations].count(2 * 16 * 32) == 3
    assert (grown.validations[-1][0], grown.validations[-1][2]) == (grown.tokens, grown.validation_loss)
    assert f"tensorboard --logdir {output}" in printed
    command = next(line for line in printed.splitlines() if "tools/report.py" in line).split("tools/report.py ")[1]

    # Nothing is trained over; what is missing is made up for, and the outcome is the same.
    with pytest.raises(SystemExit):
        compare.main(arguments)
    assert f"{output}/grown" in (error := capsys.readouterr().err)
    assert "pass --resume to go on, or another --output" in error
    shutil.rmtree(output / "never-grown")
    compare.main([*arguments, "--resume"])
    assert [row[:-1] for row in rows(capsys.readouterr().out)] == [row[:-1] for row in table]
    assert [read_summary(output / name) for name in NAMES[:2]] == [grown, scratch]  # with the time of their training

    report([*command.split(), "--output", str(tmp_path / "report")])
    assert "growth 1 kept the function" in capsys.readouterr().out
    assert len(list((tmp_path / "report").glob("*.png"))) >= 4


# -- without training -------------------------------------------------------------------------------------------


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The launcher's commands; each job leaves a checkpoint and a summary, but for data called "bad" or "worst"."""
    commands: list[list[str]] = []

    def launched(command: Sequence[str]) -> int:
        commands.append(list(command))
        job = job_of(command)
        if "worst" in job:
            return 1
        output, variant = (job[job.index(option) + 1] for option in ("--output", "--variant"))
        (Path(output) / "checkpoints").mkdir(parents=True, exist_ok=True)
        (Path(output) / "checkpoints" / "latest").write_text("global_step2")
        if variant == "from-scratch" and "bad" in job:
            return 3
        RunSummary(
            variant=variant,
            validation_loss=1.0,
            steps=4,
            tokens=100,
            flops=6e6,
            seconds=0.5,
            parameters=10,
            active_parameters=5,
        ).write(Path(output))
        return 0

    monkeypatch.setattr(side_by_side, "run_job", launched)
    return commands


def test_a_failed_run_stops_the_rest_and_resume_goes_on(
    config: Path, tmp_path: Path, jobs: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = ["--deepspeed_config", str(config), "--output", str(output), "--master_port", "1234"]
    with pytest.raises(SystemExit) as exit_info:
        compare.main([*arguments, "--data", "bad"])
    assert exit_info.value.code == 2
    assert (
        f"the from-scratch run ended with status 3; to go on, pass --resume --output {output}"
        in capsys.readouterr().err
    )
    assert len(jobs) == 2
    assert jobs[0][5:11] == ["--num_gpus", "2", "--master_port", "1234", "--module", "ds_sparkling.train"]
    assert not any("--resume" in job for job in jobs)
    jobs.clear()
    compare.main([*arguments, "--data", "good", "--resume"])
    assert ["--resume" in job for job in jobs] == [True, True, False, False]
    assert all(job_of(job)[:2] == ["--data", "good"] for job in jobs)


def test_a_run_that_never_started(
    config: Path, tmp_path: Path, jobs: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        compare.main(["--deepspeed_config", str(config), "--output", str(tmp_path / "out"), "--data", "worst"])
    assert "the grown run ended with status 1; to go on, start again" in capsys.readouterr().err


def test_the_directory_is_found_again(
    config: Path, tmp_path: Path, jobs: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        compare.main(["--deepspeed_config", str(config), "--resume"])
    assert "found no comparison" in capsys.readouterr().err
    compare.main(["--deepspeed_config", str(config)])
    (made,) = (tmp_path / "runs").iterdir()
    assert made.name.startswith("short-compare-")
    compare.main(["--deepspeed_config", str(config), "--resume"])
    assert list((tmp_path / "runs").iterdir()) == [made]
    assert len(jobs) == 8


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"sparkling": {}}, "plans no growth"),
        ({"tensorboard": {"enabled": True}}, "would mix the runs' curves"),
        ({"sparkling": {"growths": [{"at_step": 1}]}}, "lacks 'widths'"),
        ({"scheduler": {"type": "StepLR", "params": {"step_size": 2}}}, "scheduler.type is 'StepLR', whose length"),
        (
            {"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 4}}},
            "scheduler.params.warmup_num_steps must be given",
        ),
    ],
)
def test_configs_that_cannot_be_compared(
    config: Path, jobs: list[list[str]], change: dict[str, Any], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(json.dumps(read_json(config) | change))
    with pytest.raises(SystemExit):
        compare.main(["--deepspeed_config", str(config)])
    assert text in capsys.readouterr().err
    assert jobs == []


def test_variants_of_a_config() -> None:
    block = {
        "widths": {"a": 1, "b": 2},
        "growths": [{"at_step": 1, "widths": {"b": 4}}, {"at_step": 2, "widths": {"b": 8, "c": 3}}],
        "seed": 7,
    }
    config = {"optimizer": {}, "sparkling": block}
    assert as_variant(config, Variant.GROWN) == config
    scratch = as_variant(config, Variant.FROM_SCRATCH)
    assert scratch == {"optimizer": {}, "sparkling": {"widths": {"a": 1, "b": 8, "c": 3}, "growths": [], "seed": 7}}
    narrow = as_variant(config, Variant.NEVER_GROWN)
    assert narrow == {"optimizer": {}, "sparkling": {"widths": {"a": 1, "b": 2}, "growths": [], "seed": 7}}
    assert len(block["growths"]) == 2  # type: ignore[arg-type]
    assert as_variant({}, Variant.GROWN) == {}
    with pytest.raises(ConfigError, match="nothing can be from-scratch"):
        as_variant({}, Variant.FROM_SCRATCH)


def test_the_narrow_model_trained_longer_has_a_schedule_of_its_own(config: Path) -> None:
    """Twice the steps, as a model of three times the active parameters takes in half of them and half of another."""
    data = read_json(config)
    before = data["scheduler"]["params"] | {"total_num_steps": 4, "warmup_num_steps": 2}
    data["scheduler"]["params"] = before
    longer = as_variant(data, Variant.NARROW_LONGER)
    steps = longer["training"]["steps"]
    assert steps == equal_steps(data) > 4
    after = longer["scheduler"]["params"]
    assert (after["total_num_steps"], after["warmup_num_steps"]) == (steps, round(2 * steps / 4))
    assert {**after, "total_num_steps": 4, "warmup_num_steps": 2} == before
    assert longer["sparkling"]["growths"] == []
    assert (data["training"]["steps"], before["total_num_steps"]) == (4, 4)  # the config itself stays
    constant = as_variant({key: value for key, value in data.items() if key != "scheduler"}, Variant.NARROW_LONGER)
    assert "scheduler" not in constant
    assert constant["training"]["steps"] == steps


def test_the_losses_are_drawn_with_their_growth_and_their_names() -> None:
    points = [(0, 0.0, 5.0), (50, 3.0, 2.0), (50, 3.0, 2.0), (50, 3.0, 2.1), (100, 9.0, 1.5)]
    grown = RunSummary(
        variant="grown",
        validation_loss=1.5,
        steps=4,
        tokens=100,
        flops=9.0,
        seconds=0.5,
        parameters=10,
        active_parameters=5,
        validations=points,
    )
    narrow = RunSummary(
        variant="never-grown",
        validation_loss=1.8,
        steps=4,
        tokens=100,
        flops=6.0,
        seconds=0.5,
        parameters=10,
        active_parameters=5,
        validations=[(50, 3.0, 2.0), (100, 6.0, 1.8)],
    )
    by_tokens, by_compute = loss_picture({Variant.GROWN: grown, Variant.NEVER_GROWN: narrow}).axes
    legend = by_tokens.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["grown: 1.5000", "never-grown: 1.8000"]
    assert (by_tokens.get_xlabel(), by_compute.get_xlabel()) == ("tokens [M]", "training compute [TFLOPs]")
    for axes in (by_tokens, by_compute):
        (note,) = (text.get_text() for text in axes.texts)
        assert note == "growth\nbefore 2.0000\nafter 2.1000"
    assert by_tokens.get_ylim()[1] < 3  # the beginning isn't shown


def test_a_summary_is_whole_or_not_there(tmp_path: Path) -> None:
    summary = RunSummary(
        variant="grown",
        validation_loss=1.25,
        steps=4,
        tokens=100,
        flops=6e6,
        seconds=0.5,
        parameters=10,
        active_parameters=5,
    )
    whole = replace(summary, validations=[(0, 0.0, 5.5), (100, 6e6, 1.25)])
    assert read_summary(tmp_path) is None
    whole.write(tmp_path)
    assert read_summary(tmp_path) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    with pytest.raises(SparklingError, match="can't be written"):
        summary.write(tmp_path / "absent")
    first_version = {key: value for key, value in asdict(summary).items() if key != "validations"}
    (tmp_path / "summary.json").write_text(json.dumps(first_version))
    assert read_summary(tmp_path) == summary
    for damaged in ("{", "[]", '{"variant": 1}'):
        (tmp_path / "summary.json").write_text(damaged)
        with pytest.raises(SparklingError, match=r"summary\.json"):
            read_summary(tmp_path)


@pytest.mark.parametrize(
    ("given", "program"),
    [
        ([], "python -m ds_sparkling.cli train"),
        (["--output", "a b"], "python -m ds_sparkling.cli train"),
        (["--data", "x", "--compare", "--output", "a b"], "python -m ds_sparkling.cli compare"),
    ],
)
def test_what_the_quickstart_starts(tmp_path: Path, given: list[str], program: str) -> None:
    (tmp_path / "quickstart.sh").write_text((ROOT / "tools" / "quickstart.sh").read_text())
    stub = 'set -euo pipefail\nstart() { printf "%s|" "$@"; exit; }\nexec() { start "$@"; }\n'
    (tmp_path / "environment.sh").write_text(stub)
    done = subprocess.run(["bash", str(tmp_path / "quickstart.sh"), *given], capture_output=True, text=True, check=True)
    others = [argument for argument in given if argument != "--compare"]
    expected = [*program.split(), "--deepspeed_config", "configs/quickstart.json", *others]
    assert done.stdout.rstrip("|").split("|") == expected
