"""The main job from a user's hand: launcher, growth, table, TensorBoard, stop and resume."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distributed import Workers
from ds_sparkling.discovery.build import build_on_meta
from ds_sparkling.discovery.reading import probe
from ds_sparkling.errors import CheckpointError, ConfigError, SparklingError
from ds_sparkling.growth import make_plan
from ds_sparkling.job import main_job
from ds_sparkling.job.command import job_parser
from ds_sparkling.models.olmoe import OlmoeConfig, OlmoeForCausalLM
from ds_sparkling.models.text import Corpus
from ds_sparkling.spec.config import read_json, sparkling_config
from launching import Launch

Pool = Callable[[int], Workers]
ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.json"))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's config, much shorter."""
    data: dict[str, Any] = read_json(ROOT / "configs" / "quickstart.json")
    data["model"] |= {"hidden_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 8}
    data["training"] |= {"steps": 8, "sequence_length": 32, "evaluate_every": 2, "evaluate_batches": 2}
    data["training"] |= {"save_every": 2, "log_every": 1}
    data["sparkling"]["log_every"] = data["sparkling"]["diagnose_every"] = 1
    data["sparkling"]["growths"] = [{"at_step": 4, "widths": {"hidden_size": 32, "moe_intermediate_size": 16}}]
    path = tmp_path_factory.mktemp("config") / "short.json"
    path.write_text(json.dumps(data))
    return path


@pytest.fixture(scope="module")
def finished(
    config: Path, launch: Launch, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    output = tmp_path_factory.mktemp("run")
    return output, launch("ds_sparkling/train.py", "--deepspeed_config", str(config), "--output", str(output))


def again(*arguments: str) -> tuple[str, str]:
    """What the job prints on a rank that outlives it, and its error."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        try:
            main_job.run(job_parser("train").parse_args(arguments))
        except SparklingError as error:
            return printed.getvalue(), str(error)
    return printed.getvalue(), ""


def table(text: str) -> list[str]:
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("validation loss"))
    return lines[start : start + 7]


def test_the_job_trains_grows_and_reports(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    output, run = finished
    assert run.returncode == 0, run.stderr[-3000:]
    before, after, end = (line.split()[-1] for line in table(run.stdout)[1:4])
    assert before == after
    assert float(end) < float(before)
    assert f"tensorboard --logdir {output}" in run.stdout
    assert "hidden_size 16 -> 32" in run.stderr
    assert "8/8" in run.stderr


def test_tensorboard_shows_the_run(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    output, _ = finished
    steps: dict[str, list[int]] = {}
    last: dict[str, float] = {}
    for file in sorted((output / "tensorboard").glob("events*")):
        events = EventAccumulator(str(file))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            steps.setdefault(tag, []).extend(event.step for event in events.Scalars(tag))
            last[tag] = events.Scalars(tag)[-1].value
    samples = [16 * step for step in range(1, 9)]
    for tag in ("Train/loss", "Train/Samples/train_loss", "Train/grad_norm", "Train/Samples/lr"):
        assert steps[tag] == samples
    assert steps["Growth/number"] == steps["Growth/parameters"] == [*samples[:4], 64, *samples[4:]]  # a staircase
    assert all(len(points) > 1 for points in steps.values())  # no card of one dot
    assert {"Train/tokens", "Train/compute_flops", "Validation/loss"} <= steps.keys()
    for tag in ("activation_ratio/layers.0", "router/entropy/layers.0", "router/load_max/layers.0"):
        assert steps[tag] == samples
    curves = ("lr/old", "lr/new", "lr/birth_0", "lr/birth_1", "update_rms/old", "update_rms/new")
    for tag in (*curves, "twins/cosine", "twins/gradient_cosine", "activation_drift/layers.0"):
        assert steps[tag] == [sample for sample in samples if sample > 64]
    for name, losses in (("train_loss", "Train/Samples/train_loss"), ("validation_loss", "Validation/loss")):
        tag = f"By_compute/{name}"
        assert len(steps[tag]) == len(steps[losses])
        assert last[tag] == last[losses]
        assert steps[tag][-1] == int(last["Train/compute_flops"] / 1e9)
    assert (last["lr/old"], last["lr/new"]) == (last["lr/birth_0"], last["lr/birth_1"])
    assert last["lr/new"] > last["lr/old"] > 0
    assert last["update_rms/new"] > 0
    assert 0 < last["twins/cosine"] < 1


def test_resume_ends_like_the_run_that_never_stopped(
    config: Path, workers: Pool, finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    output, run = finished
    for tag in ("global_step2", "global_step6"):
        stopped = tmp_path / tag
        shutil.copytree(output / "checkpoints" / tag, stopped / "checkpoints" / tag)
        (stopped / "checkpoints" / "latest").write_text(tag)
        arguments = "--deepspeed_config", str(config), "--output", str(stopped), "--resume"
        printed, error = workers(2).run(again, *arguments)[0]
        assert not error
        assert table(printed) == table(run.stdout)


def test_a_finished_run_that_is_given_more_steps_ends_anew(
    config: Path, workers: Pool, finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    output, run = finished
    more = read_json(config)
    more["training"]["steps"] = 9
    (tmp_path / "more.json").write_text(json.dumps(more))
    (tmp_path / "checkpoints").mkdir()
    shutil.copytree(output / "checkpoints" / "global_step8", tmp_path / "checkpoints" / "global_step8")
    (tmp_path / "checkpoints" / "latest").write_text("global_step8")
    arguments = "--deepspeed_config", str(tmp_path / "more.json"), "--output", str(tmp_path), "--resume"
    printed, error = workers(2).run(again, *arguments)[0]
    assert not error
    assert table(printed)[:3] == table(run.stdout)[:3]
    (name, step, loss), (_, _, earlier) = (row.split() for row in (table(printed)[3], table(run.stdout)[3]))
    assert (name, step) == ("end", "9")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 9
    assert f"{summary['validation_loss']:.4f}" == loss != earlier
    assert (tmp_path / "checkpoints" / "latest").read_text() == "global_step9"


def test_a_finished_run_is_not_overwritten(
    config: Path, workers: Pool, finished: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    output, _ = finished
    for _, error in workers(2).run(again, "--deepspeed_config", str(config), "--output", str(output)):
        assert "pass --resume to go on, or another --output" in error


def test_what_a_user_can_mend_is_a_line_and_a_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: object) -> None:
        raise CheckpointError("no checkpoint")

    monkeypatch.setattr(main_job, "run", fails)
    monkeypatch.setattr("deepspeed.init_distributed", lambda: None)
    monkeypatch.setattr(main_job.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(main_job.dist, "destroy_process_group", lambda: None)
    with pytest.raises(SystemExit) as ended:
        main_job.train(job_parser("train").parse_args(["--deepspeed_config", "c.json"]))
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: no checkpoint\n"


def test_help() -> None:
    command = [sys.executable, str(ROOT / "ds_sparkling" / "train.py"), "--help"]
    text = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    for option in ("--deepspeed_config", "--data", "--output", "--resume", "--variant"):
        assert option in text


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_can_be_planned(path: Path) -> None:
    data = read_json(path)
    model_config = OlmoeConfig.from_dict(data["model"], "model")
    block = sparkling_config(data)

    def build_model(**widths: int) -> OlmoeForCausalLM:
        return OlmoeForCausalLM(OlmoeConfig(**{**vars(model_config), **widths}))

    widths = {"hidden_size": model_config.hidden_size, "moe_intermediate_size": model_config.moe_intermediate_size}
    shapes = {name: tuple(param.shape) for name, param in build_on_meta(build_model, widths).named_parameters()}
    for stage in block.growths:
        make_plan(shapes, probe(build_model, widths), widths, stage.widths, block.strategy, number=1)
    steps = data["training"]["steps"]
    assert data["scheduler"]["params"]["total_num_steps"] == steps
    assert data["scheduler"]["params"]["warmup_num_steps"] == pytest.approx(0.03 * steps, abs=1)
    assert block.growths[0].at_step == steps // 2


# -- data -------------------------------------------------------------------------------------------------------


def test_batches_depend_on_the_step_alone_and_split_over_ranks(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(bytes(range(256)) * 20)
    corpus = Corpus.from_path(tmp_path / "text")
    whole = corpus.batch(5, size=8, length=16, seed=1, rank=0, ranks=1)["input_ids"]
    parts = [corpus.batch(5, size=8, length=16, seed=1, rank=rank, ranks=4) for rank in range(4)]
    assert [row for part in parts for row in part["input_ids"].tolist()] == whole.tolist()
    assert (parts[0]["labels"][:, :-1] == parts[0]["input_ids"][:, 1:]).all()
    assert corpus.batch(6, size=8, length=16, seed=1, rank=0, ranks=1)["input_ids"].tolist() != whole.tolist()


def test_training_and_validation_text_do_not_overlap(tmp_path: Path) -> None:
    for number in range(41):
        (tmp_path / f"{number:02}.txt").write_bytes(bytes([number]) * 50)
    corpus = Corpus.from_path(tmp_path)
    assert set(corpus.validation.tolist()) == {0, 20, 40}
    assert set(corpus.train.tolist()).isdisjoint({0, 20, 40})


def test_token_files(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.arange(4000, dtype=np.uint16))
    corpus = Corpus.from_path(tmp_path / "tokens.npy")
    assert corpus.validation.tolist() == list(range(3800, 4000))
    with pytest.raises(ConfigError, match=r"token 3999 exceeds the model's vocab_size 256"):
        corpus.check(length=16, vocabulary=256)
    np.save(tmp_path / "float.npy", np.zeros(10))
    with pytest.raises(ConfigError, match=r"float\.npy must hold a 1-D array of an unsigned type"):
        Corpus.from_path(tmp_path / "float.npy")


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"too short")
    with pytest.raises(ConfigError, match="too few for windows of 64"):
        Corpus.from_path(tmp_path / "short").check(length=64, vocabulary=256)
    with pytest.raises(ConfigError, match="doesn't exist"):
        Corpus.from_path(tmp_path / "absent")


def test_the_embedded_corpus_is_there() -> None:
    corpus = Corpus.standard_library()
    assert len(corpus.train) > 2_000_000
    assert len(corpus.validation) > 100_000
