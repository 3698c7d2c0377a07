"""Write what the docs' reference pages take from the code, between marks in the pages: ``python tools/make_docs.py``.

A page has ``<!-- made: NAME -->`` and ``<!-- end of NAME -->``; what stands between is replaced. ``--check`` only says
whether that would change anything, and the test suite does so. Pages are committed, so that they can be read without
building them.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import inspect
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import ds_sparkling
import ds_sparkling.integrations
from ds_sparkling import cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def parser_of(command: Callable[[Sequence[str]], object]) -> argparse.ArgumentParser:
    """The parser that a command's main parses its arguments by."""
    found: list[argparse.ArgumentParser] = []

    def give(parser: argparse.ArgumentParser, *_args: object, **_kwargs: object) -> None:
        found.append(parser)
        raise SystemExit

    patch = mock.patch.object
    with (
        patch(argparse.ArgumentParser, "parse_args", give),
        patch(argparse.ArgumentParser, "parse_known_args", give),
        contextlib.suppress(SystemExit),
    ):
        command([])
    return found[0]


def main_of(command: cli.Command) -> Callable[[Sequence[str]], object]:
    """What a subcommand runs."""
    main: Callable[[Sequence[str]], object] = importlib.import_module(command.module).main
    return main


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# -- the command line -------------------------------------------------------------------------------------------


def commands() -> str:
    """A section for every subcommand: what it does, and its options."""
    sections = []
    for name, command in cli.COMMANDS.items():
        parser = parser_of(main_of(command))
        options = table(("argument", "meaning"), [_option(parser, action) for action in _shown(parser)])
        sections.append(f"## {name}\n\n`ds-sparkling {name}`: {command.help}.\n\n{options}")
    return "\n\n".join(sections)


