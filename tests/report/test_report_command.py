"""The report from a user's hand: the page, its pictures, and where they may go."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import event_files
from ds_sparkling.report import command
from ds_sparkling.report.command import main
from ds_sparkling.report.events import ReadRun, read_runs
from ds_sparkling.report.pictures import SECTIONS, figure_of, running_mean, style_of
from event_files import SAMPLES, Point

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG\r\n"


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """A grown run with all that can be recorded, one with little, and one that never grew."""
    event_files.grown(tmp_path / "grown" / "tensorboard", event_files.job(), event_files.diagnosis())
    event_files.grown(tmp_path / "<b>bare" / "tensorboard", event_files.job(shift=0.1))
    event_files.from_scratch(tmp_path / "scratch" / "tensorboard", shift=0.2)
    return [str(tmp_path / name) for name in ("grown", "<b>bare", "scratch")]


@pytest.fixture
def sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures that take no time to draw, where others are looked at than they."""
    monkeypatch.setattr("ds_sparkling.report.pictures._png", lambda figure: PNG)


class Page(HTMLParser):
    """What a page is made of; fails if a tag isn't closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text: list[str] = []
        self.images: list[bytes] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            source = dict(attrs)["src"] or ""
            assert source.startswith("data:image/png;base64,")
            self.images.append(base64.b64decode(source.partition(",")[2]))
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_has_everything_in_it(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*runs, "--output", str(tmp_path / "out")])
    path = tmp_path / "out" / "report.html"
    page = Page(path)
    pictures = {file.name: file.read_bytes() for file in (tmp_path / "out").glob("*.png")}
    assert pictures.keys() == {f"report-{section.name}.png" for section in SECTIONS}
    assert sorted(page.images) == sorted(pictures.values())
    assert all(picture.startswith(PNG) and len(picture) > 5000 for picture in page.images)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {*pictures, "report.html"}
    text = " ".join("".join(page.text).split())
    for expected in (
        "grown ends lowest: validation loss 1.1427",
        "kept the function",
        "growth 1: <hidden_size> 8 -> 16",  # escaped, so it arrives as text
        "<b>bare: no twins/cosine",
        'twins/gradient_cosine: not recorded by <b>bare. To have it, set "diagnose_every"',
        "At 2.458e+09 FLOPs buy grown: validation loss 1.1427, 0.1000 below <b>bare; no run that never grew ended",
        "Nothing grew.",
        "9,000",
        "about 3,000",
    ):
        assert expected in text, expected
    assert not re.search(r"https?:|<script|<link|url\(", path.read_text())
    printed = capsys.readouterr().out
    assert "grown ends lowest" in printed
    assert f"report: {path}" in printed


@pytest.mark.usefixtures("sketched")
def test_a_run_that_recorded_little_gets_a_page_that_says_so(tmp_path: Path) -> None:
    event_files.write(tmp_path / "run", [Point("Train/Samples/train_loss", SAMPLES * n, 1.0 / n) for n in (1, 2, 3)])
    main([str(tmp_path / "run"), "--output", str(tmp_path / "page.html")])
    page = Page(tmp_path / "page.html")
    assert len(page.images) == 1
    assert {file.name for file in tmp_path.glob("*.png")} == {"page-loss-by-tokens.png"}
    text = "".join(page.text)
    assert text.count("not recorded by no run") == 0
    for tags in ("Train/compute_flops", "activation_rms/NAME", "router/entropy/NAME"):
        assert f"{tags}: not recorded by any run" in text
    assert "twins/cosine" not in text  # nothing has grown, so there can't be any


@pytest.mark.usefixtures("sketched")
def test_five_sentences_and_the_rest_folded_away(runs: list[str], tmp_path: Path) -> None:
    main([*runs, "--output", str(tmp_path / "out")])
    html = (tmp_path / "out" / "report.html").read_text()
    shown, *folded = html.split("<details")
    assert shown.count("<h1>") == 1
    assert html.count("<h1>") == 1
    assert shown.count('<span class="mark">') == 5
    assert "<img" not in shown
    assert "<table" not in shown
    assert html.count("</details>") == len(folded)


@pytest.fixture
def read(runs: list[str]) -> list[ReadRun]:
    return read_runs([Path(run) for run in runs])


def test_every_picture_has_a_legend_units_and_named_growths_and_all_are_of_one_size(read: list[ReadRun]) -> None:
    style = style_of(read)
    sizes = set()
    for section in SECTIONS:
        figure = figure_of(section, read, style)
        assert figure is not None
        (legend,) = figure.legends
        names = [text.get_text() for text in legend.get_texts()]
        assert "grown" in names
        assert len(names) > sum(run.name in names for run in read), section.name  # what the lines mean
        for axes in figure.axes:
            unit = "training compute [GFLOPs]" if section.by_compute else "tokens [k]"
            assert axes.get_xlabel() == unit
            notes = {note.get_text() for note in axes.texts}
            assert "growth 1, grown" in notes or notes == {"growth 1"}, section.name
        sizes.add(tuple(figure.get_size_inches()))
    assert len(sizes) == 1


def test_large_counts_have_large_units(tmp_path: Path) -> None:
    points = [Point("Train/tokens", samples, 2e6 * samples) for samples in (100, 1000)]
    points += [Point("Validation/loss", samples, 1.0) for samples in (100, 1000)]
    event_files.write(tmp_path / "large", points)
    large = read_runs([tmp_path / "large"])
    figure = figure_of(SECTIONS[0], large, style_of(large))
    assert figure is not None
    (axes,) = figure.axes
    assert axes.get_xlabel() == "tokens [B]"
    assert axes.xaxis.get_major_formatter()(1.5e9) == "1.5"


def test_activations_are_relative_to_one_point_for_all_runs(tmp_path: Path) -> None:
    """To the earliest growth: a run that never grew is 1 there, and not where it began."""
    event_files.grown(tmp_path / "grown", event_files.job(), event_files.diagnosis(rms=2.0))
    steady = [Point("activation_rms/layers.0", SAMPLES * step, float(step)) for step in range(10, 101, 10)]
    event_files.write(tmp_path / "steady", steady)
    read = read_runs([tmp_path / "grown", tmp_path / "steady"])
    style = style_of(read)
    assert style.reference == SAMPLES * event_files.GROWN_AT
    section = next(section for section in SECTIONS if section.name == "activation-drift")
    figure = figure_of(section, read, style)
    assert figure is not None
    lines = [line for line in figure.axes[0].get_lines() if len(np.asarray(line.get_xdata())) == 10]
    grown, other = (np.asarray(line.get_ydata()) for line in lines)
    np.testing.assert_allclose(grown, [1.0] * 5 + [2.0] * 5)
    np.testing.assert_allclose(other, np.arange(1, 11) / 5)


@pytest.mark.usefixtures("sketched")
def test_a_dense_run_is_told_of_no_routers(tmp_path: Path) -> None:
    first, second = event_files.diagnosis()
    dense = [[point for point in file if not point.tag.startswith("router/")] for file in (first, second)]
    event_files.grown(tmp_path / "dense", event_files.job(), (dense[0], dense[1]))
    main([str(tmp_path / "dense"), "--output", str(tmp_path / "out")])
    assert "router" not in "".join(Page(tmp_path / "out" / "report.html").text)


@pytest.mark.usefixtures("sketched")
def test_names_and_order(runs: list[str], tmp_path: Path) -> None:
    main([*runs, "--names", "one", "two & three", "four", "--output", str(tmp_path / "out"), "--smooth", "3"])
    text = "".join(Page(tmp_path / "out" / "report.html").text)
    assert "Report on one, two & three, four" in text


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    return capsys.readouterr().err


@pytest.mark.usefixtures("sketched")
def test_nothing_is_overwritten_without_force(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    main([*runs, "--output", str(out)])
    (out / "mine.txt").write_text("mine")
    before = {file: file.read_bytes() for file in out.iterdir()}
    error = refused([runs[2], "--output", str(out)], capsys)
    assert f"{out}/report" in error
    assert "pass --force to overwrite" in error
    assert {file: file.read_bytes() for file in out.iterdir()} == before
    main([runs[2], "--output", str(out), "--force"])
    # The earlier report's pictures that this one hasn't are gone, and nothing else is.
    assert {file.name for file in out.iterdir()} == {
        "mine.txt",
        "report.html",
        "report-loss-by-tokens.png",
        "report-loss-by-compute.png",
    }
    (out / "report.html").unlink()
    assert "exists; pass --force" in refused([runs[2], "--output", str(out)], capsys)


@pytest.mark.usefixtures("sketched")
def test_a_failure_leaves_the_earlier_report_and_no_rest(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    main([*runs, "--output", str(out)])
    before = {file: file.read_bytes() for file in out.iterdir()}
    write_bytes = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.suffix == ".html":
            raise OSError(28, "No space left on device")
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    for target in (out, tmp_path / "new" / "deep"):
        error = refused([runs[2], "--output", str(target), "--force"], capsys)
        assert f"can't be written to {target}/report.html: No space left" in error
    assert {file: file.read_bytes() for file in out.iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_mistakes_name_the_path_and_the_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(tmp_path / "out")]
    assert f"{tmp_path}/absent doesn't exist; pass a run's" in refused([str(tmp_path / "absent"), *output], capsys)
    for number in range(8):
        event_files.from_scratch(tmp_path / f"run{number}")
    many = [str(tmp_path / f"run{number}") for number in range(8)]
    assert "8 runs are more than can be told apart by colour; pass 7 at most" in refused([*many, *output], capsys)
    (tmp_path / "file").write_text("")
    assert "can't be written to" in refused([many[0], "--output", str(tmp_path / "file" / "out")], capsys)
    assert "argument --smooth: must be positive, got 0" in refused([many[0], "--smooth", "0"], capsys)
    assert not (tmp_path / "out").exists()


def test_the_words_alone_need_no_matplotlib(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.chdir(tmp_path)
    assert "pip install 'ds-sparkling[plots]', or pass --text" in refused([runs[0]], capsys)
    main([*runs, "--text"])
    printed = capsys.readouterr().out
    assert "grown ends lowest" in printed
    assert "report:" not in printed
    assert not (tmp_path / "report").exists()


def test_it_starts_without_torch_and_deepspeed(runs: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from ds_sparkling.report.command import main; main(sys.argv[1:]); "
        "print(sorted({'torch', 'deepspeed', 'tensorflow'} & sys.modules.keys()))"
    )
    arguments = [sys.executable, "-c", code, *runs, "--output", str(tmp_path / "out")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"
    assert command.__doc__ is not None


def test_a_loss_that_is_not_finite_leaves_a_gap_and_no_more() -> None:
    means = running_mean(np.array([1.0, np.nan, 3.0, np.inf, np.nan, 5.0]), 2)
    np.testing.assert_array_equal(means, [1.0, 1.0, 3.0, 3.0, np.nan, 5.0])
