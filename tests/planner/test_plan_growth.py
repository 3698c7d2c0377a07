"""The command from end to end: text, JSON, picture, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

import tiny
from ds_sparkling.cli import main as ds_sparkling
from ds_sparkling.planner.assumptions import Assumptions
from ds_sparkling.planner.command import main
from ds_sparkling.planner.planning_report import Planning
from ds_sparkling.planner.recipes import splits
from ds_sparkling.planner.savings_picture import picture
from ds_sparkling.planner.subject import Options, read_subject
from olmoe_factory import build_tied

ROOT = Path(__file__).parents[2]
JOINT = ROOT / "configs" / "olmoe-0.5b-2.5b-joint2x.json"
QUICKSTART = ROOT / "configs" / "quickstart.json"
TINY = ("--config", "olmoe_factory:build_tied", "--widths", "hidden_size=12", "--tokens", "1e6", "--no-picture")


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path | float) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the tool."""
    status = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as done:
        status = int(done.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str | Path | float) -> dict[str, Any]:
    status, out, err = run(capsys, *arguments, "--json", "--no-picture")
    assert status == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def written(path: Path, **changes: Any) -> Path:
    """The quickstart's config with other blocks; None takes one out."""
    config = {**json.loads(QUICKSTART.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return path


def two_stages(path: Path, second: int = 300) -> Path:
    stages = [
        {"at_step": 150, "widths": {"hidden_size": 128}},
        {"at_step": second, "widths": {"moe_intermediate_size": 64}},
    ]
    return written(path, sparkling={"growths": stages})


# Text, JSON, picture


def test_the_text_tells_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.png"
    status, out, _ = run(capsys, "--config", JOINT, "--world-size", 64, "--output", path)
    assert status == 0
    assert "200B tokens in 63,578 steps; 64 ranks, ZeRO 3, experts over 8, bf16, 2 fp32 state" in out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "before 2,563,429,888 449,500,672 hidden_size 1024, moe_intermediate_size 512" in lines
    assert "after growth 1 9,958,693,376 1,502,976,512 hidden_size 2048, moe_intermediate_size 1024" in lines
    assert "50% 31,789 1.171e+21 35.0%" in lines
    assert "as planned 50.0% 450M -> 1.50B 1.171e+21 35.0% 50.0%" in lines
    assert sum(line.startswith(("hidden_size, then", "moe_intermediate_size, then")) for line in lines) == 2
    assert any(line.startswith("device total") for line in lines)
    assert "bytes received per rank" in out
    assert "checkpoint before it" in out
    assert "expected pause" in out
    assert "assumed, not measured" in out
    assert out.endswith(f"\npicture: {path}\n")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert list(tmp_path.iterdir()) == [path]


def test_the_readme_shows_what_comes_out(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "--config", JOINT, "--world-size", 64, "--no-picture")
    assert f"```text\n{out}```\n" in (ROOT / "docs" / "guide" / "plan.md").read_text()


def test_json_has_the_same_figures(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "--config", JOINT, "--world-size", 64)
    assert found["parameters"][1]["active"] == 1_502_976_512
    assert [recipe["shares"] for recipe in found["one_growth"]] == [[tenth / 10] for tenth in range(1, 10)]
    assert found["planned"]["steps"] == [31789]
    assert found["planned"]["saved"] == pytest.approx(0.3505, abs=1e-4)
    (growth,) = found["growths"]
    memory, sent, pause = growth["memory"], growth["bytes"], growth["pause"]
    for when in ("before", "during", "after"):
        parts = dict(memory[when]["device"])
        assert parts.pop("total") == sum(parts.values())
    assert memory["during"]["device"]["total"] > memory["after"]["device"]["total"] > 0
    assert sent["received"] == sent["start"] + sent["moved"]
    assert pause["engine_start"] == pytest.approx(30 + sent["start"] / 25e9)
    assert pause["move"] == pytest.approx(sent["moved"] / 25e9)
    assert pause["checkpoint"] == pytest.approx(sent["checkpoint"] / 1e9)
    assert pause["total"] == pytest.approx(sum(pause[part] for part in ("engine_start", "move", "checkpoint")))


def test_options_go_before_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--world-size", 6, "--zero", 1, "--expert-parallel", 2, "--dtype", "fp16", "--states", 1)
    assumptions = ("--bandwidth", 2, "--write-bandwidth", 4, "--engine-start", 5, "--tokens", "1e9", "--steps", 1200)
    found = as_json(capsys, "--config", QUICKSTART, *arguments, *assumptions)
    setting = {key: found["setting"][key] for key in ("ranks", "stage", "expert_parallel", "weight_bytes", "states")}
    assert setting == {"ranks": 6, "stage": 1, "expert_parallel": 2, "weight_bytes": 2, "states": 1}
    assert (found["tokens"], found["steps"], found["planned"]["shares"]) == (1e9, 1200, [0.25])
    assert found["assumptions"] == {"bandwidth": 2, "write_bandwidth": 4, "engine_start": 5}
    sent, pause = found["growths"][0]["bytes"], found["growths"][0]["pause"]
    assert pause["move"] == pytest.approx((sent["moved"] + sent["refreshed"]) / 2e9)
    assert found["growths"][0]["memory"]["built_on_host"] == 4 * found["parameters"][1]["total"]


def test_widths_replace_the_planned_stages(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "--config", QUICKSTART, "--widths", "moe_intermediate_size=128", "--at", 0.25)
    (growth,) = found["growths"]
    assert (growth["widths"], growth["share"], growth["step"]) == ({"moe_intermediate_size": 128}, 0.25, 150)
    (recipe,) = found["recipes"]  # 4x: 2x and then the rest
    assert recipe["name"] == "moe_intermediate_size 2x, then the rest"
    assert recipe["shares"] == pytest.approx([1 / 3, 2 / 3])


def test_several_stages_are_compared_with_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "--config", two_stages(tmp_path / "two.json"))
    assert found["planned"]["shares"] == [0.25, 0.5]
    narrow, middle, wide = found["planned"]["active"]
    assert found["planned"]["saved"] == pytest.approx(1 - (narrow + middle + 2 * wide) / (4 * wide))
    assert [(recipe["name"], recipe["shares"]) for recipe in found["recipes"]] == [
        ("all at once", [0.25]),
        ("all at once", [0.5]),
    ]
    first, second = found["growths"]
    assert first["memory"]["after"] == second["memory"]["before"]
    _, out, _ = run(capsys, "--config", tmp_path / "two.json", "--no-picture")
    assert "growth 2 after 50.0% of the tokens, step 300: moe_intermediate_size 32 -> 64" in out


def test_a_dense_growth_of_one_axis_has_nothing_to_compare_with() -> None:
    assert splits({"hidden_size": 8}, {"hidden_size": 16}) == []
    both = splits({"a": 8, "b": 8, "c": 1}, {"a": 32, "b": 16, "c": 1})
    assert [(split.name, split.between) for split in both] == [
        ("a, then b", {"a": 32}),
        ("b, then a", {"b": 16}),
        ("a 2x, then the rest", {"a": 16}),
    ]


def test_models_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, *TINY)
    assert status == 0, err
    assert "8 ranks, ZeRO 3, bf16, 2 fp32 state tensors" in out
    total = sum(param.numel() for param in build_tied().parameters())
    experts = 12 * 3 * 6 * 5
    assert f"before {total:,} {total - experts * 10 // 12:,} hidden_size 6" in " ".join(out.split())


