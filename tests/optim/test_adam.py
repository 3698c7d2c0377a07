"""The kernel's way from source to use: built once, whole or not at all, and done without where it can't be built."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ds_sparkling.optim import adam


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty place for compiled kernels."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    adam._library.cache_clear()
    yield tmp_path / "ds_sparkling"
    adam._library.cache_clear()


def test_the_kernel_is_built_once(fresh: Path) -> None:
    assert adam._library() is not None
    (built,) = fresh.iterdir()  # nothing else is left behind
    time = built.stat().st_mtime_ns
    adam._library.cache_clear()
    assert adam._library() is not None
    assert built.stat().st_mtime_ns == time


def test_without_a_compiler_the_optimizers_own_code_steps(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    param = torch.ones(8)
    param.grad = torch.ones(8)
    optimizer = torch.optim.AdamW([param], fused=True)
    optimizer.step()
    kernel = adam.AdamKernel(optimizer)
    for compiler in ("/nowhere/c++", "false"):
        monkeypatch.setenv("CXX", compiler)
        adam._library.cache_clear()
        with caplog.at_level(logging.WARNING, "ds_sparkling"):
            assert not kernel.takes(optimizer.param_groups[0], param)
        assert "the Adam kernel can't be built" in caplog.text
        assert list(fresh.iterdir()) == []
    monkeypatch.delenv("CXX")
    adam._library.cache_clear()
    assert kernel.takes(optimizer.param_groups[0], param)
