"""The command: what it prints, draws and exits with."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from ds_sparkling.check.command import main
from ds_sparkling.check.growth_report import check_growth
from ds_sparkling.check.rms_picture import picture
from ds_sparkling.cli import main as ds_sparkling
from ds_sparkling.models.olmoe import OlmoeConfig, OlmoeForCausalLM

ROOT = Path(__file__).parents[2]
MODEL, BROKEN = "test_check_command:build", "test_check_command:build_broken"


def build(hidden_size: int = 32, moe_intermediate_size: int = 16) -> nn.Module:
    """A tiny reference model, named on command lines."""
    return OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=31,
            hidden_size=hidden_size,
            moe_intermediate_size=moe_intermediate_size,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
        )
    )


def build_broken(hidden_size: int = 32) -> nn.Module:
    """The same with attention that is multiplied by the width."""
    model = build(hidden_size)
    model.get_submodule("layers.0.self_attn").register_forward_hook(lambda _module, _args, output: output * hidden_size)
    return model


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.chdir(tmp_path)


def status(*arguments: object) -> int:
    """The exit status of the tool."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as done:
        return int(done.code or 0)
    return 0


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_a_growth_that_keeps_its_promise_is_printed_and_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("--model", MODEL, "--widths", "hidden_size=64", "moe_intermediate_size=32") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("growth 1: hidden_size 32 -> 64, moe_intermediate_size 16 -> 32\n")
    assert "\nkept\n\npicture: test_check_command-build-growth.png\n" in captured.out
    assert captured.err == ""
    width, height = png_size(Path("test_check_command-build-growth.png"))
    assert width == 1000
    assert height > 300


def test_a_broken_promise_is_drawn_too_and_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--model", BROKEN, "--widths", "hidden_size=64", "--output", "broken.png")
    assert status(*arguments) == 1
    captured = capsys.readouterr()
    assert "BROKEN: growing hidden_size would change the model's function" in captured.out
    assert "something else is layers.0.self_attn (Attention)" in captured.out
    assert captured.err == "error: the growth doesn't keep what it promises\n"
    png_size(Path("broken.png"))


def test_json_is_all_there_is_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--init", "random-zero", "--scaling", "function", "--dtype", "float32", "--json", "--seed", 3)
    assert status("--model", MODEL, "--widths", "moe_intermediate_size=24", *options, "--output", "a.png") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["kept"] is True
    init = data["plan"]["strategy"]["init"]
    assert (init["fan_out"], init["fan_in"], init["norm"]) == ("random", "zero", "copy")
    assert data["plan"]["strategy"]["seed"] == 3
    assert data["small"]["dtype"] == "float32"
    assert data["promise"]["logit_difference"] == 1e-4
    png_size(Path("a.png"))


def test_a_hugging_face_config_starts_from_its_own_widths(capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model_type": "mixtral", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    Path("config.json").write_text(json.dumps(config))
    assert status("--model", "config.json", "--widths", "intermediate_size=1024", "--no-picture") == 0
    out = capsys.readouterr().out
    assert out.startswith("growth 1: intermediate_size 512 -> 1024\n")
    assert "a vocabulary of 128" in out
    assert list(Path().iterdir()) == [Path("config.json")]


def test_a_start_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--model", MODEL, "--widths", "hidden_size=48", "--start", "hidden_size=24", "--no-picture")
    assert status(*arguments) == 0
    assert "hidden_size 24 -> 48" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "none.json", "--widths", "hidden_size=8"), "config file none.json doesn't exist"),
        (("--model", "test_check_command:none", "--widths", "hidden_size=8"), "test_check_command:none"),
        (("--model", MODEL, "--widths", "hidden_size=16"), "hidden_size: width 32 -> 16 shrinks"),
        (("--model", MODEL, "--widths", "depth=16"), "no starting width is known for axis 'depth'"),
        (
            ("--model", MODEL, "--widths", "hidden_size=64", "--init", "random-copy", "--scaling", "function"),
            "scaling 'function' can't hold with init random-copy",
        ),
        (
            ("--model", MODEL, "--widths", "hidden_size=64", "--output", "none/a.png"),
            "none/a.png can't be written: No such file",
        ),
    ],
)
def test_errors_are_a_line_and_a_status(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(*arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--model, --widths"),
        (("--widths", "hidden_size"), "--widths takes AXIS=WIDTH, got 'hidden_size'"),
        (("--widths", "hidden_size=0"), "got 'hidden_size=0'"),
        (("--widths", "a=1", "a=2"), "--widths names a twice"),
        (("--widths", "a=1", "--start", "b"), "--start takes AXIS=WIDTH"),
        (("--widths", "a=1", "--init", "zero-zero"), "invalid choice: 'zero-zero'"),
        (("--widths", "a=1", "--output", "a.svg"), "must end in .png"),
    ],
)
def test_usage_errors_are_argparses(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(*(("--model", MODEL) if arguments else ()), *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_picture_is_overwritten_by_force_only(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.png").write_text("precious")
    arguments = ("--model", MODEL, "--widths", "hidden_size=64", "--output", "a.png")
    assert status(*arguments) == 2
    assert "a.png exists; pass --force" in capsys.readouterr().err
    assert Path("a.png").read_text() == "precious"
    assert status(*arguments, "--force") == 0
    png_size(Path("a.png"))


def test_without_matplotlib_the_text_comes_and_the_picture_says_how(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert status("--model", MODEL, "--widths", "hidden_size=64") == 1
    captured = capsys.readouterr()
    assert "pip install 'ds-sparkling[plots]'" in captured.err
    assert "\nkept\n" in captured.out
    assert status("--model", MODEL, "--widths", "hidden_size=64", "--no-picture") == 0


def test_the_picture_shows_every_row_and_the_bands() -> None:
    from ds_sparkling.spec.strategy import Init, Strategy

    report = check_growth(build, None, {"hidden_size": 64}, Strategy(fan_out=Init.RANDOM, fan_in=Init.RANDOM))
    absolute, ratio = picture(report, "title").axes
    before, after = (np.asarray(line.get_xdata()).tolist() for line in absolute.get_lines())
    assert before == [row.before for row in report.rows]
    assert after == [row.after for row in report.rows]
    assert [label.get_text() for label in absolute.get_yticklabels()] == [row.module for row in report.rows]
    assert len(ratio.patches) == len(report.rows)
    assert len(picture(check_growth(build, None, {"hidden_size": 64}), "title").axes[1].patches) == 0


def test_the_tool_finds_models_in_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from torch import nn\ndef build(width=8):\n    return nn.Linear(width, 3)\n")
    command = [sys.executable, str(ROOT / "tools" / "check_growth.py"), "--model", "mine:build", "--widths", "width=16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={"PYTHONPATH": str(ROOT)})
    assert done.stderr == "error: Linear has no nn.Embedding to take token ids; pass inputs\n"
    assert done.returncode == 1


def test_the_command_and_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ds_sparkling(["check-growth", "--help"])
    text = capsys.readouterr().out
    assert all(option in text for option in ("--model", "--widths", "--init", "--scaling", "--as-is", "--json"))
