"""Means, intervals and verdicts, counted by hand."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.catalogue import CANDIDATES, Claim, Contender, Experiment, Lab
from experiments.loop import active_parameters
from experiments.page import write_page
from experiments.results import Estimate, fullest_table, table_of
from experiments.runs import Outcome, Point, Stage
from experiments.scales import SCALES


def test_an_interval_is_students() -> None:
    estimate = Estimate.of([1.0, 2.0, 6.0])
    assert estimate is not None
    assert estimate.mean == 3.0
    assert estimate.half == pytest.approx(4.303 * math.sqrt(7.0 / 3.0), rel=1e-3)
    assert Estimate.of([]) is None
    assert Estimate.of([0.5]) == Estimate(0.5, None, 1)
    for count, t in ((16, 2.131), (18, 2.110), (32, 2.040), (100, 1.984)):
        many = Estimate.of([0.0, 1.0] * (count // 2))
        assert many is not None
        assert many.half == pytest.approx(t * math.sqrt(0.25 / (count - 1)), rel=1e-3)
    diverged = Estimate.of([math.inf, -math.inf, 1.0])
    assert diverged is not None
    assert math.isnan(diverged.mean)


def lab_of(losses: dict[str, list[float | None]]) -> tuple[Experiment, Lab]:
    """An experiment with these losses by seed; runs differ in their rate alone."""
    base = SCALES["tiny"].base("")
    runs = {name: replace(base, lr=number + 1.0) for number, name in enumerate(losses)}
    first = next(iter(losses))

    def variants(_: Lab) -> Iterator[Contender]:
        for name, run in runs.items():
            yield Contender(name, run, "" if name == first else first)

    claims = tuple(Claim(first, name) for name in losses if name != first)
    outcomes = {
        replace(runs[name], seed=seed).key: Outcome(loss, 1e9, 2.0, before=1.0, after=1.25, curve=(Point(1, 1.0, 1.0),))
        for name, values in losses.items()
        for seed, loss in enumerate(values)
        if loss is not None
    }
    return Experiment("e", "E", "Fig. 0", "?", variants, claims), Lab(
        SCALES["tiny"], "", len(next(iter(losses.values()))), outcomes
    )


def test_differences_are_paired_by_seed() -> None:
    """The spread between seeds is far larger than the difference, which is the same for each."""
    experiment, lab = lab_of({"ours": [1.0, 2.0, 3.0], "theirs": [1.1, 2.1, 3.1], "late": [None, 1.5, 2.5]})
    table = table_of(experiment, lab)
    ours, theirs, late = table.rows
    assert (ours.difference, ours.mean("jump")) == (None, 0.25)
    assert ours.loss is not None
    assert ours.loss.half is not None
    assert ours.loss.half > 2
    assert theirs.difference is not None
    assert theirs.difference.mean == pytest.approx(0.1)
    assert theirs.difference.half == pytest.approx(0.0, abs=1e-12)
    assert late.difference is not None
    assert late.difference.count == 2
    assert late.difference.mean == pytest.approx(-0.5)
    assert [verdict.text for verdict in table.verdicts] == ["holds", "does NOT hold: the other way round"]
    assert not table.finished


def test_the_best_learning_rate_is_that_of_the_lowest_mean() -> None:
    """Not of the lowest single run, nor of one that diverged with some seed; none before all are there."""
    base = SCALES["tiny"].base("")
    outcomes: dict[str, Outcome] = {}
    lab = Lab(SCALES["tiny"], "", 2, outcomes)
    losses = ([1.3, 1.3], [1.25, 1.25], [1.0, math.inf])
    for factor, values in zip(lab.sweep(base), losses, strict=True):
        for seed, loss in enumerate(values):
            assert lab.tuned(base) is None
            outcomes[replace(base.at_rate(factor), seed=seed).key] = Outcome(loss, 1.0, 1.0)
    assert lab.tuned(base) == base.at_rate(1.0)


def test_a_sweep_goes_on_beyond_its_end_while_that_is_the_best() -> None:
    base = replace(SCALES["tiny"].base(""), optimizer="muon")
    outcomes: dict[str, Outcome] = {}
    lab = Lab(SCALES["tiny"], "", 1, outcomes)

    def finish(**losses: float) -> list[float]:
        for factor, loss in losses.items():
            outcomes[base.at_rate(float(factor[1:].replace("_", "."))).key] = Outcome(loss, 1.0, 1.0)
        return list(lab.sweep(base))

    assert finish(x0_5=1.0, x1=1.1) == [0.5, 1.0, 2.0]
    assert finish(x2=1.2) == [0.35, 0.5, 1.0, 2.0]
    assert lab.tuned(base) is None
    assert finish(x0_35=0.9) == [0.25, 0.35, 0.5, 1.0, 2.0]
    assert finish(x0_25=0.95) == [0.25, 0.35, 0.5, 1.0, 2.0]
    assert lab.tuned(base) == replace(base, lr=base.lr * 0.35, muon_lr=0.02 * 0.35)
    assert finish(x0_25=0.8, x0_18=0.7, x0_13=0.6, x0_092=0.5)[:2] == [0.13, 0.18]  # four times, and no more
    assert finish(x2=0.1, x2_8=0.2)[-2:] == [2.0, 2.8]


@pytest.mark.parametrize(
    ("theirs", "text"),
    [
        ([1.2, 1.9, 3.1], "not resolved: the interval includes zero"),
        ([1.2, None, None], "as claimed on one seed, which proves nothing"),
        ([0.9, None, None], "the other way round on one seed, which proves nothing"),
        ([None, None, None], "not run"),
    ],
)
def test_a_verdict_says_no_more_than_the_numbers(theirs: list[float | None], text: str) -> None:
    experiment, lab = lab_of({"ours": [1.0, 2.0, 3.0], "theirs": theirs})
    (verdict,) = table_of(experiment, lab).verdicts
    assert verdict.text == text


def test_the_csv_has_a_line_per_run(tmp_path: Path) -> None:
    experiment, lab = lab_of({"ours": [1.0, 2.0], "theirs": [1.5, None]})
    table_of(experiment, lab).write_csv(tmp_path / "e.csv")
    rows = list(csv.DictReader((tmp_path / "e.csv").open()))
    assert [(row["variant"], row["seed"], row["loss"]) for row in rows] == [
        ("ours", "0", "1"),
        ("ours", "1", "2"),
        ("theirs", "0", "1.5"),
    ]
    assert list(tmp_path.iterdir()) == [tmp_path / "e.csv"]


def test_a_run_that_diverged_is_told_and_does_no_harm(tmp_path: Path) -> None:
    experiment, lab = lab_of({"ours": [1.0, 2.0], "theirs": [1.1, math.inf]})
    table = table_of(replace(experiment, by_compute=True), lab)
    ours, theirs = table.rows
    assert (ours.finite, theirs.finite) == (True, False)
    assert [verdict.text for verdict in table.verdicts] == ["a run diverged"]
    page = write_page(tmp_path, SCALES["tiny"], [table]).read_text()
    assert "| theirs | 2/2 | inf | +inf |" in page
    assert Outcome(math.inf, 1.0, 1.0, before=math.nan, curve=(Point(1, 1.0, math.nan),)).shock is None


def test_an_ordering_that_two_experiments_share_counts_once(tmp_path: Path) -> None:
    experiment, lab = lab_of({"ours": [1.0, 2.0], "theirs": [1.1, 2.1], "others'": [1.2, 2.2]})
    once, again = table_of(experiment, lab), table_of(replace(experiment, name="again", title="Again"), lab)
    page = write_page(tmp_path, SCALES["tiny"], [once, again]).read_text()
    assert "| [Again](#again) | Fig. 0 | 2 | 0 | 0 |" in page
    assert "| all, each once | the paper | 2 | 0 | 0 |" in page


def test_a_table_has_all_seeds_that_all_its_variants_have() -> None:
    experiment, lab = lab_of({"ours": [1.0, 2.0, 3.0, 4.0], "theirs": [1.1, 2.1, 3.1, None]})
    assert [fullest_table(experiment, lab.with_seeds(seeds)).seeds for seeds in (1, 2, 3, 4)] == [3, 3, 3, 4]


@pytest.mark.parametrize(
    ("name", "candidate"), [("parting", "perturbation 1, ratio 3"), ("decaying", "ratio 3, decaying")]
)
def test_what_is_offered_is_what_was_compared(name: str, candidate: str) -> None:
    lab = Lab(SCALES["small"], "", 1, {})
    offered = lab.grown("inner", lab.recipe(name))
    assert offered == lab.grown("inner", lab.recipe("sparkling", **CANDIDATES[candidate]))
    assert offered.config.strategy.rewarmup.decay_steps == (960 if name == "decaying" else None)


def test_what_changes_nothing_makes_no_other_run() -> None:
    lab = Lab(SCALES["tiny"], "", 1, {})
    plain, odd = (
        lab.grown("inner", {"rewarmup": {"scope": "none", **more}}) for more in ({}, {"steps": 7, "ratio": 2})
    )
    assert plain.key == odd.key == replace(plain, data="elsewhere").key
    assert plain.key != lab.grown("inner", {"rewarmup": {"steps": 7}}).key
    assert lab.narrow.key != lab.narrow.at_rate(2.0).key


def test_only_a_sweep_is_there_yet(tmp_path: Path) -> None:
    def swept(lab: Lab) -> Iterator[Contender]:
        yield Contender("best", replace(lab.narrow, lr=2.0))
        yield Contender("best, lr x1", replace(lab.narrow, lr=1.0), swept=True)

    lab = Lab(SCALES["tiny"], "", 1, {})
    outcome = Outcome(1.0, 1.0, 1.0, curve=(Point(1, 1.0, 1.0),))
    lab = Lab(SCALES["tiny"], "", 1, {replace(lab.narrow, lr=1.0).key: outcome})
    table = table_of(Experiment("e", "E", "Fig. 0", "?", swept, by_compute=True), lab)
    assert "| best, lr x1 | 1/1 | 1.0000 |" in write_page(tmp_path, SCALES["tiny"], [table]).read_text()


def test_a_dearer_run_is_looked_at_where_it_had_spent_as_much(tmp_path: Path) -> None:
    narrow = SCALES["tiny"].base("")
    first, second = (replace(narrow, stages=(Stage(step, narrow.widths),)) for step in (1, 2))
    long, short = (replace(narrow, lr=lr) for lr in (1.0, 2.0))

    def variants(_lab: Lab) -> Iterator[Contender]:
        yield Contender("grown", first)
        yield Contender("grown later", second, "grown")
        yield Contender("short", short, "grown")
        yield Contender("long", long, "grown")

    outcomes = {
        first.key: Outcome(1.5, 6.0, 1.0, curve=(Point(1, 1.0, 3.0), Point(6, 6.0, 1.5))),
        second.key: Outcome(1.4, 7.0, 1.0, curve=(Point(1, 1.0, 3.0), Point(7, 7.0, 1.4))),
        short.key: Outcome(1.6, 6.0, 1.0, curve=(Point(1, 1.0, 3.0), Point(6, 6.0, 1.6))),
        long.key: Outcome(1.0, 9.0, 1.0, curve=(Point(5, 5.0, 2.0), Point(9, 9.0, 1.0))),
    }
    table = table_of(Experiment("e", "E", "", "?", variants, by_compute=True), Lab(SCALES["tiny"], "", 1, outcomes))
    page = write_page(tmp_path, SCALES["tiny"], [table]).read_text()
    assert (
        "From where long stood when it had spent as much compute (after 40 of 60 steps, the learning rate at 27% of "
        "its peak, or after 47 of 60 steps, the learning rate at 13% of its peak), others end at" in page
    )
    assert "others end at: grown -0.2500, grown later -0.1000 (" in page
    assert "From where short" not in page
    assert outcomes[long.key].loss_at(9.5) is None


def test_a_control_takes_the_compute_of_the_grown_run() -> None:
    lab = Lab(SCALES["tiny"], "", 1, {})
    grown, scratch = lab.grown("joint", {}), lab.scratch("joint")
    narrow, wide = (active_parameters(run.shape, dict(run.widths)) for run in (grown, scratch))
    assert lab.at_compute_of(grown, scratch).steps == round((30 * narrow + 30 * wide) / wide)
    twice = replace(grown, stages=(replace(grown.stages[0], at_step=10), *lab.grown("joint", {}, factor=2).stages))
    assert lab.at_compute_of(twice, scratch).steps == round((10 * narrow + 50 * wide) / wide)
    assert lab.at_compute_of(grown, lab.narrow).steps == round((30 * narrow + 30 * wide) / narrow)
