"""The verdict says what the curves show, with its figures, and no more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import event_files
from ds_sparkling.report.events import ReadRun, TagCurve, read_run
from ds_sparkling.report.facts import scatter
from ds_sparkling.report.verdict import Finding, Kind, headline, shortlist, verdict
from event_files import SAMPLES, STEPS, Point


def the_one(findings: list[Finding], text: str) -> Finding:
    found = [finding for finding in findings if text in finding.text]
    assert len(found) == 1, [finding.text for finding in findings]
    return found[0]


@pytest.fixture
def grown(tmp_path: Path) -> ReadRun:
    event_files.grown(tmp_path / "grown", event_files.job(), event_files.diagnosis())
    return read_run(tmp_path / "grown", "grown")


@pytest.fixture
def scratch(tmp_path: Path) -> ReadRun:
    event_files.from_scratch(tmp_path / "scratch", shift=0.05)
    return read_run(tmp_path / "scratch", "scratch")


def noisy(path: Path, name: str, shift: float, amplitude: float) -> ReadRun:
    """A run whose validations scatter about a parabola."""
    signs = (1, -1, -1, 1, 1, -1, 1, -1, -1, 1)
    points = []
    for step, sign in zip(range(10, STEPS + 1, 10), signs, strict=True):
        loss = 1.0 + ((STEPS - step) / STEPS) ** 2 + shift + amplitude * sign
        points += [Point("Validation/loss", SAMPLES * step, loss), *event_files.spent(step, None)]
    event_files.write(path / name, points)
    return read_run(path / name, name)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_run_that_diverged_neither_wins_nor_is_compared(
    tmp_path: Path, grown: ReadRun, scratch: ReadRun, loss: float
) -> None:
    event_files.write(tmp_path / "broken", [Point("Validation/loss", SAMPLES * STEPS, loss)])
    broken = read_run(tmp_path / "broken", "broken")
    findings = verdict([broken, grown, scratch])
    assert the_one(findings, "broken").text == f"broken has diverged: its last validation loss is {loss}."
    assert findings[1].text.startswith("grown ends lowest")
    assert verdict([broken])[0].kind is Kind.WATCH


def test_which_ends_lowest_and_by_how_much(grown: ReadRun, scratch: ReadRun) -> None:
    findings = verdict([scratch, grown])
    assert findings[0].text.startswith("grown ends lowest: validation loss 1.1427 after 204,800 tokens and 2.458e+09")
    against = the_one(findings, "scratch ends 0.0500 higher, at 1.1927")
    assert "1.50 of the compute of grown" in against.text
    assert "beyond noise" in against.text
    assert "number of tokens" not in against.text
    assert "other seeds" in the_one(findings, "Noise here is").text


def test_the_same_compute_is_between_two_validations(grown: ReadRun, scratch: ReadRun) -> None:
    """The wide run has spent what the grown one spent in all, after two thirds of the steps."""
    at = np.interp(STEPS * 2 / 3, [60, 70], [event_files.loss_at(60), event_files.loss_at(70)]) + 0.05
    findings = verdict([grown, scratch])
    text = the_one(findings, "At the compute that grown spent in all").text
    assert f"scratch stood at {at:.4f}: grown is {at - event_files.loss_at(STEPS):.4f} below it" in text
    assert "favours the one that had ended" in the_one(findings, "still on their way").text


def test_a_difference_within_noise_is_called_that(tmp_path: Path) -> None:
    runs = [noisy(tmp_path, "a", 0.0, 0.02), noisy(tmp_path, "b", 0.01, 0.02)]
    assert "within noise" in the_one(verdict(runs), "b ends 0.0100 higher").text
    runs = [noisy(tmp_path, "c", 0.0, 0.0005), noisy(tmp_path, "d", 0.01, 0.0005)]
    assert "beyond noise" in the_one(verdict(runs), "d ends 0.0100 higher").text


def test_a_smooth_curve_has_no_scatter_and_few_points_tell_none() -> None:
    x = np.arange(20.0)
    smooth = TagCurve(x, (x - 30) ** 2, np.zeros(20))
    assert scatter(smooth) == pytest.approx(0.0, abs=1e-9)
    assert scatter(TagCurve(x[:4], smooth.values[:4], np.zeros(4))) is None
    rng = np.random.default_rng(0)
    found = [scatter(TagCurve(x, smooth.values + rng.normal(0, 0.3, 20), np.zeros(20))) or 0.0 for _ in range(300)]
    assert np.sqrt(np.mean(np.square(found))) == pytest.approx(0.3, rel=0.1)


def test_too_few_validations_and_other_budgets_are_said(tmp_path: Path, grown: ReadRun) -> None:
    points = [Point("Validation/loss", SAMPLES * 50, 1.5), *event_files.spent(50, None)]
    event_files.write(tmp_path / "short", points)
    text = the_one(verdict([grown, read_run(tmp_path / "short", "short")]), "short ends 0").text
    assert "Too few validations" in text
    assert "not at the same number of tokens" in text


def test_a_run_without_validation_is_not_ranked(tmp_path: Path, grown: ReadRun) -> None:
    event_files.write(tmp_path / "train", [Point("Train/loss", 16, 0.1)])
    findings = verdict([grown, read_run(tmp_path / "train", "train")])
    assert the_one(findings, "train has no Validation/loss").kind is Kind.MISSING
    assert "grown ends at a validation loss of" in findings[1].text
    only = verdict([read_run(tmp_path / "train", "train")])
    assert [finding.kind for finding in only] == [Kind.MISSING]


@pytest.mark.parametrize(
    ("jump", "kind"), [(0.0, Kind.GOOD), (5e-4, Kind.GOOD), (0.08, Kind.WATCH), (-0.08, Kind.WATCH)]
)
def test_the_jump_at_the_growth(tmp_path: Path, jump: float, kind: Kind) -> None:
    event_files.grown(tmp_path, event_files.job(jump=jump))
    finding = the_one(verdict([read_run(tmp_path, "run")]), "the function")
    assert finding.kind is kind
    assert ("kept the function" in finding.text) == (kind is Kind.GOOD)


@pytest.mark.parametrize(("end", "text"), [(1.0, "it had come back 81,920 tokens"), (2.0, "hasn't come back")])
def test_a_rise_after_the_growth_that_is_no_jump(tmp_path: Path, end: float, text: str) -> None:
    """Validations at 60 to 100 steps: up, then down to ``end`` at 90 and 100."""
    first, second = event_files.job()
    rise = {60: 1.9, 70: 2.1, 80: 1.8, 90: end, 100: end}
    second = [
        p._replace(value=rise[p.samples // SAMPLES]) if p.tag == "Validation/loss" and p.samples > 800 else p
        for p in second
    ]
    event_files.grown(tmp_path, (first, second))
    findings = verdict([read_run(tmp_path, "run")])
    assert the_one(findings, "kept the function").kind is Kind.GOOD
    assert text in the_one(findings, f"rose by {2.1 - event_files.loss_at(50):.4f}, to 2.1000").text


def test_no_jump_is_read_off_where_none_was_measured(tmp_path: Path) -> None:
    first, second = event_files.job(jump=0.3)
    event_files.grown(tmp_path, (first, second[1:]))
    finding = the_one(verdict([read_run(tmp_path, "run")]), "the function")
    assert finding.kind is Kind.MISSING
    assert "can't be told" in finding.text


@pytest.mark.parametrize(("cosine", "text"), [(0.9, "twins have parted"), (0.999995, "twins are locked")])
def test_twins(tmp_path: Path, cosine: float, text: str) -> None:
    event_files.grown(tmp_path, event_files.diagnosis(twins=cosine))
    findings = verdict([read_run(tmp_path, "run")])
    found = the_one(findings, text)
    assert f"{cosine:.4f} in the end" in found.text
    gradients = the_one(findings, "twins get")
    assert ("gradients of their own" in gradients.text) == (cosine == 0.9)
    assert {found.kind, gradients.kind} == {Kind.GOOD if cosine == 0.9 else Kind.WATCH}


def test_twins_on_their_way_are_not_called_locked(tmp_path: Path) -> None:
    event_files.grown(tmp_path / "parting", event_files.diagnosis(twins=0.993))
    findings = verdict([read_run(tmp_path / "parting", "run")])
    assert the_one(findings, "twins are still parting").kind is Kind.PLAIN
    assert "gradients of their own" in the_one(findings, "twins get").text
    first, second = event_files.diagnosis(twins=0.993)
    stuck = [p._replace(value=min(p.value, 0.9931)) if p.tag.startswith("twins/") else p for p in second]
    event_files.grown(tmp_path / "stuck", (first, stuck))
    assert the_one(verdict([read_run(tmp_path / "stuck", "run")]), "twins are locked").kind is Kind.WATCH


def test_the_closest_of_many_pairs_is_told_and_no_alarm(tmp_path: Path) -> None:
    """The largest cosine of thousands is near 1 in any run: an expert that is seldom chosen has such pairs."""
    first, second = event_files.diagnosis()
    second = [p._replace(value=0.9999) if p.tag == "twins/cosine_max" else p for p in second]
    event_files.grown(tmp_path, (first, second))
    found = the_one(verdict([read_run(tmp_path, "run")]), "twins have parted")
    assert found.kind is Kind.GOOD
    assert "(closest pair 0.9999)" in found.text


@pytest.mark.parametrize(("rms", "kind"), [(1.0, Kind.GOOD), (1.03, Kind.GOOD), (0.5, Kind.WATCH)])
def test_activations(tmp_path: Path, rms: float, kind: Kind) -> None:
    event_files.grown(tmp_path, event_files.diagnosis(rms=rms))
    findings = verdict([read_run(tmp_path, "run")])
    found = the_one(findings, "the activations:")
    assert found.kind is kind
    assert f"became {rms:.3f} to {rms:.3f} times what it was" in found.text


def test_dead_experts(tmp_path: Path) -> None:
    event_files.grown(tmp_path / "dead", event_files.diagnosis(least_load=0.001))
    found = the_one(verdict([read_run(tmp_path / "dead", "run")]), "an expert is dead in layers.0, layers.1")
    assert found.kind is Kind.WATCH
    first, second = event_files.diagnosis()
    late = max(p.samples for p in second)
    second = [p._replace(value=0.0) if p.tag.startswith("router/load_min") and p.samples == late else p for p in second]
    event_files.grown(tmp_path / "once", (first, second))
    assert the_one(verdict([read_run(tmp_path / "once", "run")]), "not yet long enough to be dead").kind is Kind.PLAIN
    event_files.grown(tmp_path / "alive", event_files.diagnosis(least_load=0.4))
    assert "least load 0.40" in the_one(verdict([read_run(tmp_path / "alive", "run")]), "no expert is dead").text


def test_a_growth_that_was_elsewhere_is_not_denied(tmp_path: Path) -> None:
    first, second = event_files.diagnosis()
    whole = [p for p in (*first, *second) if not p.tag.startswith("Growth/")]
    event_files.write(tmp_path / "run", whole)
    run = read_run(tmp_path / "run", "run")
    assert the_one(verdict([run]), "has grown, but not while").kind is Kind.MISSING
    event_files.write(tmp_path / "narrow", first)
    assert not read_run(tmp_path / "narrow", "narrow").grown_elsewhere


def test_what_was_not_recorded_is_named_for_grown_runs_only(tmp_path: Path, scratch: ReadRun) -> None:
    event_files.grown(tmp_path / "bare", event_files.job())
    missing = [f.text for f in verdict([read_run(tmp_path / "bare", "bare"), scratch]) if f.kind is Kind.MISSING]
    assert len(missing) == 2
    assert "no twins/cosine" in missing[0]
    assert "activation RMS wasn't recorded" in missing[1]
    assert all(text.startswith("bare") for text in missing)


# -- what to buy ------------------------------------------------------------------------------------------------


def ended(path: Path, name: str, *, steps: int, shift: float, width: int) -> ReadRun:
    """A run that never grew, of ``steps`` steps of a model of ``width`` active parameters."""
    points = []
    for step in range(10, steps + 1, 10):
        points += [Point("Validation/loss", SAMPLES * step, event_files.loss_at(step * STEPS // steps) + shift)]
        points += [
            p._replace(value=p.value * width / event_files.WIDE) if "flops" in p.tag else p
            for p in event_files.spent(step, None, event_files.WIDE)
        ]
    event_files.write(path / name, points)
    return read_run(path / name, name)


def test_without_a_control_at_its_compute_growing_is_not_said_to_pay(grown: ReadRun, scratch: ReadRun) -> None:
    for runs in ([grown], [grown, scratch]):
        assert headline(runs) == (
            "grown reaches a validation loss of 1.1427 at 2.458e+09 FLOPs; no run that never grew ended there, so "
            "whether growing pays isn't shown."
        )
    found = the_one(verdict([grown, scratch]), "whether growing was its best use")
    assert found.lead
    assert "train the narrow model longer, to the same compute" in found.text


@pytest.mark.parametrize(("shift", "first"), [(0.1, "grown"), (-0.1, "longer")])
def test_the_narrow_model_trained_longer_decides(tmp_path: Path, grown: ReadRun, shift: float, first: str) -> None:
    """Twice the steps at a third of the final parameters: as much as half of the steps narrow and half of them wide."""
    longer = ended(tmp_path, "longer", steps=2 * STEPS, shift=shift, width=event_files.NARROW)
    second = {"grown": "longer", "longer": "grown"}[first]
    low = min(1.1427, 1.1427 + shift)
    assert headline([grown, longer]) == (
        f"At 2.458e+09 FLOPs buy {first}: validation loss {low:.4f}, 0.1000 below {second}."
    )
    found = the_one(verdict([grown, longer]), "At the same compute longer, which never grew,")
    assert "after 409,600 tokens and 2.458e+09 FLOPs, and grown at 1.1427 after 204,800 tokens" in found.text
    assert f"growing is 0.1000 {'lower' if shift > 0 else 'higher'}" in found.text
    assert not [f for f in verdict([grown, longer]) if "isn't shown" in f.text]


def test_what_noise_hides_is_not_bought(tmp_path: Path, grown: ReadRun) -> None:
    runs = [noisy(tmp_path, "a", 0.0, 0.02), noisy(tmp_path, "b", 0.01, 0.02)]
    assert headline(runs).startswith("At 1.229e+09 FLOPs a and b can't be told apart: validation losses ")


def test_a_headline_needs_a_loss_and_says_what_is_missing(tmp_path: Path) -> None:
    event_files.write(tmp_path / "train", [Point("Train/loss", 16, 0.1)])
    assert headline([read_run(tmp_path / "train", "train")]) == "No run has a validation loss to compare."
    event_files.write(tmp_path / "loss", [Point("Validation/loss", 16, 0.1)])
    assert "ends lowest, at 0.1000; compute isn't recorded" in headline([read_run(tmp_path / "loss", "loss")])


def test_five_sentences_come_first_and_what_to_look_at_is_among_them(tmp_path: Path, scratch: ReadRun) -> None:
    event_files.grown(tmp_path / "odd", event_files.job(), event_files.diagnosis(rms=0.5, least_load=0.001))
    findings = verdict([read_run(tmp_path / "odd", "odd"), scratch])
    first, rest = shortlist(findings)
    assert len(first) == 5
    assert [*first, *rest] != findings
    assert sorted(f.text for f in (*first, *rest)) == sorted(f.text for f in findings)
    assert first[0].text.startswith("odd ends lowest")
    assert [f for f in rest if f.kind is Kind.WATCH] == []
    assert len([f for f in first if f.kind is Kind.WATCH]) == 2
