"""The commands in the pages: each is parsed by what it calls, and those that take seconds are run."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import event_files
import tiny
from distributed import Workers
from docs_pages import NAMES, ROOT, all_blocks, commands, spans
from ds_sparkling import cli
from make_docs import main_of, parser_of

#: The pages' widths are for larger models.
TINY_WIDTHS = {"moe_intermediate_size": 10, "hidden_size": 12}
#: Of Slurm, which isn't here, by its manual.
SLURM = {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--requeue"}
COMMANDS = sorted({tuple(words) for block in all_blocks("bash", "sh") for words in commands(block.text)})
#: Commands in the text, but for those with something to fill in.
NAMED = sorted(
    {
        span
        for page in NAMES
        for span in spans(page)
        if re.match(r"(python tools/|bash |ds-sparkling |mkdocs )", span) and not re.search(r"\b[A-Z]{4,}\b", span)
    }
)


def parse(words: Sequence[str]) -> None:
    """Let what a command calls parse the command.

    Raises:
        SystemExit: if it doesn't know an argument.
        AssertionError: if no test knows the command, or a file isn't there.
    """
    program, *rest = words
    known = {
        "bash": _bash,
        "python": _script,
        "ds-sparkling": lambda rest: _parse(main_of(cli.COMMANDS[rest[0]]), rest[1:]),
        "deepspeed": _deepspeed,
        "torchrun": _torchrun,
        "accelerate": _accelerate,
        "srun": _srun,
        "pip": _pip,
        "tensorboard": _tensorboard,
        "mkdocs": lambda rest: _equal(rest, ["build"]),
        "pre-commit": lambda rest: _equal(rest, ["install"]),
    }
    assert program in known, f"no test knows the command {program}"
    known[program](rest)


def _equal(found: Sequence[str], known: Sequence[str]) -> None:
    assert list(found) == list(known)


def _parse(command: Callable[[Sequence[str]], object], arguments: Sequence[str]) -> None:
    parser = parser_of(command)
    if command is main_of(cli.COMMANDS["compare"]):  # the rest goes to the job
        _, job = parser.parse_known_args(arguments)
        _script(["ds_sparkling/train.py", "--deepspeed_config", "configs/quickstart.json", *job])
    else:
        parser.parse_args(list(arguments))


def _script(words: Sequence[str]) -> None:
    """A script of ours, or of the examples'."""
    script, *arguments = words
    path = ROOT / script
    assert path.is_file(), script
    if path.parent == ROOT / "tools":
        main = importlib.import_module(path.stem).main
    elif path.parent == ROOT / "docs" / "examples":
        main = _example_main(path)
    else:
        from ds_sparkling.train import main
    _parse(main, arguments)


def _example_main(path: Path) -> Callable[[Sequence[str]], object]:
    return lambda _arguments: runpy.run_path(str(path))["parse"]()


def _bash(words: Sequence[str]) -> None:
    script, *arguments = words
    assert (ROOT / script).is_file(), script
    if script == "tools/quickstart.sh":
        job = [word for word in arguments if word != "--compare"]
        _script(["ds_sparkling/train.py", "--deepspeed_config", "configs/quickstart.json", *job])
    elif script == "tools/test.sh":
        assert all((ROOT / word).exists() for word in arguments)
    else:
        assert (script, arguments) == (".ci/run", [])


def _deepspeed(words: Sequence[str]) -> None:
    from deepspeed.launcher.runner import parse_args

    parsed = parse_args(list(words))
    _script([parsed.user_script, *parsed.user_args])


def _torchrun(words: Sequence[str]) -> None:
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(list(words))
    _script([parsed.training_script, *parsed.training_script_args])


def _accelerate(words: Sequence[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    launch, *rest = words
    assert launch == "launch"
    parsed = launch_command_parser().parse_args(rest)
    _script([parsed.training_script, *parsed.training_script_args])


def _srun(words: Sequence[str]) -> None:
    start = words.index("torchrun")
    assert {word.partition("=")[0] for word in words[:start] if word.startswith("--")} <= SLURM
    _torchrun(words[start + 1 :])


def _pip(words: Sequence[str]) -> None:
    install, *arguments = words
    assert install == "install"
    metadata = (ROOT / "pyproject.toml").read_text()
    for argument in arguments:
        what = re.fullmatch(r"-e|\.(?:\[([\w,]+)\])?", argument)
        assert what is not None, argument
        for extra in filter(None, (what[1] or "").split(",")):
            assert re.search(rf"^{extra} = \[", metadata, re.MULTILINE), extra


def _tensorboard(words: Sequence[str]) -> None:
    from tensorboard.plugins.core.core_plugin import CorePluginLoader

    parser = argparse.ArgumentParser()
    CorePluginLoader().define_flags(parser)
    parser.parse_args(list(words))


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words)[:100])
def test_every_command_is_parsed_by_what_it_calls(words: tuple[str, ...]) -> None:
    if words[0].startswith("head="):  # the shell's own
        assert words[0] == "head=$(scontrol"
        return
    parse(words)