def _shown(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    return (a for a in parser._actions if a.help is not argparse.SUPPRESS and a.dest != "help")


def _option(parser: argparse.ArgumentParser, action: argparse.Action) -> tuple[str, str]:
    formatter = parser._get_formatter()
    meaning = formatter._expand_help(action) if action.help else ""
    if not action.option_strings:
        return f"`{action.metavar or action.dest}`", meaning
    value = ""
    if action.nargs != 0:
        choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else ""
        value = f" {action.metavar or choices or action.dest.upper()}" + (" ..." if action.nargs in ("+", "*") else "")
    required = " (required)" if action.required else ""
    return f"`{', '.join(action.option_strings)}{value}`{required}", meaning


def checkout_tools() -> str:
    """The tools that need a checkout: what the first line of each says."""
    rows = []
    for path in sorted((ROOT / "tools").glob("*.py")):
        if path.stem.replace("_", "-") in cli.COMMANDS:
            continue
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        rows.append((f"`python tools/{path.name}`", text.splitlines()[0].partition(": ``")[0].rstrip(".")))
    return table(("tool", "what it does"), rows)


# -- Python -----------------------------------------------------------------------------------------------------

#: heading -> public names of the package
SECTIONS = {
    "Engines": ("initialize", "adopt", "grow_if_due", "grow", "rebuild", "grow_averaged", "recorded_widths"),
    "Models and checks": ("HuggingFaceFactory", "check_growth", "prove_function"),
    "Configuration": ("SparklingConfig", "Strategy", "Rewarmup", "Split"),
    "Words of the configuration": (
        "Init",
        "NewIndex",
        "Scaling",
        "OptimizerState",
        "BiasCorrection",
        "Scope",
        "RewarmupCurve",
    ),
    "Errors": ("SparklingError", "ConfigError", "PlanError", "UnsupportedError", "GrowthError", "CheckpointError"),
}
INTEGRATIONS = ("SparklingCallback", "growing")


def api() -> str:
    """A section for every group of public names, with what mkdocstrings makes of each."""
    parts = []
    for heading, names in SECTIONS.items():
        parts.append(_section(heading, ds_sparkling, names))
    parts.append(_section("Integrations", ds_sparkling.integrations, INTEGRATIONS))
    return "\n\n".join(parts)


def _section(heading: str, module: object, names: Sequence[str]) -> str:
    things = [getattr(module, name) for name in names]
    prefix = module.__name__  # type: ignore[attr-defined]
    rows = [(f"`{prefix}.{name}`", _first_sentence(thing)) for name, thing in zip(names, things, strict=True)]
    blocks = "\n\n".join(f"::: {thing.__module__}.{name}" for name, thing in zip(names, things, strict=True))
    return f"## {heading}\n\n{table(('name', 'what it is'), rows)}\n\n{blocks}"


def _first_sentence(thing: object) -> str:
    paragraph = " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())
    sentence = re.split(r"(?<=\.) ", paragraph)[0]
    sentence = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", sentence)  # a role of Sphinx's
    return sentence.replace("``", "`")


# -- the JSON block ---------------------------------------------------------------------------------------------


def config_keys() -> str:
    """Every key of the ``"sparkling"`` block."""
    from ds_sparkling.spec.checked import described_keys
    from ds_sparkling.spec.config import SparklingConfig

    return _keys(described_keys(SparklingConfig))


def hint_keys() -> str:
    """Every key of one dimension in a hint; a part has the same."""
    from ds_sparkling.spec.axes import Dim
    from ds_sparkling.spec.checked import described_keys

    return _keys(itertools.takewhile(lambda key: "[]" not in key.path, described_keys(Dim)))


def _keys(keys: Iterable[Any]) -> str:
    rows = []
    for key in keys:
        required = key.default is None and "null" not in key.type
        default = "required" if required else f"`{json.dumps(key.default)}`"
        rows.append((f"`{key.path}`", f"`{key.type}`" if '"' in key.type else key.type, default, key.meaning))
    return table(("key", "may hold", "default", "meaning"), rows)


# -- what is supported ------------------------------------------------------------------------------------------


def versions() -> str:
    """The ranges in pyproject.toml, and the versions that the suite runs with."""
    metadata, pins = ((ROOT / name).read_text() for name in ("pyproject.toml", "constraints.txt"))
    python = re.search(r'^requires-python = "(.+)"', metadata, re.MULTILINE)
    assert python is not None
    rows = [("Python", f"`{python[1]}`", "")]
    for name in ("deepspeed", "torch", "transformers", "accelerate"):
        wanted = re.search(rf'"{name}([<>=][^"]*)"', metadata)
        assert wanted is not None
        pinned = re.findall(rf"^{name}==(\S+?)(?:;.*)?$", constraints_without_markers(pins), re.MULTILINE)
        rows.append((name, f"`{wanted[1]}`", ", ".join(pinned)))
    return table(("", "range", "the test suite's"), rows)


def constraints_without_markers(text: str) -> str:
    """The pins alone."""
    return "\n".join(line.partition(";")[0].strip() for line in text.splitlines())


def optimizers() -> str:
    """The optimizers of DeepSpeed's that there is an adapter for."""
    from ds_sparkling.engine.internals import CHECKED_VERSIONS
    from ds_sparkling.engine.optimizers import ADAPTERS

    rows = [(f"`{kind.__name__}`", f"`{adapter.__name__}`") for kind, adapter in ADAPTERS.items()]
    versions = ", ".join(CHECKED_VERSIONS)
    return table(("`engine.optimizer`", "adapter"), rows) + f"\n\nChecked against DeepSpeed {versions}."


def hooks() -> str:
    """What is replaced in DeepSpeed, torch and transformers."""
    from ds_sparkling.engine.hooks import HOOKS

    lasts = {"run": "as long as the engine", "block": "within one block of code"}
    rows = [(f"`{hook.owner}.{hook.attribute}`", hook.why, lasts[hook.lasts]) for hook in HOOKS]
    return table(("replaced", "why", "for how long"), rows)


def refused() -> str:
    """The settings of DeepSpeed's that growth can't be combined with."""
    from ds_sparkling.spec.unsupported import REFUSED, REFUSED_OPTIMIZERS  # here, so that --help doesn't wait for torch

    rows = [(f"`{refusal.path}`", refusal.when.words, refusal.what) for refusal in REFUSED]
    optimizers = ", ".join(f"`{name}`" for name in REFUSED_OPTIMIZERS)
    return f"{table(('setting', 'refused where', 'what it is'), rows)}\n\nOptimizers refused by name: {optimizers}."


# -- pages ------------------------------------------------------------------------------------------------------

#: page -> what is made in it, by the name in its marks
MADE: dict[str, dict[str, Callable[[], str]]] = {
    "concepts/axes.md": {"hint keys": hint_keys},
    "reference/config.md": {"keys": config_keys},
    "concepts/architecture.md": {"hooks": hooks},
    "reference/cli.md": {"commands": commands, "checkout tools": checkout_tools},
    "reference/api.md": {"api": api},
    "support.md": {"versions": versions, "optimizers": optimizers, "refused": refused},
}


def made(page: str) -> str:
    """The text of a page with everything that is made in it as it has to be."""
    text = (DOCS / page).read_text()
    for name, make in MADE[page].items():
        begin, end = f"<!-- made: {name} -->", f"<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise AssertionError(f"docs/{page} has no {begin} and {end}")
        text = f"{before}{begin}\n\n{make()}\n\n{end}{after}"
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="make_docs.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page would change")
    options = parser.parse_args(argv)
    stale = [page for page in MADE if made(page) != (DOCS / page).read_text()]
    if options.check and stale:
        sys.exit(f"error: not as the code is: {', '.join(stale)}; run python tools/make_docs.py")
    for page in stale:
        (DOCS / page).write_text(made(page))
        sys.stdout.write(f"wrote docs/{page}\n")


if __name__ == "__main__":
    main()
