"""The curves shown before a run: against the closed form, against an engine that trains, and what the tool writes."""

from __future__ import annotations

import copy
import json
import math
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from distributed import Workers
from ds_sparkling.cli import main as ds_sparkling
from ds_sparkling.engine.base_scheduler import scheduler_from_json
from ds_sparkling.errors import ConfigError
from ds_sparkling.growth.schedule import warmup_cosine
from ds_sparkling.planner.config_curves import curves_of
from ds_sparkling.planner.curves_picture import picture
from ds_sparkling.planner.plot_schedule import main
from ds_sparkling.planner.rate_curves import describe

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.json"

#: Two stages and a third one after the end, at a constant rate.
PLAIN: dict[str, Any] = {
    "training": {"steps": 100},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "sparkling": {
        "growths": [{"at_step": step, "widths": {"hidden_size": step}} for step in (20, 60, 100)],
        "rewarmup": {"ratio": 1.5, "steps": 10},
    },
}


def config(scheduler: str = "", params: dict[str, Any] | None = None, **rewarmup: Any) -> dict[str, Any]:
    """PLAIN with a scheduler and another re-warm-up."""
    made = copy.deepcopy(PLAIN)
    if scheduler:
        made["scheduler"] = {"type": scheduler, "params": params or {}}
    made["sparkling"]["rewarmup"].update(rewarmup)
    return made


#: The quickstart's steps in all, those of its warm-up, the growth's, and the steps and the ratio of its re-warm-up.
ALL, WARMUP, GROWTH, REWARMUP, RATIO = 600, 18, 300, 20, 2.0


def quickstart_base(t: int) -> float:
    """The base rate of step t: DeepSpeed warms up one step late, and stands still at zero once."""
    if t <= WARMUP:
        return 5e-3 * max(t - 1, 0) / WARMUP
    return warmup_cosine(t, warmup=WARMUP, total=ALL, start=0.0, peak=5e-3, end=5e-5)


def quickstart_new(t: int) -> float:
    """Eq. 27-28 with the quickstart's numbers."""
    start = quickstart_base(GROWTH)
    return warmup_cosine(t - GROWTH, warmup=REWARMUP, total=ALL - GROWTH, start=start, peak=RATIO * start, end=5e-5)


def row(text: str, step: int) -> list[str]:
    """The cells of a step's row in the table."""
    table = text.partition("base schedule  ")[2]
    (line,) = [line for line in table.splitlines() if line.split()[:1] == [str(step)]]
    return line.split()[1:]


