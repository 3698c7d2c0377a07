"""Checkpoints that somebody has made to do harm."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint_files
from damage import (
    EXPERT,
    FACTORY,
    MODEL,
    MODEL_0,
    MODEL_1,
    OPTIMIZER_0,
    OPTIMIZER_1,
    TAG,
    WIDE,
    base_of,
    changed,
    edit,
    hashes,
    refused,
)
from ds_sparkling.checkpoint import pickles
from ds_sparkling.errors import CheckpointError


def leave_marker(path: str) -> str:
    Path(path).write_text("ran")
    return path


class Trap:
    """Pickled as a call of :func:`leave_marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return leave_marker, (str(self.marker),)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("experts", MODEL_0), ("experts", MODEL_1), ("experts", OPTIMIZER_0), ("stage2", MODEL), ("stage2", EXPERT)],
)
def test_code_in_a_checkpoint_doesnt_run(kind: str, name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint, marker = saved(kind), tmp_path / "marker"
    edit(checkpoint / TAG / name, lambda content: content.update(client=Trap(marker)))
    words = str(checkpoint / TAG / name), f"{__name__}.leave_marker", "--trust-checkpoint"
    refused(checkpoint, *words)
    refused(checkpoint, *words, verify=True, format="universal", widths={})
    assert not marker.exists()
    pickles.load(checkpoint / TAG / name, trust=True)
    assert marker.read_text() == "ran"


def test_known_names_dont_smuggle_code(saved: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint, marker = saved("experts"), tmp_path / "marker"
    code = f"from pathlib import Path; Path({str(marker)!r}).write_text('ran')"

    class Smuggler:
        def __reduce__(self) -> tuple[Any, ...]:
            return exec, (code,)

    edit(checkpoint / TAG / MODEL_1, lambda content: content.update(client=[{"deep": Smuggler()}]))
    refused(checkpoint, MODEL_1, "builtin", "exec")
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["experts", "stage2"])
def test_unknown_classes_need_trust_and_then_survive(kind: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = saved(kind)
    name = MODEL if kind == "stage2" else MODEL_0
    options = argparse.Namespace(epochs=3, weights=torch.arange(5))
    for path in (checkpoint / TAG).glob("*model_states.pt"):
        if "expert" not in path.name:
            edit(path, lambda content: content.update(options=options))
    refused(checkpoint, str(checkpoint / TAG / name), "argparse.Namespace", "--trust-checkpoint")
    checkpoint_files.run(checkpoint, tmp_path / "out", WIDE, config=FACTORY, trust=True, verify=True)
    found = pickles.load(tmp_path / "out" / TAG / name, trust=True)
    assert found["seen"] == 17
    assert isinstance(found["options"], argparse.Namespace)
    assert found["options"].epochs == 3
    assert torch.equal(found["options"].weights, torch.arange(5))


def renamed(name: str) -> Callable[[Any], object]:
    """Gives the first parameter another name."""

    def rename(model: Any) -> None:
        old = next(iter(model["param_shapes"][0]))
        for mapping in (model["param_shapes"][0], model["module"]):
            items = [(name if key == old else key, value) for key, value in mapping.items()]
            mapping.clear()
            mapping.update(items)

    return rename


@pytest.mark.parametrize("name", ["../evil", "../../../evil", "a/b", "/evil", "..", ".", "a\0b"])
@pytest.mark.parametrize("kind", ["experts", "stage2"])
def test_names_that_lead_out_of_the_output_are_refused(
    kind: str, name: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = saved(kind)
    changed(renamed(name), *((MODEL_0, MODEL_1) if kind == "experts" else (MODEL,)))(checkpoint / TAG)
    before = hashes(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        checkpoint_files.run(checkpoint, tmp_path / "out", format="universal")
    # Under stage 2 the optimizer states name the parameters, too.
    assert kind == "stage2" or f"parameter name {name!r} can't be the name of a directory" in str(caught.value)
    assert hashes(tmp_path) == before


@pytest.mark.parametrize("name", ["../evil", "a/b"])
def test_names_that_lead_out_of_a_universal_checkpoint_are_refused(
    name: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint_files.run(saved("experts"), tmp_path / "universal", format="universal")
    edit(tmp_path / "universal" / TAG / MODEL_0, renamed(name))
    refused(tmp_path / "universal", f"parameter name {name!r}", widths={})


@pytest.mark.parametrize("key", ["../evil", "../../../../../evil", "a/b"])
def test_states_that_lead_out_of_the_output_are_refused(key: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = saved("experts")

    def rename(content: Any) -> None:
        for state in base_of(content)["state"].values():
            state[key] = state.pop("exp_avg")

    changed(rename, OPTIMIZER_0, OPTIMIZER_1)(checkpoint / TAG)
    before = hashes(tmp_path)
    try:
        with pytest.raises(CheckpointError, match=key):
            checkpoint_files.run(checkpoint, tmp_path / "out", format="universal")
    finally:
        assert hashes(tmp_path) == before
