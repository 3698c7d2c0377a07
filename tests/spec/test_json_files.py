"""The one reader of JSON files: what it doesn't take, it names by where it stands, for every file that is read."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds_sparkling.discovery.factory import find_factory
from ds_sparkling.errors import SparklingError
from ds_sparkling.monitoring.observations import FILE_NAME as DIAGNOSTICS
from ds_sparkling.monitoring.observations import Observations
from ds_sparkling.spec.config import read_json
from ds_sparkling.spec.json_files import json_path, load_json, parse_json
from ds_sparkling.spec.record import FILE_NAME, read_record
from ds_sparkling.spec.run_summary import NAME, read_summary

#: What isn't taken, with what is said of it.
REFUSED = {
    "twice": ('{"seed": 1, "seed": 2}', "seed stands there twice"),
    "twice within": ('{"a": [{"b": {"c": 1, "d": 2, "c": 1}}]}', "a[0].b.c stands there twice"),
    "five thousand digits": (f'{{"a": [0, {"9" * 5000}]}}', "a[1] is an integer of 5,000 digits"),
    "no float": (f'{{"a": -{"1" + "0" * 310}}}', "a is an integer of 311 digits"),
    "infinite": ('{"a": {"lr": 1e999}}', "a.lr is beyond the range of numbers"),
    "NUL": (r'{"a": {"path": "runs\u0000/one"}}', "a.path is 'runs\\x00/one', which has a NUL"),
    "NUL in a key": (r'{"a": {"\u0000": 1}}', "a has the key '\\x00'"),
    "half a character": (r'{"a": "\ud83d"}', "a is '\\ud83d', which has a NUL or half a character"),
    "deep": ('{"a": ' + "[" * 150 + "]" * 150 + "}", "nests deeper than 100 levels"),
    "deeper than Python goes": ('{"a": ' + '{"a": ' * 100_000, "nests deeper than 100 levels"),
    "too many lists": ("[" * 100_000, "nests deeper than 100 levels"),
    "not JSON": ("{'a': 1}", "isn't JSON"),
}


def read_diagnostics(path: Path) -> None:
    Observations().read(path.parent)


#: Everything that reads JSON from a user's file: the file's name, and what reads it.
READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "config": ("ds.json", read_json),
    "factory": ("config.json", lambda path: find_factory(str(path))),
    "record": (FILE_NAME, lambda path: read_record(path.parent)),
    "summary": (NAME, lambda path: read_summary(path.parent)),
    "diagnostics": (DIAGNOSTICS, read_diagnostics),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_taken_is_named_by_file_and_place(tmp_path: Path, reader: str, case: str) -> None:
    name, read = READERS[reader]
    text, complaint = REFUSED[case]
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(SparklingError) as refused:
        read(path)
    assert str(path) in str(refused.value)
    assert complaint in str(refused.value)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["loop", "directory", "FIFO", "no permission", "too large"])
def test_a_file_that_can_not_be_read_is_named(
    tmp_path: Path, reader: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, read = READERS[reader]
    path = tmp_path / name
    if kind == "loop":
        path.symlink_to(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "no permission":  # as root, a mode keeps nobody out

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        path.touch()
        monkeypatch.setattr(Path, "open", refuse)
    else:
        with path.open("wb") as file:
            file.truncate((64 << 20) + 1)
    with pytest.raises(SparklingError) as refused:
        read(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    "name", ["a\0b.json", "x" * 300 + ".json", "d/" * 3000 + "ds.json"], ids=["NUL", "long", "deep"]
)
def test_a_name_that_no_file_can_have_is_named(name: str) -> None:
    with pytest.raises(SparklingError, match="can't be read"):
        read_json(name)


def test_what_json_can_say_is_read(tmp_path: Path) -> None:
    path = tmp_path / "all.json"
    path.write_text('{"a": [1, -2.5e3, true, null, "\\ud83d\\ude00 é"], "b": {}, "c": NaN, "d": -Infinity}')
    found = load_json(path)
    assert math.isnan(found.pop("c"))
    assert found == {"a": [1, -2500.0, True, None, "\N{GRINNING FACE} é"], "b": {}, "d": -math.inf}
    assert parse_json(b"9" * 308) == int("9" * 308)
    assert parse_json(b"[" * 100 + b"]" * 100)


def test_a_pipe_is_read() -> None:
    there, here = os.pipe()
    os.write(here, b'{"a": 1}')
    os.close(here)
    try:
        assert read_json(f"/dev/fd/{there}") == {"a": 1}
    finally:
        os.close(there)


def test_a_place_is_written_as_users_write_it() -> None:
    assert json_path(["sparkling", "growths", 1, "widths", "hidden_size"]) == "sparkling.growths[1].widths.hidden_size"
    assert json_path([0, "a"]) == "[0].a"
    assert json_path([]) == ""
