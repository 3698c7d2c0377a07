"""Files that contradict their metadata, or each other's, are named."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from damage import (
    EXPERT,
    MODEL,
    MODEL_0,
    MODEL_1,
    OPTIMIZER_0,
    OPTIMIZER_1,
    TAG,
    Change,
    base_of,
    changed,
    edit,
    optimizer_file,
    readable,
    refused,
    replaced,
)


def larger_shape(model: Any) -> None:
    name, shape = next(iter(model["param_shapes"][0].items()))
    model["param_shapes"][0][name] = torch.Size((shape[0] + 1, *shape[1:]))


def shorter_norm(model: Any) -> None:
    model["module"]["norm.weight"] = model["module"]["norm.weight"][:-1].clone()


def one_list_less(model: Any) -> None:
    model["param_shapes"].pop()


def swapped_shapes(model: Any) -> None:
    model["param_shapes"][0] = OrderedDict(reversed(model["param_shapes"][0].items()))


@pytest.mark.parametrize(
    ("kind", "damage", "words"),
    [
        ("experts", replaced(OPTIMIZER_1, {}), ("optimizer_state_dict",)),
        ("stage2", changed(larger_shape, MODEL), (OPTIMIZER_0, "has 214 elements", "metadata it is 218")),
        ("stage2", changed(shorter_norm, MODEL), (MODEL, "norm.weight is (5,)", "metadata it is (6,)")),
        ("experts", changed(larger_shape, MODEL_0, MODEL_1), (OPTIMIZER_0, "has 214 elements", "metadata it is 217")),
        ("experts", changed(larger_shape, MODEL_1), (MODEL_1, "param_shapes")),
        ("experts", changed(one_list_less, MODEL_0), (MODEL_0, "1 lists of param_shapes for 2 flat tensors")),
        ("experts", changed(swapped_shapes, MODEL_1), (MODEL_1, "param_shapes")),
        ("stage2", changed(lambda c: c.pop(next(iter(c))), EXPERT), (EXPERT, "layers.0.mlp.experts.w1.3 is missing")),
    ],
    ids=readable,
)
def test_wrong_sizes_are_named(kind: str, damage: Change, words: tuple[str, ...], saved: Callable[[str], Path]) -> None:
    checkpoint = saved(kind)
    damage(checkpoint / TAG)
    refused(checkpoint, str(checkpoint / TAG), *words)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (replaced(OPTIMIZER_0, {}), (OPTIMIZER_0,)),
        (replaced(OPTIMIZER_0, ["nothing"]), (OPTIMIZER_0,)),
        (replaced(MODEL_0, ["nothing"]), (MODEL_0,)),
        (changed(lambda model: model.pop("dp_world_size"), MODEL_0), (MODEL_0, "dp_world_size")),
        (changed(lambda model: model.update(dp_world_size=0), MODEL_0), (MODEL_0, "dp_world_size")),
        (changed(lambda model: model.update(dp_world_size="2"), MODEL_0), (MODEL_0, "dp_world_size")),
        (changed(lambda model: model.update(module=None), MODEL_0), (MODEL_0, "module")),
    ],
    ids=readable,
)
def test_rank_0s_metadata_is_looked_at(damage: Change, words: tuple[str, ...], saved: Callable[[str], Path]) -> None:
    checkpoint = saved("experts")
    damage(checkpoint / TAG)
    refused(checkpoint, str(checkpoint / TAG), *words)


def without(key: str) -> Callable[[Any], object]:
    return lambda content: [state.pop(key) for state in base_of(content)["state"].values()]


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_keep_different_states_are_refused(rank: int, saved: Callable[[str], Path]) -> None:
    checkpoint = saved("experts")
    edit(checkpoint / TAG / optimizer_file(rank), without("exp_avg_sq"))
    refused(checkpoint, OPTIMIZER_1, "exp_avg_sq")
