"""What can't be done is refused by name while the call only looks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import checkpoint_files
from damage import FACTORY, TAG, WIDE, readable, refused
from ds_sparkling.errors import CheckpointError, ConfigError, PlanError, SparklingError


@pytest.mark.parametrize(
    ("options", "words", "error"),
    [
        ({"tag": "../saved/global_step2"}, ("tag '../saved/global_step2'", "name of a directory"), CheckpointError),
        ({"tag": ".."}, ("tag '..'", "name of a directory"), CheckpointError),
        ({"tag": "global_step2/"}, ("tag 'global_step2/'", "name of a directory"), CheckpointError),
        ({"tag": "/"}, ("tag '/'", "name of a directory"), CheckpointError),
        ({"tag": ""}, ("tag ''", "name of a directory"), CheckpointError),
        ({"tag": "global_step3"}, ("saved/global_step3", "doesn't exist"), CheckpointError),
        ({"world_size": 3}, ("3 ranks", "expert-parallel groups of 2"), CheckpointError),
        ({"world_size": 4, "expert_parallel": 3}, ("4 ranks", "expert-parallel groups of 3"), CheckpointError),
        ({"world_size": 0}, ("--world-size", "at least 1"), CheckpointError),
        ({"world_size": 5, "expert_parallel": 5}, ("layers.0.mlp has 12 experts", "5 ranks"), CheckpointError),
        ({"widths": {"hidden": 8}}, ("'hidden'",), PlanError),
        ({"widths": {"hidden": 8}, "config": None}, (TAG, "hidden", "--config"), PlanError),
        ({"widths": {"hidden_size": 5}}, ("hidden_size", "6 -> 5 shrinks"), PlanError),
        ({"widths": {"hidden_size": 6}}, ("hidden_size", "6 -> 6 changes nothing"), PlanError),
        ({"format": "gguf"}, ("'gguf'", "zero, universal, hf"), CheckpointError),
        ({"deepspeed_config": Path("nowhere.json")}, ("nowhere.json", "doesn't exist"), ConfigError),
    ],
    ids=readable,
)
def test_what_cant_be_done_is_named(
    options: dict[str, Any], words: tuple[str, ...], error: type[SparklingError], saved: Callable[[str], Path]
) -> None:
    refused(saved("experts"), *words, error=error, **options)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"../saved/global_step2", ("isn't the name of a directory",)),
        (b"global_step3", ("global_step3", "doesn't exist")),
        (b"", ("isn't the name of a directory",)),
        (b"\xff\xfe\x00", ("latest",)),
        (b"x" * 5000, ("latest",)),
    ],
    ids=["leads out", "nowhere", "empty", "no text", "too long"],
)
def test_a_wrong_latest_is_named(content: bytes, words: tuple[str, ...], saved: Callable[[str], Path]) -> None:
    checkpoint = saved("experts")
    (checkpoint / "latest").write_bytes(content)
    refused(checkpoint, *words)


@pytest.mark.parametrize("format", ["zero", "universal"])
def test_the_directory_of_a_tag_is_understood(
    format: str, saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself, as it is after a download of one step, from within it, and with its own tag."""
    checkpoint = saved("experts")
    checkpoint_files.run(checkpoint, tmp_path / "whole", format=format)
    (tmp_path / "whole" / ("latest" if format == "zero" else "latest_universal")).unlink()
    monkeypatch.chdir(tmp_path / "whole" / TAG)
    for number, (path, tag) in enumerate([(tmp_path / "whole" / TAG, None), (Path(), None), (Path(), TAG)]):
        out = tmp_path / f"out{number}"
        checkpoint_files.run(path, out, WIDE, config=FACTORY, tag=tag)
        assert (out / "latest").read_text() == TAG
    refused(tmp_path / "whole" / TAG, TAG, "is itself a checkpoint", "'global_step3'", tag="global_step3")


def test_experts_of_another_parallel_size_need_experts(saved: Callable[[str], Path]) -> None:
    refused(saved("dense"), "no experts that AutoEP has split", expert_parallel=2)