def test_a_hugging_face_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At the size of DeepSeek-V3, 671B parameters of which 37B are active."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "deepseek_v3"}))
    arguments = ("--config", path, "--widths", "moe_intermediate_size=4096", "--tokens", "14.8e12")
    found = as_json(capsys, *arguments, "--world-size", 2048, "--expert-parallel", 64)
    before, after = found["parameters"]
    assert before["total"] == pytest.approx(671e9, rel=1e-3)
    assert before["active"] == pytest.approx(37.5e9, rel=5e-3)
    assert after["total"] > 1.9 * before["total"]
    assert found["growths"][0]["memory"]["before"]["device"]["weights"] < 2**30


def test_a_model_beside_a_deepspeed_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(
        tmp_path / "ds.json", model=None, sparkling={"growths": [{"at_step": 9, "widths": {"hidden_size": 12}}]}
    )
    status, _, err = run(capsys, "--config", path, "--no-picture")
    assert status == 2
    assert "neither a 'model' block nor 'model_type': pass --model" in err
    found = as_json(capsys, "--config", path, "--model", "olmoe_factory:build_tied")
    assert found["setting"]["expert_parallel"] == 2
    assert found["parameters"][1]["widths"]["hidden_size"] == 12


def test_the_picture_shows_every_recipe(tmp_path: Path) -> None:
    subject = read_subject(str(two_stages(tmp_path / "two.json")), Options())
    report = Planning.make(subject, (1 / 3, 2 / 3), Assumptions())
    (axes,) = picture(report).axes
    one, planned, mark = axes.get_lines()
    assert [line.get_label() for line in (one, planned)] == ["in one growth", "as planned (first after 25%)"]
    for line, start in ((one, 0), (planned, 25)):
        points = np.asarray(line.get_xydata())
        assert points[0, 0] > start
        assert points[:, 1] == pytest.approx(np.interp(points[:, 0], points[[0, -1], 0], points[[0, -1], 1]))
    assert np.asarray(mark.get_xydata()).tolist() == [[50.0, pytest.approx(100 * report.recipe.saved)]]
    points = np.asarray(one.get_xydata())
    assert np.interp(50, points[:, 0], points[:, 1]) == pytest.approx(100 * report.sweep[4].saved)