def run_tool(*arguments: str | Path) -> int:
    """The exit status of the tool."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as done:
        return int(done.code or 0)
    return 0


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


# Values


def test_quickstart_follows_the_closed_form_at_every_step() -> None:
    curves = curves_of(json.loads(QUICKSTART.read_text()))
    assert curves.steps == ALL
    assert curves.base.tolist() == pytest.approx([quickstart_base(t) for t in range(ALL)], rel=1e-12, abs=1e-18)
    assert curves.rates[0].tolist() == curves.base.tolist()
    assert all(math.isnan(rate) for rate in curves.rates[1, :GROWTH])
    expected = [quickstart_new(t) for t in range(GROWTH, ALL)]
    assert curves.rates[1, GROWTH:].tolist() == pytest.approx(expected, rel=1e-12)


def test_quickstart_in_text() -> None:
    text = describe(curves_of(json.loads(QUICKSTART.read_text())))
    shown = sorted(int(line.split()[0]) for line in text.partition("base schedule  ")[2].splitlines()[1:])
    top = GROWTH + REWARMUP
    assert {0, WARMUP + 1, GROWTH - 1, GROWTH, top, ALL - 1} <= set(shown)
    for step in shown:
        if step < GROWTH:
            assert row(text, step)[0] == f"{quickstart_base(step):.3e}"
        else:
            old, new = quickstart_base(step), quickstart_new(step)
            assert row(text, step)[:3] == [f"{old:.3e}", f"{new:.3e}", f"{new / old:.2f}x"]
    assert row(text, WARMUP + 1)[1:] == ["peak", "of", "the", "base", "schedule"]
    assert row(text, GROWTH - 1)[1:] == ["before", "growth", "1"]
    assert row(text, GROWTH)[3:] == ["growth", "1"]
    assert row(text, top)[3:] == ["growth", "1", "re-warmed"]
    ratios = {t: quickstart_new(t) / quickstart_base(t) for t in range(GROWTH, ALL)}
    highest = max(ratios, key=lambda t: ratios[t])
    met = max(t for t in ratios if ratios[t] > 1.01) + 1
    assert (
        f"growth 1 at step {GROWTH}: {quickstart_base(GROWTH):.3e} -> {quickstart_new(top):.3e} at step {top} "
        f"({RATIO:.2f}x its start, {ratios[top]:.2f}x the base rate); own cosine, at most {ratios[highest]:.2f}x at "
        f"step {highest}, within 1% of the base rate from step {met} on"
    ) in text


def engine_rates(case: tiny.Case, steps: int) -> list[list[float]]:
    """What a training engine gives each step."""
    import ds_sparkling

    engine, rates = tiny.initialize(case), []
    while engine.global_steps < steps:
        engine = ds_sparkling.grow_if_due(engine)
        rates.append(engine.lr_scheduler.rates(0))
        tiny.train(engine, engine.global_steps + 1)
    return rates


@pytest.mark.parametrize("scope", ["new", "all"])
def test_an_engine_gives_the_same_rates(scope: str, workers: Callable[[int], Workers]) -> None:
    stages = [{"at_step": at, "widths": {"hidden_size": width}} for at, width in ((2, 8), (6, 12))]
    rewarmup = {"ratio": 1.5, "steps": 3, "scope": scope, "curve": "auto"}
    case = tiny.Case(1, 3, sparkling={"growths": stages, "rewarmup": rewarmup})
    (found,) = workers(1).run(engine_rates, case, 10)
    curves = curves_of(case.config, 10)
    assert [birth.base is None for birth in curves.births] == [True, False]
    shown = [[rate for rate in rates if not math.isnan(rate)] for rates in curves.rates.T.tolist()]
    assert shown == found


def test_without_a_cosine_every_stage_gets_a_factor_on_the_base_rate() -> None:
    curves = curves_of(config("WarmupLR", {"warmup_max_lr": 2e-3, "warmup_num_steps": 40, "warmup_type": "linear"}))
    base = [2e-3 * min(max(t - 1, 0) / 40, 1) for t in range(100)]
    assert curves.base.tolist() == pytest.approx(base, abs=1e-18)
    for number, born in ((1, 20), (2, 60)):
        expected = [base[t] * (1 + 0.5 * min((t - born) / 10, 1)) for t in range(born, 100)]
        assert curves.rates[number, born:].tolist() == pytest.approx(expected)
    text = describe(curves)
    assert (
        "growth 1 at step 20: 9.500e-04 -> 2.175e-03 at step 30 (2.29x its start, 1.50x the base rate); factor on"
        in text
    )
    assert (
        "growth 2 at step 60: 2.000e-03 -> 3.000e-03 at step 70 (1.50x its start, 1.50x the base rate); factor on"
        in text
    )
    assert "1.50x the base rate at step 99\n" in text
    assert row(text, 41) == ["2.000e-03", "3.000e-03", "1.50x", "peak", "of", "the", "base", "schedule"]
    assert row(text, 60) == ["2.000e-03", "3.000e-03", "1.50x", "2.000e-03", "1.00x", "growth", "2"]


@pytest.mark.filterwarnings("error")  # torch warns of schedulers that are stepped without an optimizer
def test_every_stage_has_its_own_cosine() -> None:
    curves = curves_of(config("CosineAnnealingLR", {"T_max": 80, "eta_min": 1e-5}))
    base = [1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * t / 80)) for t in range(100)]
    assert curves.base.tolist() == pytest.approx(base)
    for number, born in ((1, 20), (2, 60)):
        shape = {"warmup": 10, "total": 80 - born, "start": base[born], "peak": 1.5 * base[born], "end": 1e-5}
        expected = [warmup_cosine(t - born, **shape) for t in range(born, 80)] + base[80:]  # type: ignore[arg-type]
        assert curves.rates[number, born:].tolist() == pytest.approx(expected)
    assert "within 1% of the base rate from step 80 on" in describe(curves)


def test_without_a_scheduler_the_base_rate_is_constant() -> None:
    curves = curves_of(config())
    assert set(curves.base) == {1e-3}
    assert curves.rates[1, [20, 25, 30, 99]].tolist() == pytest.approx([1e-3, 1.25e-3, 1.5e-3, 1.5e-3])
    assert "peak of the base" not in describe(curves)


def test_an_uneven_plateau_peaks_where_it_begins() -> None:
    curves = curves_of(config("WarmupLR", {"warmup_num_steps": 40}))
    assert curves.base[40] < curves.base.max()  # log(40) * (1 / log(40)) isn't 1
    assert row(describe(curves), 40)[3:] == ["peak", "of", "the", "base", "schedule"]


def test_a_rewarmup_of_all_elements_is_one_curve() -> None:
    text = describe(curves_of(config(scope="all")))
    assert "base schedule   all elements" in " ".join(text.split("  "))
    assert row(text, 59) == ["1.000e-03", "1.500e-03", "1.50x", "before", "growth", "2"]
    assert row(text, 60) == ["1.000e-03", "1.000e-03", "1.00x", "growth", "2"]
    assert "factor on the base rate, 1.50x the base rate at step 59" in text  # growth 1's, which ends there


def test_without_a_rewarmup_new_elements_follow_the_base_schedule() -> None:
    text = describe(curves_of(config(scope="none")))
    assert "growth 2 at step 60: new elements follow the base schedule" in text
    assert "re-warmed" not in text


def test_growths_that_do_not_happen_or_not_wholly_say_so() -> None:
    text = describe(curves_of(config(), 65))
    assert "growth 2 at step 60: 1.000e-03, not re-warmed by step 64 (takes 10 steps)" in text
    assert "growth 3 at step 100: doesn't happen within 65 steps" in text
    assert text.count("growth 3") == 1  # and no row of it


def test_a_growth_at_the_first_step_and_a_run_of_one() -> None:
    made = config()
    made["sparkling"]["growths"] = [{"at_step": 0, "widths": {"hidden_size": 8}}]
    assert row(describe(curves_of(made, 1)), 0) == ["1.000e-03", "1.000e-03", "1.00x", "start,", "growth", "1,", "end"]


def test_where_the_number_of_steps_comes_from() -> None:
    made = config("WarmupDecayLR", {"total_num_steps": 70})
    assert curves_of(made, 30).steps == 30
    assert curves_of(made).steps == 100
    del made["training"]
    assert curves_of(made).steps == 70


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparkling": {}}, "no growth is planned: sparkling.growths is missing or empty"),
        ({"training": {}}, "pass --steps N"),
        ({"training": {"steps": "many"}}, "training.steps must be a positive integer, got 'many'"),
        ({"optimizer": {}}, "optimizer.params.lr must be the optimizer's learning rate, got None"),
        ({"optimizer": {"params": {"lr": "auto"}}}, "got 'auto'"),
        ({"scheduler": {"type": "Cosine", "params": {}}}, "scheduler.type is 'Cosine'; known: LRRangeTest, OneCycle"),
        ({"scheduler": {"type": "logger", "params": {}}}, "scheduler.type is 'logger'"),
        ({"scheduler": {"type": "WarmupLR"}}, "an object with 'type' and 'params'"),
        ({"scheduler": {"type": "WarmupLR", "params": {"lr": 1}}}, "don't suit WarmupLR: .*'lr'"),
        ({"scheduler": {"type": "ReduceLROnPlateau", "params": {}}}, "ReduceLROnPlateau can't be stepped .* at 0"),
        ({"sparkling": {**PLAIN["sparkling"], "rewarmup": {"curve": "cosine"}}}, "where a cosine ends"),
    ],
)
def test_what_cannot_be_shown_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        curves_of({**PLAIN, **change})


def test_errors_are_a_line_and_a_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool(tmp_path / "none.json", "--no-picture") == 2
    assert capsys.readouterr().err == f"error: config file {tmp_path / 'none.json'} doesn't exist\n"


def test_torch_and_deepspeed_schedulers_are_found_by_name() -> None:
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=1e-3)
    made = scheduler_from_json(config("WarmupLR"), optimizer)
    assert type(made).__module__ == "deepspeed.runtime.lr_schedules"
    made = scheduler_from_json(config("StepLR", {"step_size": 3}), optimizer)
    assert isinstance(made, torch.optim.lr_scheduler.StepLR)


# The picture


@pytest.mark.parametrize("scope", ["new", "all"])
def test_the_picture_has_all_curves_and_growths(scope: str) -> None:
    curves = curves_of(config("CosineAnnealingLR", {"T_max": 100}, scope=scope))
    (axes,) = picture(curves, "title").axes
    legend = axes.get_legend()
    assert legend is not None
    names = [text.get_text() for text in legend.get_texts()]
    if scope == "new":
        assert names == ["old elements (base schedule)", "new elements of growth 1", "new elements of growth 2"]
        expected = curves.rates
    else:
        assert names == ["base schedule", "all elements"]
        expected = np.stack([curves.base, curves.rates[0]])
    lines = [np.asarray(line.get_xydata()) for line in axes.get_lines()]
    for line, rates in zip(lines[: len(names)], expected, strict=True):
        assert line[:, 0].tolist() == list(range(100))
        assert line[:, 1] == pytest.approx(rates, nan_ok=True)
    assert [line[0, 0] for line in lines[len(names) :]] == [20, 60]
    assert [text.get_text() for text in axes.texts] == ["growth 1, step 20", "growth 2, step 60"]


def test_a_long_run_is_thinned_out_but_not_where_it_turns() -> None:
    made = config()
    made["sparkling"]["growths"] = [{"at_step": 12_345, "widths": {"hidden_size": 8}}]
    (axes,) = picture(curves_of(made, 50_000), "title").axes
    steps = np.asarray(axes.get_lines()[1].get_xdata()).tolist()
    assert {12_344, 12_345, 12_355} <= set(steps)
    assert len(steps) < 21_000


def test_the_picture_is_a_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rates.png"
    assert run_tool(QUICKSTART, "--output", path) == 0
    assert png_size(path) == (800, 400)
    assert f"\npicture: {path}\n" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [path]


def test_the_picture_goes_to_a_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_tool(QUICKSTART) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart-schedule.png"]


def test_a_picture_is_overwritten_by_force_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rates.png"
    path.write_text("precious")
    assert run_tool(QUICKSTART, "--output", path) == 2
    captured = capsys.readouterr()
    assert f"{path} exists; pass --force" in captured.err
    assert captured.out == ""
    assert path.read_text() == "precious"
    assert run_tool(QUICKSTART, "--output", path, "--no-picture") == 0
    assert path.read_text() == "precious"
    assert run_tool(QUICKSTART, "--output", path, "--force") == 0
    assert png_size(path) == (800, 400)


def test_a_picture_that_cannot_be_written_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool(QUICKSTART, "--output", tmp_path / "none" / "rates.png") == 2
    assert "rates.png can't be written: No such file or directory" in capsys.readouterr().err
    assert run_tool(QUICKSTART, "--output", tmp_path / "rates.svg") == 2
    assert "must end in .png" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_text_comes_and_the_picture_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    path = tmp_path / "rates.png"
    assert run_tool(QUICKSTART, "--output", path) == 2
    captured = capsys.readouterr()
    assert "error: drawing needs matplotlib: pip install 'ds-sparkling[plots]'" in captured.err
    assert "growth 1 at step 300" in captured.out
    assert not path.exists()
    assert run_tool(QUICKSTART, "--output", path, "--no-picture") == 0


# The command


def test_standard_output_is_the_text_alone() -> None:
    command = [sys.executable, "tools/plot_schedule.py", str(QUICKSTART), "--no-picture"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == describe(curves_of(json.loads(QUICKSTART.read_text()))) + "\n"
    assert done.stderr == ""


def test_the_command_and_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ds_sparkling(["plot-schedule", "--help"])
    text = capsys.readouterr().out
    assert all(option in text for option in ("CONFIG", "--steps", "--output", "--force", "--no-picture"))
    assert "lr_scheduler=" in text
    with pytest.raises(SystemExit):
        ds_sparkling(["plot-schedule", str(QUICKSTART), "--steps", "0"])
    assert "argument --steps: must be positive, got 0" in capsys.readouterr().err
