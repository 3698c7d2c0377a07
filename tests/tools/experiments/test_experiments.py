"""The command end to end at its smallest scale, and what it does when it is stopped, or something fails."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from ds_sparkling.errors import GrowthError, SparklingError
from ds_sparkling.models.text import Corpus
from experiments import queue
from experiments.catalogue import AXES, EXPERIMENTS, Lab
from experiments.command import main, wanted_runs
from experiments.runs import Outcome, Point, TrainingRun
from experiments.scales import SCALES
from experiments.store import Store

CORPUS = Corpus.standard_library().fingerprint


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes for two experiments that share runs."""
    root = tmp_path_factory.mktemp("reproduce")
    main(arguments(root, "state", "savings"))
    return root


def arguments(root: Path, *more: str) -> list[str]:
    return [*more, "--scale", "tiny", "--output", str(root / "out"), "--snapshots", str(root / "snapshots")]


def saved(page: str, variant: str) -> int:
    """Percentage of the reference's compute that the page says a variant needs more."""
    section = page.split("## Compute and time saved")[1]
    line = next(line for line in section.splitlines() if line.startswith(f"| {variant} |"))
    return int(line.split("|")[-3].split("(")[1].split("%")[0])


def test_two_experiments_come_out_whole(results: Path) -> None:
    tiny = results / "out/tiny"
    store = Store(tiny / "runs.jsonl", CORPUS)
    lab = Lab(SCALES["tiny"], "", 1, store.outcomes)
    needed = {run.key for run in wanted_runs([EXPERIMENTS["state"], EXPERIMENTS["savings"]], lab)}
    # 5 treatments of state, 3 sweeps of 3 rates or more, and 3 grown runs.
    assert len(needed) == 8 + sum(len(lab.sweep(lab.scratch(axis))) for axis in AXES) >= 17
    assert needed <= store.outcomes.keys()
    page = (tiny / "README.md").read_text()
    assert "| **asymmetric_reset** | 1/1 |" in page
    assert "which proves nothing" in page
    assert saved(page, "hidden: SPARKLING") == pytest.approx(-24, abs=3)
    assert "not run: `python tools/reproduce.py muon`" in page
    for name in ("state", "savings"):
        assert (tiny / f"{name}.csv").read_text().count("\n") >= 6
        assert (tiny / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tiny.glob(".*.part"))


def test_a_second_call_trains_nothing(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (results / "out/tiny/runs.jsonl").read_bytes()
    main(arguments(results, "state"))
    assert (results / "out/tiny/runs.jsonl").read_bytes() == before
    assert "runs are finished; the results are in" in capsys.readouterr().out


def test_a_run_that_was_cut_off_while_it_was_written_is_run_again(results: Path, tmp_path: Path) -> None:
    whole = (results / "out/tiny/runs.jsonl").read_text()
    path = tmp_path / "runs.jsonl"
    path.write_text(whole[:-20])
    assert len(Store(path, CORPUS).outcomes) == whole.count("\n") - 1
    assert path.read_text() == whole[:-20]  # who only reads leaves it
    store = Store(path, CORPUS, adding=True)
    assert len(store.outcomes) == whole.count("\n") - 1
    with pytest.raises(SparklingError, match="another process is adding runs to"):
        Store(path, CORPUS, adding=True)
    store.close()
    assert path.read_text() == whole[: whole[:-1].rindex("\n") + 1]
    path.write_text("{}\n" + whole)
    with pytest.raises(SparklingError, match=r"runs.jsonl, line 1, isn't a finished run"):
        Store(path, CORPUS)
    path.write_text(whole)
    with pytest.raises(SparklingError, match=r"runs on another text .*, this is 0123\), .* another --output DIR"):
        Store(path, "0123")


def test_a_run_that_fails_is_told_and_keeps_no_other_from_finishing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, where the training can be made to fail."""

    def train(run: TrainingRun, snapshots: Path, keep: tuple[int, ...], wanted: bool) -> Outcome:
        if run.lr > SCALES["tiny"].lr:
            raise GrowthError("the loss isn't finite") if run.seed else RuntimeError("disk full")
        return Outcome(run.lr, 1.0, 1.0)

    monkeypatch.setattr(queue, "_train", train)
    monkeypatch.setattr(queue, "ProcessPoolExecutor", InProcess)
    runner = queue.Queue(Store(tmp_path / "runs.jsonl", CORPUS, adding=True), tmp_path / "snapshots", jobs=2)
    lab = Lab(SCALES["tiny"], "", 1, runner.store.outcomes)
    runs = [lab.scratch("inner").at_rate(factor) for factor in SCALES["tiny"].lr_factors]
    runner.finish(lambda: [*runs, replace(runs[-1], seed=1)])
    runner.store.close()
    assert sorted(runner.failures.values()) == ["RuntimeError('disk full')", "the loss isn't finite"]
    assert sorted(outcome.loss for outcome in runner.store.outcomes.values()) == [run.lr for run in runs[:2]]
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert {json.loads(line)["key"] for line in lines} == {run.key for run in runs[:2]}


class InProcess(ThreadPoolExecutor):
    """Like a pool of processes, without them."""

    def __init__(self, jobs: int, *_: object, **__: object) -> None:
        super().__init__(jobs)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (["stat"], "there is no experiment 'stat'; known: init, state"),
        (["--seeds", "0"], "argument --seeds: must be positive, got 0"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(wrong)
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("scale", SCALES)
def test_claims_and_references_name_lines_that_there_are(name: str, scale: str) -> None:
    """With every run finished, so that all lines are known."""

    class Finished(dict[str, Outcome]):
        def get(self, key: str, default: object = None) -> Outcome:
            return Outcome(1.0, 1.0, 1.0, before=1.0, after=1.0, curve=(Point(1, 1.0, 1.0),))

        def __getitem__(self, key: str) -> Outcome:
            return self.get(key)

    lab = Lab(SCALES[scale], "", 3, Finished())
    variants = list(EXPERIMENTS[name].variants(lab))
    names = [variant.name for variant in variants]
    assert len(set(names)) == len(names)
    for variant in variants:
        assert variant.reference in ("", *names)
        assert variant.run.config.strategy
    for claim in EXPERIMENTS[name].claims:
        assert {claim.better, claim.worse} <= set(names)