# The model


class Unstacked(nn.Module):
    """Experts as modules of their own, which can't be counted by shapes."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.config = type("Config", (), {"num_experts": 4, "num_experts_per_tok": 1})()
        self.experts = nn.ModuleList(nn.Linear(hidden_size, 3) for _ in range(4))


def build_unstacked(hidden_size: int = 8) -> nn.Module:
    return Unstacked(hidden_size)


def build_silent(hidden_size: int = 6, moe_intermediate_size: int = 5) -> nn.Module:
    """A model that doesn't tell its top-k."""
    model = tiny.Case().build_model(hidden_size=hidden_size, moe_intermediate_size=moe_intermediate_size)
    model.config = None  # type: ignore[assignment]
    return model


def build_rounding(hidden_size: int = 8) -> nn.Module:
    """A width that only follows the axis where it is a power of two."""
    return nn.Linear(hidden_size if hidden_size in (8, 16) else 64, 3)


SILENT = ("--config", f"{__name__}:build_silent", *TINY[2:])


def test_experts_per_token_where_the_config_does_not_tell(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, *SILENT)
    assert status == 2
    assert "pass --experts-per-token K" in err
    told = as_json(capsys, *TINY)
    assert as_json(capsys, *SILENT, "--experts-per-token", 2)["parameters"] == told["parameters"]


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*SILENT, "--experts-per-token", "13"), "--experts-per-token 13: the model has 12 experts"),
        (("--config", f"{__name__}:build_unstacked", *TINY[2:]), "no parameter stacks them"),
        (("--config", f"{__name__}:build_unstacked", *TINY[2:], "--experts-per-token", "1"), "stacked experts"),
        (
            ("--config", f"{__name__}:build_rounding", *TINY[2:]),
            r"weight would become \(3, 12\), but build_model makes it \(3, 64\) at .*12",
        ),
        (("--config", "none.json"), "config file none.json doesn't exist"),
        ((*TINY[:4], "--no-picture"), "how many tokens the run has .*: pass --tokens N"),
        ((*TINY[:2], "--tokens", "1e6", "--no-picture"), "no growth is planned: pass --widths AXIS=WIDTH"),
        ((*TINY[:3], "hidden_size=3", *TINY[4:]), "hidden_size"),
        (
            (*TINY, "--expert-parallel", "5", "--world-size", "5"),
            "12 experts, which 5 expert-parallel ranks can't share",
        ),
        ((*TINY, "--expert-parallel", "3", "--world-size", "8"), "8 ranks can't be expert-parallel groups of 3"),
        ((*TINY, "--bandwidth", "0"), "--bandwidth and --write-bandwidth must be positive"),
        (
            ("--config", QUICKSTART, "--two-stage", ".5", ".5", "--no-picture"),
            "--two-stage takes two shares .* in order",
        ),
        (("--config", QUICKSTART, "--steps", "300", "--no-picture"), r"growths\[0\].at_step is 300, .* 300 steps"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    arguments: tuple[str | Path, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    (line,) = err.splitlines()
    assert re.search(message, line), line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"type": "Muon"}}, "optimizer.type is 'Muon', .* pass --states N"),
        (
            {"bf16": {"enabled": True, "bf16_optimizer_states": True}},
            "bf16.bf16_optimizer_states: memory is only known",
        ),
        ({"data_types": {"grad_accum_dtype": "fp8"}}, "data_types.grad_accum_dtype is 'fp8'; known: fp32"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "NVMe offload"),
        (
            {"zero_optimization": {"stage": "auto"}},
            "zero_optimization.stage must be a whole number, got 'auto'; .* --zero N",
        ),
        ({"training": None, "scheduler": None}, "pass --steps N"),
        ({"model": {"hiden_size": 4}}, "model.hiden_size: unknown key; did you mean 'hidden_size'"),
    ],
)
def test_configs_that_cannot_be_planned_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test_what_cannot_be_planned_is_refused(
        ("--config", written(tmp_path / "odd.json", **changes), "--no-picture"), message, capsys
    )