@pytest.mark.parametrize("span", NAMED)
def test_commands_in_the_text_too(span: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What they need may be missing there."""
    try:
        parse(span.split())
    except SystemExit:
        assert "arguments are required" in capsys.readouterr().err


def test_batch_options_are_slurms() -> None:
    lines = [line for block in all_blocks("sh") for line in block.text.splitlines() if line.startswith("#SBATCH")]
    assert lines
    for line in lines:
        assert {word.partition("=")[0] for word in line.split()[1:]} <= SLURM


def test_options_in_the_text_exist() -> None:
    """Each is one of a tool of ours, of the main job, or of a launcher."""
    from deepspeed.launcher import runner
    from torch.distributed.run import get_args_parser

    from ds_sparkling.train import main as train

    tools = [importlib.import_module(path.stem).main for path in (ROOT / "tools").glob("*.py")]
    parsers = [parser_of(main) for main in [*tools, *map(main_of, cli.COMMANDS.values()), train]]
    known = {option for parser in [*parsers, get_args_parser()] for option in parser._option_string_actions}
    known |= set(re.findall(r'"(--\w+)"', Path(runner.__file__).read_text())) | {"--compare"}
    for page in NAMES:
        named = {word.partition("=")[0] for span in spans(page) for word in span.split() if re.match(r"--\w", word)}
        assert named <= known, (page, named - known)


# -- run --------------------------------------------------------------------------------------------------------

LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "max_position_embeddings": 64,
}


def words_of(*programs: str) -> list[tuple[str, ...]]:
    """The commands that call one of a tool's two names, by their arguments."""
    return sorted({words[2:] for words in COMMANDS if " ".join(words[:2]) in programs})


def save_tiny(directory: str) -> None:
    engine = tiny.initialize(tiny.Case(2, 3, 2, sparkling={"growths": [{"at_step": 9, "widths": TINY_WIDTHS}]}))
    engine.save_checkpoint(directory)


@pytest.fixture(scope="module")
def checkpoints(workers: Callable[[int], Workers], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    workers(2).run(save_tiny, str(directory))
    return directory


def expansions() -> list[tuple[str, ...]]:
    return words_of("python tools/expand_zero_ckpt.py", "ds-sparkling expand-zero-ckpt")


@pytest.mark.parametrize("arguments", expansions(), ids=" ".join)
def test_checkpoints_are_expanded(
    arguments: tuple[str, ...], checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(checkpoints)
    Path("config.json").write_text("{}")
    given = [re.sub(r"(\w+)=\d+", lambda axis: f"{axis[1]}={TINY_WIDTHS[axis[1]]}", word) for word in arguments]
    main_of(cli.COMMANDS["expand-zero-ckpt"])(given)
    assert list(Path(arguments[1]).iterdir())


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (command, arguments)
        for command in ("plan-growth", "check-growth", "plot-schedule")
        for arguments in words_of(f"python tools/{command.replace('-', '_')}.py", f"ds-sparkling {command}")
    ],
    ids=lambda given: given if isinstance(given, str) else " ".join(given),
)
def test_plans_checks_and_schedules_are_made(
    command: str,
    arguments: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    Path("config.json").write_text(json.dumps(LLAMA))
    main_of(cli.COMMANDS[command])(list(arguments))
    out = capsys.readouterr().out
    assert json.loads(out) if "--json" in arguments else out


@pytest.mark.parametrize("arguments", words_of("ds-sparkling report"), ids=" ".join)
def test_reports_are_made(arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    event_files.grown(tmp_path / "runs" / "one", event_files.job())
    event_files.from_scratch(tmp_path / "runs" / "two")
    monkeypatch.chdir(tmp_path)
    main_of(cli.COMMANDS["report"])(list(arguments))
    assert (tmp_path / "report" / "report.html").is_file() is ("--text" not in arguments)
