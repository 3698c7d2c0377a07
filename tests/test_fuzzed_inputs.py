"""Configs and command lines with random mistakes: each is taken or refused in words, and nothing else is raised.

The draws are the same every time. With FUZZ=LONG the plans and schedules of all mutated configs are made, too, which
takes minutes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ds_sparkling.cli import COMMANDS
from ds_sparkling.errors import SparklingError
from ds_sparkling.models.olmoe import OlmoeConfig
from ds_sparkling.planner import plot_schedule
from ds_sparkling.planner.command import main as plan_growth
from ds_sparkling.spec.config import planned_steps, read_json, sparkling_config
from ds_sparkling.spec.unsupported import refuse_unsupported

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.json"))
MUTATIONS = 300
COMMAND_LINES = 1000
LONG = os.environ.get("FUZZ") == "LONG"

#: What may stand in the place of any value, as JSON.
ODD = (
    *("null", "true", "false", "0", "1", "-1", "0.5", "-0.0", "1e308", "1e999", "NaN", "Infinity", "-Infinity", '""'),
    *('"x"', '"²"', r'"\u0000"', r'"\ud800"', '"$a$"', "[]", "{}", "[[]]", '{"a": 1}', '[null, 1, "a"]', '"../x:y"'),
    *(str(2**31), str(2**63 - 1), str(2**63), "1" + "0" * 310, "9" * 5000, "-" + "9" * 5000, '"' + "x" * 5000 + '"'),
    *("[" * 99 + "]" * 99, "[" * 100_000, '{"a": ' * 200 + "1" + "}" * 200, '{"a": 1, "a": 2}'),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a JSON value."""
    if path:
        yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def mutated(text: str, draw: random.Random) -> str:
    """A JSON text with a mistake: another value, a key gone, misspelt or there twice, or characters changed."""
    if draw.random() < 0.1:
        place = draw.randrange(len(text))
        return text[:place] + draw.choice('{}[]",:\\\0x9é-') + text[place + draw.randrange(3) :]
    data = json.loads(text)
    *outer, last = draw.choice(list(places(data)))
    holder = data
    for key in outer:
        holder = holder[key]
    kind = draw.choice(["value"] * 6 + ["gone", "misspelt", "twice"])
    if kind == "gone":
        del holder[last]
    elif kind == "misspelt" and isinstance(last, str):
        holder[last + draw.choice("s_xX ")] = holder.pop(last)
    elif kind == "twice" and isinstance(last, str):
        holder["@@"] = holder[last]
        return json.dumps(data).replace('"@@"', json.dumps(last))
    else:
        holder[last] = "@@"
        return json.dumps(data).replace('"@@"', draw.choice(ODD))
    return json.dumps(data)


def read_all(path: Path) -> None:
    """Everything that is made of a config before anything is built."""
    config = read_json(path)
    if "model" not in config and "sparkling" not in config:  # a strategy's file is a block
        config = {"sparkling": config}
    sparkling_config(config)
    OlmoeConfig.from_dict(config.get("model", {}), "model")
    refuse_unsupported(config)
    planned_steps(config)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_taken_or_refused_in_words(path: Path, tmp_path: Path) -> None:
    draw, text = random.Random(f"{path.name}"), path.read_text()
    copy = tmp_path / "config.json"
    refused = []
    for _ in range(MUTATIONS):
        copy.write_text(mutated(text, draw))
        try:
            read_all(copy)
        except SparklingError as error:
            refused.append(str(error))
    assert max(map(len, refused)) < 2000
    # Each begins with where the mistake is: the file, or a path in it.
    assert all(re.match(rf"config file {re.escape(str(copy))}|\w+(\.|:|\[| )", message) for message in refused)
    assert len(refused) > MUTATIONS / 10