@pytest.mark.parametrize(("optimizer", "states"), [("SGD", 0), ("Lion", 1), ("Adam", 2)])
def test_state_follows_the_optimizer(
    optimizer: str, states: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "other.json", optimizer={"type": optimizer, "params": {"lr": 1e-3}})
    assert as_json(capsys, "--config", path)["setting"]["states"] == states


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--widths", "hidden_size"), "takes AXIS=WIDTH, got 'hidden_size'"),
        (("--widths", "hidden_size=4", "hidden_size=8"), "--widths names hidden_size twice"),
        (("--at", "1"), "must be a share between 0 and 1, got 1"),
        (("--world-size", "0"), "must be positive, got 0"),
        (("--tokens", "-1"), "must be positive, got -1"),
        (("--states", "-1"), "must not be negative"),
        (("--output", "plan.svg"), "must end in .png"),
    ],
)
def test_options_that_make_no_sense_are_usage_errors(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, "--config", QUICKSTART, *arguments)
    assert (status, out) == (2, "")
    assert message in err


def test_without_matplotlib_the_text_comes_and_the_picture_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, out, err = run(capsys, "--config", QUICKSTART, "--output", tmp_path / "plan.png")
    assert status == 2
    assert "expected pause" in out
    assert "pip install 'ds-sparkling[plots]'" in err


def test_the_picture_goes_to_a_name_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "--config", QUICKSTART)[0] == 0
    assert run(capsys, *TINY[:-1])[0] == 0
    names = ["olmoe_factory-build_tied-plan.png", "quickstart-plan.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_the_command_and_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ds_sparkling(["plan-growth", "--help"])
    text = capsys.readouterr().out
    assert all(option in text for option in ("--config", "--tokens", "--world-size", "--zero", "--bandwidth", "--json"))


def test_the_tool_does_without_deepspeed() -> None:
    code = (
        "import sys; sys.modules['deepspeed'] = None\n"
        f"from ds_sparkling.planner.command import main; main(['--config', {str(QUICKSTART)!r}, '--no-picture'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "expected pause" in done.stdout
