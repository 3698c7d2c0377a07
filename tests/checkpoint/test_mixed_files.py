"""Files of another rank, step, run or DeepSpeed among the others are named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import checkpoint_files
from damage import (
    EXPERT,
    MODEL,
    MODEL_0,
    MODEL_1,
    OPTIMIZER_0,
    OPTIMIZER_1,
    TAG,
    Change,
    copy,
    edit,
    optimizer_file,
    readable,
    refused,
)
from ds_sparkling.errors import CheckpointError, SparklingError, UnsupportedError


def from_other_step(*names: str) -> Change:
    return lambda path: [shutil.copy(path.parent / "global_step1" / name, path / name) for name in names]


def of_version(version: str) -> Callable[[Any], object]:
    return lambda content: content.update(ds_version=version)


@pytest.mark.parametrize(
    ("kind", "damage", "words"),
    [
        ("experts", from_other_step(OPTIMIZER_1), (OPTIMIZER_1, "another run or step")),
        ("experts", from_other_step(OPTIMIZER_0), (OPTIMIZER_1, "another run or step than rank 0's")),
        ("experts", from_other_step(MODEL_1), (MODEL_1, "another run or step", "global_steps is 1, there 2")),
        ("experts", from_other_step(MODEL_0), (MODEL_1, "another run or step", "global_steps is 2, there 1")),
        ("stage2", from_other_step(f"bf16_{OPTIMIZER_1}"), (OPTIMIZER_1, "another run or step")),
        ("experts", copy(OPTIMIZER_0, OPTIMIZER_1), (OPTIMIZER_1, "another rank")),
        ("experts", copy(OPTIMIZER_1, OPTIMIZER_0), (OPTIMIZER_0, "another rank")),
    ],
    ids=readable,
)
def test_files_of_another_step_or_rank_are_named(
    kind: str, damage: Change, words: tuple[str, ...], saved: Callable[[str], Path]
) -> None:
    checkpoint = saved(kind)
    damage(checkpoint / TAG)
    refused(checkpoint, str(checkpoint / TAG), *words)


def test_a_file_of_a_rank_with_the_same_experts_is_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint_files.run(saved("experts"), tmp_path / "four", world_size=4)
    name = "zero_pp_rank_2_mp_rank_00_optim_states.pt"
    copy(OPTIMIZER_0, name)(tmp_path / "four" / TAG)
    refused(tmp_path / "four", name, "another rank")


@pytest.mark.parametrize("pair", [(0, 1), (1, 0)])
def test_a_file_of_another_rank_is_refused_under_stage_2(pair: tuple[int, int], saved: Callable[[str], Path]) -> None:
    checkpoint = saved("stage2")
    copy(f"bf16_{optimizer_file(pair[0])}", f"bf16_{optimizer_file(pair[1])}")(checkpoint / TAG)
    refused(checkpoint, optimizer_file(pair[1]), "another rank")


def test_the_same_file_for_two_ranks_is_refused(saved: Callable[[str], Path]) -> None:
    checkpoint = saved("dense")
    copy(OPTIMIZER_0, OPTIMIZER_1)(checkpoint / TAG)
    refused(checkpoint, OPTIMIZER_1, "another rank")


@pytest.mark.parametrize("names", [(MODEL_0, MODEL_1), (MODEL_1, MODEL_0)])
def test_model_states_of_another_rank_are_refused(names: tuple[str, str], saved: Callable[[str], Path]) -> None:
    checkpoint = saved("experts")
    copy(*names)(checkpoint / TAG)
    refused(checkpoint, names[1], "another rank", widths={})


def test_model_states_of_another_step_are_refused_under_stage_2(saved: Callable[[str], Path]) -> None:
    checkpoint = saved("stage2")
    edit(checkpoint / TAG / MODEL, lambda model: model["module"]["norm.weight"].add_(0.5))
    refused(checkpoint, MODEL, "norm.weight isn't the rounded master weight", "another step")


def test_an_experts_file_of_other_weights_is_refused_under_stage_2(saved: Callable[[str], Path]) -> None:
    checkpoint = saved("stage2")
    edit(checkpoint / TAG / EXPERT, lambda weights: [weight.add_(0.5) for weight in weights.values()])
    refused(checkpoint, EXPERT, "isn't the rounded master weight", "another step")


@pytest.mark.parametrize(("kind", "name"), [("experts", MODEL_0), ("stage2", MODEL)])
def test_files_of_another_deepspeed_are_refused(kind: str, name: str, saved: Callable[[str], Path]) -> None:
    checkpoint = saved(kind)
    edit(checkpoint / TAG / name, of_version("0.17.0"))
    words = str(checkpoint / TAG / name), "DeepSpeed 0.17.0", "known: 0.19.8"
    refused(checkpoint, *words, error=UnsupportedError)


@pytest.mark.parametrize(("name", "error"), [(MODEL_1, UnsupportedError), (OPTIMIZER_1, CheckpointError)])
def test_a_file_of_another_deepspeed_among_others_is_named(
    name: str, error: type[SparklingError], saved: Callable[[str], Path]
) -> None:
    checkpoint = saved("experts")
    edit(checkpoint / TAG / name, of_version("0.20.0"))
    refused(checkpoint, str(checkpoint / TAG / name), "0.20.0", error=error)
