"""The README's examples run as they stand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import event_files
import tiny
from distributed import Workers
from ds_sparkling.checkpoint.command import main as expand
from ds_sparkling.report.command import main as report
from ds_sparkling.spec.config import SparklingConfig

#: The README's widths are for a larger model.
TINY_WIDTHS = {"moe_intermediate_size": 10, "hidden_size": 12}
README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run_example(code: str, directory: str) -> tuple[int, int]:
    """The training-loop example, with the names it takes as given."""
    import itertools
    import os

    os.chdir(directory)
    case = tiny.Case(2, 3, 2, sparkling={"stages": [{"at_step": 2, "widths": {"hidden_size": 12}}]})
    Path("config.json").write_text(json.dumps(case.config))
    inputs = (dict(zip(("input_ids", "labels"), tiny.batch(step), strict=True)) for step in itertools.count())
    names = {"build_model": case.build_model, "total_steps": 4, "batches": inputs}
    exec(code, names)
    engine = names["engine"]
    return engine.global_steps, engine.sparkling.widths["hidden_size"]  # type: ignore[attr-defined]


def test_the_training_loop_runs(workers: Callable[[int], Workers], tmp_path: Path) -> None:
    assert workers(2).run(run_example, blocks("python")[0], str(tmp_path)) == [(4, 12), (4, 12)]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "global_step4"


def save_tiny(directory: str) -> None:
    engine = tiny.initialize(tiny.Case(2, 3, 2, sparkling={"stages": [{"at_step": 9, "widths": TINY_WIDTHS}]}))
    engine.save_checkpoint(directory)


def test_the_expander_commands_run(
    workers: Callable[[int], Workers], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers(2).run(save_tiny, str(tmp_path / "checkpoints"))
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text("{}")
    commands = re.findall(r"^python tools/expand_zero_ckpt\.py (.+)$", README, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        arguments = [re.sub(r"(\w+)=\d+", lambda axis: f"{axis[1]}={TINY_WIDTHS[axis[1]]}", a) for a in command.split()]
        expand(arguments)
        assert list(Path(arguments[1]).iterdir())


def test_the_json_block_shows_the_defaults() -> None:
    (block,) = blocks("json")
    shown = json.loads("{" + block + "}")["sparkling"]
    assert SparklingConfig.from_dict(shown) == SparklingConfig()


def test_what_is_shown_of_other_loops_stands_in_the_examples() -> None:
    examples = [path.read_text() for path in (Path(__file__).parents[1] / "docs" / "examples").glob("*.py")]
    shown = blocks("python")[1:]
    assert len(shown) == 2
    for block in shown:
        assert any(block in example for example in examples), block


def test_the_files_named_exist() -> None:
    named = re.findall(r"`((?:ds_sparkling|docs|tests|tools|configs)/[\w./-]*)`", README)
    assert len(named) > 8
    named += re.findall(r"\]\((docs/[\w./-]*)\)", README)
    named += re.findall(r"`python (tools/\w+\.py)", README)
    for path in named:
        assert (Path(__file__).parents[1] / path).exists(), path


def test_the_report_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = re.findall(r"`python tools/report\.py (.+?)`", README)
    event_files.grown(tmp_path / "one", event_files.job())
    event_files.from_scratch(tmp_path / "two")
    runs = iter(["one", "two"])
    monkeypatch.chdir(tmp_path)
    report([next(runs) if word == "RUN" else word for word in command.replace(" ...", "").split()])
    assert (tmp_path / "report" / "report.html").is_file()


@pytest.mark.parametrize("option", ["--output", "--names", "--smooth", "--text", "--force"])
def test_the_report_options_named_exist(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    section = README.partition("### Runs on one page")[2].partition("\n#")[0]
    assert f"`{option}" in section
    with pytest.raises(SystemExit):
        report(["--help"])
    assert option in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--data", "--resume", "--variant", "--help"])
def test_the_options_named_exist(option: str) -> None:
    assert f"`{option}" in README
    source = (Path(__file__).parents[1] / "ds_sparkling" / "train.py").read_text()
    assert option in source or option == "--help"
