"""The way of this package's C++ from source to use: built once, whole or not at all, and done without."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_sparkling import native


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty place for what is compiled."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    native.library.cache_clear()
    yield tmp_path / "extensions" / "ds_sparkling"
    native.library.cache_clear()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "seven.cpp"
    path.write_text('extern "C" int seven() { return 7; }\n')
    return path


def seven(library: ctypes.CDLL | None) -> int:
    assert library is not None
    return int(library.seven())


def test_a_source_is_built_once(fresh: Path, source: Path) -> None:
    assert seven(native.library(source, "it is slow")) == 7
    (built,) = fresh.iterdir()  # nothing else is left behind
    time = built.stat().st_mtime_ns
    native.library.cache_clear()
    assert seven(native.library(source, "it is slow")) == 7
    assert built.stat().st_mtime_ns == time


def test_a_changed_source_is_built_anew(fresh: Path, source: Path) -> None:
    assert seven(native.library(source, "it is slow")) == 7
    source.write_text(source.read_text().replace("return 7", "return 8"))
    native.library.cache_clear()
    assert seven(native.library(source, "it is slow")) == 8


@pytest.mark.parametrize("compiler", ["/nowhere/c++", "false"])
def test_without_a_compiler_there_is_a_warning(
    fresh: Path, source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, compiler: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level(logging.WARNING, "ds_sparkling"):
        assert native.library(source, "it is slow") is None
        assert native.library(source, "it is slow") is None
    (record,) = caplog.records
    assert "seven.cpp can't be compiled, so it is slow" in record.getMessage()
    assert list(fresh.iterdir()) == []
