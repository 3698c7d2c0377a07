"""Arguments that several commands take, and how a command ends."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds_sparkling.errors import ConfigError
from ds_sparkling.spec.command_line import (
    count,
    directory_argument,
    ends_in_words,
    path_argument,
    port,
    positive,
    positive_float,
    whole_number,
)
from ds_sparkling.spec.widths import parse_widths


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        (whole_number, ["²", "", "1.0", "1_0", " 1", "9" * 5000, "9" * 30, "-" + "9" * 30, "٣", "0x1", "nan"]),
        (count, ["-1", "²", "9" * 5000]),
        (positive, ["0", "-1", "²", "9" * 5000]),
        (port, ["0", "65536", "²"]),
        (positive_float, ["0", "-1", "nan", "inf", "1e400", "²", "", "9" * 5000]),
    ],
)
def test_what_is_no_number_is_refused_in_few_words(kind: Callable[[str], Any], texts: list[str]) -> None:
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError, match="must"):
            kind(text)
        try:
            kind(text)
        except argparse.ArgumentTypeError as error:
            shown = str(error)
        assert len(shown) < 160


def test_numbers_are_read() -> None:
    assert (whole_number("-3"), count("0"), positive("7"), port("29500")) == (-3, 0, 7, 29500)
    assert whole_number(str(2**63 - 1)) == 2**63 - 1
    assert positive_float("2e11") == 2e11


@pytest.mark.parametrize(
    "text", ["hidden_size=²", "hidden_size=", "hidden_size", "=4", "a=0", "a=-1", "a=" + "9" * 5000]
)
def test_widths_that_are_none_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_widths(argparse.ArgumentParser(), "--widths", [text])
    assert "--widths takes AXIS=WIDTH, got" in capsys.readouterr().err
    assert parse_widths(argparse.ArgumentParser(), "--widths", ["a=4", "b=5"]) == {"a": 4, "b": 5}


def test_a_path_that_the_file_system_refuses_is_named(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for text in ("a\0b", "x" * 300, "d/" * 3000, str(loop), f"{loop}/x", ""):
        for kind in (path_argument, directory_argument):
            with pytest.raises(argparse.ArgumentTypeError):
                kind(text)
    assert path_argument(f"{tmp_path}/to/be/made") == tmp_path / "to" / "be" / "made"
    assert directory_argument(str(tmp_path)) == tmp_path
    with pytest.raises(argparse.ArgumentTypeError, match="absent isn't a directory; make it first"):
        directory_argument(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (ConfigError("a.b is wrong"), 1, "error: a.b is wrong\n"),
        (PermissionError(13, "Permission denied", "/root/x"), 1, "error: /root/x: Permission denied\n"),
        (OSError(28, "No space left on device"), 1, "error: No space left on device\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_a_command_ends_in_one_line(
    raised: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @ends_in_words(status=1)
    def main(argv: Any = None) -> None:
        raise raised

    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == status
    assert capsys.readouterr().err == said
