"""Checkpoints of runs that are split in a way that this package doesn't know are refused by what they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from damage import MODEL, MODEL_0, MODEL_1, OPTIMIZER_1, TAG, Change, both, copy, edit, removed
from ds_sparkling.checkpoint.expand import prepare
from ds_sparkling.checkpoint.request import Request
from ds_sparkling.checkpoint.team import Team
from ds_sparkling.errors import UnsupportedError


def made_in(name: str) -> Change:
    return lambda path: (path / name).write_bytes(b"")


def without_module(content: Any) -> None:
    content.update(module=None, ds_config={"zero_optimization": {"stage": 1}})


def native_experts(content: Any) -> None:
    content.update(num_experts=[2], ds_autoep_layers=None)


def put(*keys: str, value: Any) -> Callable[[Any], None]:
    """Sets ``content[key][key]...``"""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content.setdefault(key, {})
        content[keys[-1]] = value

    return change


def moved(first: str, second: str) -> Change:
    return lambda path: (path / first).rename(path / second)


#: What tells such runs' checkpoints from others, as DeepSpeed 0.19.8 writes them.
DEGREES = "checkpoint_parallel_dimensions"


PIPELINE, TENSOR, SEQUENCE = (
    "pipeline parallelism",
    r"tensor or model parallelism \(AutoTP, tp_model_init",
    "sequence parallelism",
)


SPLIT: dict[str, tuple[str, Change, str]] = {
    "pipeline of one stage": ("stage2", made_in("layer_00-model_states.pt"), PIPELINE),
    "pipeline": ("stage2", both(made_in("layer_00-model_states.pt"), made_in("mp_rank_01_model_states.pt")), PIPELINE),
    "pipeline's degree": ("stage2", lambda path: edit(path / MODEL, put(DEGREES, "pp_degree", value=2)), PIPELINE),
    "no module": ("stage2", lambda path: edit(path / MODEL, without_module), PIPELINE),
    "tensor": ("stage2", copy(MODEL, "mp_rank_01_model_states.pt"), TENSOR),
    "tensor under stage 3": ("dense", moved(MODEL_1, "zero_pp_rank_0_mp_rank_01_model_states.pt"), TENSOR),
    "AutoTP": (
        "stage2",
        lambda path: edit(path / MODEL, put("ds_config", "tensor_parallel", "autotp_size", value=2)),
        TENSOR,
    ),
    "tp_model_init": (
        "stage2",
        lambda path: edit(path / MODEL, put("ds_config", "tensor_parallel", "tp", "tp_size", value=2)),
        TENSOR,
    ),
    "sequence": (
        "stage2",
        lambda path: edit(path / MODEL, put("ds_config", "sequence_parallel_size", value=2)),
        SEQUENCE,
    ),
    "sequence by mpu": ("dense", lambda path: edit(path / MODEL_0, put(DEGREES, "tp_degree", value=2)), SEQUENCE),
    "sequence by mesh_param": (
        "dense",
        both(removed(MODEL_1, OPTIMIZER_1), lambda path: edit(path / MODEL_0, put("dp_world_size", value=1))),
        SEQUENCE,
    ),
    "native experts": ("stage2", lambda path: edit(path / MODEL, native_experts), "native DeepSpeed MoE layers"),
}


@pytest.mark.parametrize("kind", SPLIT)
def test_runs_that_are_split_otherwise_are_refused_by_what_they_are(kind: str, saved: Callable[[str], Path]) -> None:
    case, change, words = SPLIT[kind]
    checkpoint = saved(case)
    change(checkpoint / TAG)
    with Team() as team, pytest.raises(UnsupportedError, match=f"{TAG}.*: checkpoints with {words}.* aren't supported"):
        prepare(Request(checkpoint=checkpoint, out=checkpoint.parent / "out"), team)
