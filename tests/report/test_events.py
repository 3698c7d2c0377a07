"""Runs read from their event files: growths, stops and resumptions, and what isn't a run."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

import event_files
from ds_sparkling.errors import SparklingError
from ds_sparkling.report.command import main
from ds_sparkling.report.event_records import Unread, records
from ds_sparkling.report.events import Event, EventFile, default_names, merge, read_run, read_runs
from ds_sparkling.report.page import text
from ds_sparkling.report.verdict import Kind, verdict
from event_files import GROWN_AT, SAMPLES, STEPS, SUMMARY, TOKENS, Point


def test_a_growth_keeps_the_validations_on_both_sides(tmp_path: Path) -> None:
    event_files.grown(tmp_path / "tensorboard", event_files.job(jump=0.25))
    run = read_run(tmp_path, "run")
    losses = run.curves["Validation/loss"]
    here = losses.samples == SAMPLES * GROWN_AT
    before, after = losses.values[here]
    assert losses.growths[here].tolist() == [0, 1]
    assert after - before == pytest.approx(0.25)
    assert losses.samples.tolist() == sorted(losses.samples.tolist())
    (growth,) = run.growths
    assert (growth.number, growth.samples, growth.widths) == (1, SAMPLES * GROWN_AT, {"hidden_size": 16})
    assert (growth.parameters, growth.active_parameters) == (9000, 3000)
    assert growth.plan == "growth 1: <hidden_size> 8 -> 16"


def test_every_point_of_a_long_run_is_read(tmp_path: Path) -> None:
    event_files.write(tmp_path, [Point("Train/loss", step, float(step)) for step in range(12_000)])
    assert read_run(tmp_path, "run").curves["Train/loss"].values.tolist() == list(range(12_000))


def test_the_later_file_wins(tmp_path: Path) -> None:
    event_files.write(tmp_path, [Point("Train/loss", step, 1.0) for step in (1, 2, 3, 4)])
    event_files.write(tmp_path, [Point("Train/loss", step, 2.0) for step in (3, 4)])
    event_files.write(tmp_path, [])
    assert read_run(tmp_path, "run").curves["Train/loss"].values.tolist() == [1.0, 1.0, 2.0, 2.0]


def test_others_curves_are_left_alone(tmp_path: Path) -> None:
    """They may be over anything, and must not tell where a file begins."""
    event_files.write(tmp_path, [Point("Train/loss", 50, 1.0)])
    event_files.write(tmp_path, [Point("Train/loss", 60, 1.0), Point("By_compute/train_loss", 0, 1.0)])
    run = read_run(tmp_path, "run")
    assert run.curves.keys() == {"Train/loss"}
    assert run.curves["Train/loss"].samples.tolist() == [50, 60]


class Recorder:
    """A run as it writes its files: stopped here and there, and resumed from its latest checkpoint.

    A validation before each growth, one after it, and a training loss every step.
    """

    def __init__(self, growths: list[int], save_every: int) -> None:
        self.growths = growths
        self.save_every = save_every
        self.files: list[EventFile] = []
        self.checkpoint = (0, 0)  # steps, growths done
        self.clock = 0.0

    def open(self) -> None:
        self.files.append(EventFile({}, [], []))

    def add(self, tag: str, step: int, value: float) -> None:
        self.clock += 1
        self.files[-1].scalars.setdefault(tag, []).append(Event(self.clock, step, value))

    def go(self, end: int) -> None:
        """Resume, and train until ``end`` steps are done."""
        step, stage = self.checkpoint
        before_growth = (step, stage) == self.before_growth if stage < len(self.growths) else False
        self.open()
        while step < end:
            if stage < len(self.growths) and self.growths[stage] == step:
                if not before_growth:
                    self.add("Validation/loss", step, 10 * stage)
                self.checkpoint = self.before_growth = (step, stage)
                stage += 1
                self.open()
                self.add("Growth/number", step, stage)
                self.add("Validation/loss", step, 10 * stage)
            before_growth = False
            step += 1
            self.add("Train/loss", step, step + 100 * stage)
            if self.growths:
                self.add("Growth/number", step, stage)
            if step % self.save_every == 0:
                self.checkpoint = (step, stage)

    before_growth = (-1, -1)


def as_lists(files: list[EventFile]) -> dict[str, list[tuple[float, float, float]]]:
    return {
        tag: list(zip(curve.samples, curve.growths, curve.values, strict=True)) for tag, curve in merge(files).items()
    }


@given(
    growths=st.lists(st.integers(0, 20), max_size=3, unique=True).map(sorted),
    save_every=st.integers(1, 7),
    stops=st.lists(st.integers(1, 20), max_size=4),
)
def test_a_stopped_and_resumed_run_reads_like_one_that_never_stopped(
    growths: list[int], save_every: int, stops: list[int]
) -> None:
    plain, stopped = Recorder(growths, save_every), Recorder(growths, save_every)
    plain.go(21)
    for stop in stops:
        stopped.go(stop)
    stopped.go(21)
    assert as_lists(stopped.files) == as_lists(plain.files)


def test_a_run_that_begins_wide_has_grown_elsewhere(tmp_path: Path) -> None:
    """The number of growths is written all along; where it begins above 0 without a plan, no growth was seen."""
    wide = [Point("Growth/number", SAMPLES * step, 1) for step in range(1, 5)]
    wide += [Point("lr/birth_1", SAMPLES * step, 1e-3) for step in range(1, 5)]
    event_files.write(tmp_path / "wide", wide)
    run = read_run(tmp_path / "wide", "run")
    assert run.growths == ()
    assert run.grown_elsewhere
    event_files.write(tmp_path / "again", wide)
    twice = [Point("Growth/number", SAMPLES * step, 2) for step in range(4, 8)]
    event_files.write(tmp_path / "again", twice, ("growth 2", SAMPLES * 4))
    assert [(growth.number, growth.samples) for growth in read_run(tmp_path / "again", "run").growths] == [(2, 64)]
    event_files.write(tmp_path / "narrow", [Point("Growth/number", SAMPLES * step, 0) for step in range(1, 5)])
    narrow = read_run(tmp_path / "narrow", "run")
    assert narrow.growths == ()
    assert not narrow.grown_elsewhere


def test_tokens_between_points_and_none_beyond(tmp_path: Path) -> None:
    event_files.grown(tmp_path, event_files.job())
    run = read_run(tmp_path, "run")
    step = np.array([0.0, 25.0, GROWN_AT, 75.0, STEPS, STEPS + 1])
    tokens, compute = (run.spent(tag, SAMPLES * step) for tag in ("Train/tokens", "Train/compute_flops"))
    assert tokens is not None
    assert compute is not None
    np.testing.assert_allclose(tokens, TOKENS * np.where(step > STEPS, np.nan, step), rtol=1e-6)
    wide = np.maximum(step - GROWN_AT, 0)
    expected = 6 * TOKENS * (1000 * (step - wide) + 3000 * wide)
    np.testing.assert_allclose(compute, np.where(step > STEPS, np.nan, expected), rtol=1e-6)
    assert run.spent("absent", step) is None


def test_the_summary_is_found_from_the_run_and_from_its_event_directory(tmp_path: Path) -> None:
    event_files.from_scratch(tmp_path / "tensorboard")
    assert read_run(tmp_path, "run").summary is None
    SUMMARY.write(tmp_path)
    assert read_run(tmp_path, "run").summary == SUMMARY
    assert read_run(tmp_path / "tensorboard", "run").summary == SUMMARY


@pytest.mark.parametrize("text", ['{"variant": "grown"}', "[" * 100_000, '{"steps": ' + "9" * 5000 + "}", "no JSON"])
def test_a_summary_that_can_not_be_read_is_left_out_by_name(tmp_path: Path, text: str) -> None:
    event_files.from_scratch(tmp_path / "tensorboard")
    (tmp_path / "summary.json").write_text(text)
    run = read_run(tmp_path, "run")
    assert run.summary is None
    (note,) = run.notes
    assert note.startswith(f"the summary is left out: {tmp_path / 'summary.json'}")


def test_names() -> None:
    assert default_names([Path("a/grown"), Path("a/narrow/tensorboard")]) == ["grown", "narrow"]
    assert default_names([Path("/a/one/run"), Path("/a/two/run/")]) == ["one/run", "two/run"]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SparklingError, match=r"absent doesn't exist; pass a run's directory"):
        read_run(tmp_path / "absent", "run")
    with pytest.raises(SparklingError, match=r'no TensorBoard event files below it.*enable "tensorboard"'):
        read_run(tmp_path, "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(SparklingError, match="is a file; pass a run's directory"):
        read_run(tmp_path / "file", "run")
    event_files.from_scratch(tmp_path / "one" / "tensorboard")
    event_files.from_scratch(tmp_path / "two" / "tensorboard")
    with pytest.raises(SparklingError, match=r"more than one run below it; pass those to compare: \S+one\S* \S+two"):
        read_run(tmp_path, "run")
    event_files.write(tmp_path / "other", [Point("mine/loss", 1, 1.0)])
    with pytest.raises(SparklingError, match="hold none of the curves"):
        read_run(tmp_path / "other", "run")


def test_names_must_tell_the_runs_apart(tmp_path: Path) -> None:
    with pytest.raises(SparklingError, match="--names gives 1 names to 2 runs"):
        read_runs([tmp_path, tmp_path / "b"], ["one"])
    with pytest.raises(SparklingError, match="two runs are called 'one'"):
        read_runs([tmp_path, tmp_path / "b"], ["one", "one"])
    with pytest.raises(SparklingError, match="two runs are called"):
        read_runs([tmp_path, tmp_path])


def test_a_file_that_is_cut_off_is_read_up_to_there_and_rubbish_is_nothing(tmp_path: Path) -> None:
    """A run may be writing it at this moment."""
    event_files.write(tmp_path, [Point("Train/loss", step, 1.0) for step in range(100)])
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-30])
    run = read_run(tmp_path, "run")
    assert 90 < len(run.curves["Train/loss"]) < 100
    (note,) = run.notes
    assert "isn't whole: the run is still writing it" in note
    (tmp_path / "rubbish").mkdir()
    (tmp_path / "rubbish" / "events.out.tfevents.1.x").write_bytes(b"no event file at all" * 10)
    with pytest.raises(SparklingError, match="rubbish"):
        read_run(tmp_path / "rubbish", "run")


@pytest.mark.parametrize("bit", range(8))
@pytest.mark.parametrize("part", ["length", "length's checksum", "data", "data's checksum"])
def test_a_flipped_bit_is_told_with_its_place(tmp_path: Path, part: str, bit: int) -> None:
    """What follows a record of wrong data is read; behind a wrong length nothing can be found."""
    event_files.write(tmp_path, [Point("Train/loss", step, float(step)) for step in range(60)])
    (file,) = tmp_path.iterdir()
    begins = [record[0] for record in records(file) if not isinstance(record, Unread)]
    begin, end = begins[20], begins[21]
    data = bytearray(file.read_bytes())
    data[{"length": begin, "length's checksum": begin + 8, "data": begin + 20, "data's checksum": end - 1}[part]] ^= (
        1 << bit
    )
    file.write_bytes(data)
    run = read_run(tmp_path, "run")
    (note,) = run.notes
    lost = (len(data) if part.startswith("length") else end) - begin
    assert f"{lost:,} of {len(data):,} bytes can't be read, from byte {begin:,} on" in note
    assert len(run.curves["Train/loss"]) == (19 if part.startswith("length") else 59)
    assert any(note in finding.text and finding.kind is Kind.WATCH for finding in verdict([run]))
    assert note in text([run], verdict([run]))


def test_what_is_no_number_and_no_plan_is_left_out_by_name(tmp_path: Path) -> None:
    writer: Any = SummaryWriter(str(tmp_path))
    for step in range(1, 8):
        writer.add_scalar("Train/loss", 1.0, step)
        writer.add_scalar("Growth/number", 1.0 if step > 3 else 0.0, step)
    for value in (math.nan, math.inf, -math.inf, -1.0, 1.5, 3e38):
        writer.add_scalar("Growth/number", value, 5)
        writer.add_scalar("Growth/hidden_size", value, 4)
    writer.add_histogram("Train/loss", np.arange(4.0), 3)
    summary = Summary()
    summary.value.add(tag="Growth/plan/text_summary").tensor.float_val.append(1.0)
    writer.file_writer.add_summary(summary, 4)
    writer.close()
    run = read_run(tmp_path, "run")
    assert [growth.number for growth in run.growths] == [1]
    assert run.growths[0].plan is None
    told = "\n".join(run.notes)
    assert "6 value(s) of Growth/number that aren't whole numbers left out" in told
    assert "6 value(s) of Growth/hidden_size that aren't whole numbers left out" in told
    assert "1 value(s) of Train/loss that aren't numbers left out" in told
    assert "1 plan(s) that aren't text left out" in told


def test_files_that_are_none_are_left_out_by_name(tmp_path: Path) -> None:
    event_files.from_scratch(tmp_path)
    dangling, loop, directory, empty = odd = [tmp_path / f"events.out.tfevents.{number}" for number in (1, 2, 3, 4)]
    dangling.symlink_to(tmp_path / "gone")
    loop.symlink_to(loop)
    directory.mkdir()
    empty.touch()
    run = read_run(tmp_path, "run")
    assert len(run.curves["Train/loss"]) == STEPS // 10
    assert [str(path) in note for path, note in zip(odd, run.notes, strict=True)] == [True] * 4


def test_names_that_are_formulas_or_no_text_are_shown_as_they_are(tmp_path: Path) -> None:
    paths = []
    for number, name in enumerate((b"$\\frac{", b"\xff\xfe", b"a$b$")):
        event_files.grown(tmp_path / "written", event_files.job(0.1 * number))
        paths.append((tmp_path / "written").rename(Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name)))))
    main([*map(str, paths), "--output", str(tmp_path / "page")])
    assert "a$b$" in (tmp_path / "page" / "report.html").read_text()