@pytest.mark.skipif(not LONG, reason="takes minutes; FUZZ=LONG runs it")
@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path.parent.name == "configs"], ids=lambda path: path.stem
)
def test_a_plan_and_a_schedule_are_made_or_refused_in_words(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw, text = random.Random(f"{path.name} long"), path.read_text()
    copy = tmp_path / "config.json"
    for _ in range(MUTATIONS):
        copy.write_text(mutated(text, draw))
        for main, arguments in ((plot_schedule.main, [str(copy)]), (plan_growth, ["--config", str(copy)])):
            with contextlib.suppress(SystemExit):
                main([*arguments, "--no-picture"])
            capsys.readouterr()


#: A command line of every command that is right but for files, and a function that it calls when it has been parsed.
LINES = {
    "train": ("--deepspeed_config CONFIG --data CONFIG --output OUT --num_gpus 2", "job.command.run_job"),
    "compare": ("--deepspeed_config CONFIG --output OUT --master_port 29500 --resume", "job.side_by_side.compare"),
    "report": ("OUT CONFIG --names a b --output OUT --smooth 3 --force", "report.events.read_runs"),
    "expand-zero-ckpt": (
        "OUT OUT2 --widths hidden_size=64 inner=3 --tag t --world-size 2 --expert-parallel 1 --workers 2",
        "checkpoint.expand.prepare",
    ),
    "check-growth": (
        "--model CONFIG --widths hidden_size=64 --start hidden_size=32 --seed 3 --output p.png --force",
        "discovery.factory.find_factory",
    ),
    "plot-schedule": ("CONFIG --steps 30 --output p.png --force", "planner.config_curves.curves_of"),
    "plan-growth": (
        "--config CONFIG --widths hidden_size=64 --at 0.5 --two-stage 0.2 0.7 --tokens 1e9 --steps 10 --world-size 4 "
        "--zero 3 --expert-parallel 2 --states 2 --bandwidth 10 --output p.png --force",
        "planner.subject.read_subject",
    ),
}
WORDS = (
    *(
        "",
        "²",
        "hidden_size=²",
        "hidden_size=",
        "=4",
        "hidden_size=-1",
        "hidden_size=1.5",
        "hidden_size=1_0",
        "nan",
        "inf",
    ),
    *("-1", "0", "1e400", "1" * 30, "9" * 5000, "hidden_size=" + "9" * 5000, "a\0b", "x" * 300, "d/" * 3000, "LOOP"),
    *(
        "LOOP/x",
        "\udcff",
        "$a$",
        "--",
        "-",
        "@x",
        "a:b",
        ":",
        "a\0:b",
        "--zero",
        "--nothing",
        "/proc/self/mem",
        "CONFIG/x",
    ),
)


def test_every_command_has_a_line() -> None:
    assert LINES.keys() == COMMANDS.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_line_is_taken_or_refused_in_words(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line, called = LINES[command]
    config, loop = tmp_path / "config.json", tmp_path / "loop"
    config.write_text((ROOT / "configs" / "quickstart.json").read_text())
    loop.symlink_to(loop)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)

    class TakenError(SparklingError):
        """Stands for the work."""

    def take(*args: Any, **kwargs: Any) -> None:
        raise TakenError("taken")

    module, _, name = called.rpartition(".")
    monkeypatch.setattr(importlib.import_module(f"ds_sparkling.{module}"), name, take)
    main = importlib.import_module(COMMANDS[command].module).main
    draw = random.Random(command)
    taken = 0
    for _ in range(COMMAND_LINES // len(COMMANDS)):
        words = line.split()
        for _ in range(draw.randint(1, 2)):
            place = draw.randrange(len(words))
            words[place : place + draw.choice([1, 1, 1, 0])] = [draw.choice(WORDS)] * draw.choice([1, 1, 1, 0])
        for short, path in {"CONFIG": config, "LOOP": loop, "OUT": tmp_path / "out"}.items():
            words = [word.replace(short, str(path)) for word in words]
        with pytest.raises(SystemExit) as ended:
            main(words)
        printed = capsys.readouterr()
        assert ended.value.code in (0, 1, 2), words
        assert "Traceback" not in printed.err
        taken += "taken" in printed.err
    assert taken
