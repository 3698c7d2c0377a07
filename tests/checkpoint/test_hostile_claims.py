"""Files that claim what can't be, other kinds of numbers, and what isn't a file at all: refused by name, at once."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint_files
from damage import EXPERT, MODEL, MODEL_0, MODEL_1, OPTIMIZER_0, OPTIMIZER_1, TAG, base_of, edit, refused

OTHER_DTYPES = [torch.int64, torch.int32, torch.bool, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", OTHER_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "name"), [("experts", OPTIMIZER_0), ("experts", OPTIMIZER_1), ("stage2", OPTIMIZER_1)]
)
def test_master_weights_in_other_numbers_are_refused(
    dtype: torch.dtype, kind: str, name: str, saved: Callable[[str], Path]
) -> None:
    checkpoint = saved(kind)
    name = f"bf16_{name}" if kind == "stage2" else name

    def cast(content: Any) -> None:
        flats = content["optimizer_state_dict"]
        key = "fp32_flat_groups" if "fp32_flat_groups" in flats else "single_partition_of_fp32_groups"
        flats[key] = [flat.to(dtype) for flat in flats[key]]

    edit(checkpoint / TAG / name, cast)
    refused(checkpoint, name, "flat tensor 0", str(dtype), widths={})


@pytest.mark.parametrize("dtype", OTHER_DTYPES, ids=str)
@pytest.mark.parametrize("name", [OPTIMIZER_0, OPTIMIZER_1])
def test_states_in_other_numbers_than_the_other_ranks_are_refused(
    dtype: torch.dtype, name: str, saved: Callable[[str], Path]
) -> None:
    checkpoint = saved("experts")

    def cast(content: Any) -> None:
        for state in base_of(content)["state"].values():
            state["exp_avg"] = state["exp_avg"].to(dtype)

    edit(checkpoint / TAG / name, cast)
    refused(checkpoint, "exp_avg of flat tensor 0", str(dtype), widths={})


def cast_values(content: Any) -> None:
    for key, value in content.items():
        content[key] = value.to(torch.int64)


def cast_module(content: Any) -> None:
    cast_values(content["module"])


def cast_fragments(content: Any) -> None:
    cast_values(content["frozen_param_fragments"])


@pytest.mark.parametrize(
    ("kind", "name", "change"),
    [
        ("experts", MODEL_0, cast_module),
        ("experts", MODEL_1, cast_module),
        ("stage2", MODEL, cast_module),
        ("stage2", EXPERT, cast_values),
        ("dense", MODEL_0, cast_fragments),
        ("dense", MODEL_1, cast_fragments),
    ],
)
def test_compute_weights_in_other_numbers_are_refused(
    kind: str, name: str, change: Callable[[Any], None], saved: Callable[[str], Path]
) -> None:
    checkpoint = saved(kind)
    edit(checkpoint / TAG / name, change)
    refused(checkpoint, name, "int64", widths={})


def test_weights_of_a_universal_checkpoint_in_other_numbers_are_refused(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint_files.run(saved("dense"), tmp_path / "universal", format="universal")
    for file in ("fp32.pt", "exp_avg.pt"):
        path = tmp_path / "universal" / TAG / "zero/norm.weight" / file
        before = path.read_bytes()
        edit(path, lambda content: content.update(param=content["param"].to(torch.int64)))
        refused(tmp_path / "universal", str(path), "int64", widths={})
        path.write_bytes(before)


@pytest.mark.parametrize("name", ["norm.weight", "embed_tokens.weight"])
def test_a_lost_state_of_a_universal_checkpoint_is_named(
    name: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint_files.run(saved("dense"), tmp_path / "universal", format="universal")
    path = tmp_path / "universal" / TAG / "zero" / name / "exp_avg.pt"
    path.unlink()
    refused(tmp_path / "universal", str(path), "is missing", widths={})


def layer(key: str, value: Any) -> Callable[[Any], object]:
    return lambda model: [entry.update({key: value}) for entry in model["ds_autoep_layers"]]


def first_shape(shape: Any) -> Callable[[Any], object]:
    return lambda model: model["param_shapes"][0].update({"norm.weight": shape})


def sub_group_size(value: Any) -> Callable[[Any], object]:
    return lambda model: model["ds_config"]["zero_optimization"].update(sub_group_size=value)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        *((lambda model, n=n: model.update(dp_world_size=n), "dp_world_size") for n in (10**9, 10**30, -1, True)),
        *((layer("ep_size", n), "ep_size") for n in (10**9, 0, -2, 1.0)),
        *((layer("num_experts", n), "num_experts") for n in (10**9, 24, 0, -12, "12")),
        *((first_shape(shape), "norm.weight") for shape in ((-6,), (6.0,), ("6",), (10**30,), 6, (True,))),
        *((sub_group_size(n), "sub_group_size") for n in (math.inf, math.nan, -1, "many", [1])),
        (lambda model: model.update(ds_config=[1]), "ds_config"),
        (lambda model: model["ds_config"].update(zero_optimization=[1]), "zero_optimization"),
    ],
)
def test_sizes_that_cant_be_are_refused(
    change: Callable[[Any], object], key: str, saved: Callable[[str], Path]
) -> None:
    checkpoint = saved("experts")
    for name in (MODEL_0, MODEL_1):
        edit(checkpoint / TAG / name, change)
    refused(checkpoint, MODEL_0, key, widths={})


@pytest.mark.parametrize("name", ["nothing.weight", "norm.weight"])
def test_frozen_parameters_that_arent_there_are_refused(name: str, saved: Callable[[str], Path]) -> None:
    checkpoint = saved("dense")
    for file in (MODEL_0, MODEL_1):
        edit(checkpoint / TAG / file, lambda model: model["frozen_param_shapes"].update({name: torch.Size([6])}))
    refused(checkpoint, MODEL_0, name, widths={})


def test_a_lost_piece_of_a_frozen_parameter_is_named(saved: Callable[[str], Path]) -> None:
    checkpoint = saved("dense")
    edit(checkpoint / TAG / MODEL_1, lambda model: model["frozen_param_fragments"].popitem())
    refused(checkpoint, MODEL_1, "self_attn.q_proj.weight", "frozen", widths={})


def test_a_name_too_long_for_a_file_is_refused_before_anything_is_written(saved: Callable[[str], Path]) -> None:
    checkpoint = saved("experts")

    def rename(model: Any) -> None:
        for mapping in (model["param_shapes"][0], model["module"]):
            items = [("n" * 5000 if key == "norm.weight" else key, value) for key, value in mapping.items()]
            mapping.clear()
            mapping.update(items)

    for name in (MODEL_0, MODEL_1):
        edit(checkpoint / TAG / name, rename)
    refused(checkpoint, "its name has 5000 bytes, of 255 at most", widths={}, format="universal")


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the names of sockets are short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("name", [OPTIMIZER_0, MODEL_1, "ds_sparkling.json"])
@pytest.mark.parametrize("make", [fifo, unix_socket, device, loop])
def test_what_isnt_a_file_is_named(
    make: Callable[[Path], None], name: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = saved("experts")
    (checkpoint / TAG / name).unlink()
    make(checkpoint / TAG / name)
    words = "Too many levels of symbolic links" if make is loop else "no file"
    refused(checkpoint, name, words, widths={})


@pytest.mark.parametrize("name", ["latest", TAG])
@pytest.mark.parametrize("make", [fifo, loop])
def test_what_is_no_file_or_directory_on_the_way_is_named(
    make: Callable[[Path], None], name: str, saved: Callable[[str], Path]
) -> None:
    checkpoint = saved("experts")
    (checkpoint / name).rename(checkpoint.parent / "away")
    make(checkpoint / name)
    refused(checkpoint, name, widths={})
