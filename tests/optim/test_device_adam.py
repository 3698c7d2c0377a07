"""The one-pass Adam kernel for GPUs: in Triton's interpreter against float64 and the CPU's kernel, and compiled."""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import logging
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_sparkling.growth import Block, birth_blocks
from ds_sparkling.growth.births import BirthRun, join, stretch
from ds_sparkling.optim import device_adam
from ds_sparkling.optim.element_rates import Treatment
from grown_parameters import expand, grown_parameters
from interpreted_adam import Case, birth_step, changes, launches, prepare, worst_error

Run = Callable[..., Any]

TWO_BIRTHS = (Treatment(0.01, None), Treatment(0.03, 2))
#: 9 rows of 7 old and 5 new elements, from the third column of one on.
COLUMNS = [
    Block(0, 1, (BirthRun(5, 0), BirthRun(10, 1))),
    Block(10, 8, (BirthRun(7, 0), BirthRun(12, 1))),
]


@pytest.fixture(scope="module")
def interpreting() -> Iterator[Run]:
    """Calls functions in a process whose kernels Triton interprets; it reads that when it is imported."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton isn't installed; it is on Linux on x86-64")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=prepare) as pool:
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
            pool.submit(int).result()  # starts it
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


@st.composite
def windows(draw: st.DrawFn) -> list[Block]:
    """The births in one rank's part of some parameters.

    Under ZeRO 1 and 2 it is a window over all of them, under ZeRO 3 an equal part of each, padded.
    """
    ranks = draw(st.integers(1, 3))
    rank = draw(st.integers(0, ranks - 1))
    each_cut = draw(st.booleans())
    axes, shapes, history = draw(grown_parameters())
    parameters = [(axes, shapes[-1], history)]
    if draw(st.booleans()):
        parameters.append((axes, shapes[-1], history))
    blocks: list[Block] = []
    total = sum(torch.Size(shape).numel() for _, shape, _ in parameters)
    low, high = rank * -(-total // ranks), (rank + 1) * -(-total // ranks)
    offset = end = 0
    for axes, shape, history in parameters:
        numel = torch.Size(shape).numel()
        if each_cut:
            low, high, offset = rank * -(-numel // ranks), (rank + 1) * -(-numel // ranks), 0
        first, last = min(max(low - offset, 0), numel), min(max(high - offset, 0), numel)
        for block in birth_blocks(axes, shape, history, first, last):
            blocks.append(dataclasses.replace(block, start=end + block.start))
        end += max(0, last - first)
        offset += numel
    blocks.append(stretch(end, end + draw(st.integers(1, 3)), 0))
    return join(blocks)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    tensors = draw(st.lists(windows(), min_size=1, max_size=2))
    births = max(run.birth for blocks in tensors for block in blocks for run in block.runs)
    rates = st.floats(1e-4, 1e-1)
    ages = st.one_of(st.none(), st.integers(0, 2000))
    treatments = draw(st.tuples(*[st.builds(Treatment, rates, ages)] * (births + 1)))
    name = draw(st.sampled_from(["AdamW", "Adam", "FusedAdam"]))
    own: dict[str, Any] = {"lr": 0.02, "eps": 1e-8, "weight_decay": draw(st.sampled_from([0.0, 0.1]))}
    own["betas"] = draw(st.sampled_from([(0.9, 0.95), (0.9, 0.999), (0.3, 0.9), (0.0, 0.5)]))
    if name == "FusedAdam":
        own |= {"adam_w_mode": draw(st.booleans()), "bias_correction": draw(st.booleans())}
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16]))
    done = draw(st.sampled_from([0, 1, 7, 100_000]))
    return Case(tensors, treatments, name, own, dtype, done, tile=draw(st.sampled_from([16, 64])))


@settings(max_examples=15)
@given(case=cases())
def test_a_step_is_that_of_float64_and_of_the_cpu_kernel(interpreting: Run, case: Case) -> None:
    # bfloat16 is rounded to at the end, once.
    assert interpreting(worst_error, case) <= (4 if case.dtype == torch.float32 else 0.51)


def test_long_runs_are_entries_of_their_own(interpreting: Run) -> None:
    blocks = [Block(0, 1, (BirthRun(50, 0), BirthRun(130, 1))), stretch(130, 132, 0)]
    assert len(list(device_adam._entries(blocks, 32 * 2))) == 3
    assert interpreting(worst_error, Case([blocks], TWO_BIRTHS, tile=2)) <= 4


@given(blocks=windows(), long=st.integers(1, 8))
def test_entries_are_the_blocks_however_they_are_cut(blocks: list[Block], long: int) -> None:
    cut = [
        Block(start, (stop - start) // runs[-1].stop, runs) for start, stop, runs in device_adam._entries(blocks, long)
    ]
    assert torch.equal(expand(join(cut), blocks[-1].stop), expand(blocks, blocks[-1].stop))


def test_no_row_is_too_long_for_32_bits() -> None:
    row = 3 << 30
    blocks = [Block(5, 2, (BirthRun(1 << 30, 0), BirthRun(row, 1))), stretch(5 + 2 * row, 5 + 3 * row, 0)]
    entries = list(device_adam._entries(blocks, 1 << 40))
    assert [(start, stop) for start, stop, _ in entries] == [
        (5, 5 + (1 << 30)),
        (5 + (1 << 30), 5 + row),
        (5 + row, 5 + row + (1 << 30)),
        (5 + row + (1 << 30), 5 + 2 * row),
        (5 + 2 * row, 5 + 3 * row),
    ]
    assert [len(runs) for _, _, runs in entries] == [1] * 5


# -- gradient scalers, launches, host reads ----------------------------------------------------------------------


def test_where_infinite_gradients_were_found_nothing_changes(interpreting: Run) -> None:
    for found in (0.0, 1.0):
        case = Case([COLUMNS, COLUMNS], TWO_BIRTHS, scalers={"found_inf": found})
        assert interpreting(changes, case) == (found == 0.0)


def test_gradients_are_unscaled_on_the_way(interpreting: Run) -> None:
    assert interpreting(worst_error, Case([COLUMNS], TWO_BIRTHS, scalers={"found_inf": 0.0, "grad_scale": 3.0})) <= 4


def test_tensors_of_all_groups_are_stepped_in_one_pass(interpreting: Run) -> None:
    case = Case([COLUMNS, [stretch(0, 3, 1)], COLUMNS], TWO_BIRTHS)
    assert interpreting(launches, case) == ["prepare_rates", "step_elements"]


def test_a_step_reads_nothing_from_the_device(interpreting: Run) -> None:
    assert interpreting(birth_step, COLUMNS, 3) == 4


# -- without Triton, and compiled --------------------------------------------------------------------------------


def test_without_triton_the_optimizers_own_code_steps(caplog: pytest.LogCaptureFixture) -> None:
    device_adam._kernels.cache_clear()
    with mock.patch("importlib.util.find_spec", return_value=None):
        assert device_adam._kernels(torch.device("cpu")) is None
    assert caplog.text == ""


def test_kernels_that_do_not_run_are_done_without(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("triton")
    device_adam._kernels.cache_clear()
    with caplog.at_level(logging.WARNING, "ds_sparkling"):
        assert device_adam._kernels(torch.device("cpu")) is None  # which isn't interpreted here
    assert "the Adam kernel doesn't run on cpu" in caplog.text


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("number", ["fp32", "bf16"])
def test_compiled_kernels_load_and_store_sixteen_bytes(number: str, capability: int) -> None:
    pytest.importorskip("triton")
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ds_sparkling.optim import device_adam_kernels as kernels

    kernel = kernels.step_elements
    types = {
        **dict.fromkeys(("programs", "stops", "run_births"), "*i32"),
        **dict.fromkeys(("entries", "tensors"), "*i64"),
        "rates": "*fp32",
        "births": "i32",
    }
    kind = {"fp32": tl.float32, "bf16": tl.bfloat16}[number]
    constants = dict.fromkeys("PGMV", kind) | {"found_inf": None, "grad_scale": None, "DECOUPLED": True}
    constants |= {"ALIGNED": True, "CONSTANTS": kernels.CONSTANTS, "TILE": 1024}
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in kernel.arg_names},
        constexprs={places[name]: value for name, value in constants.items()},
    )
    compiled = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": 4, "enable_fp_fusion": False})
    ptx = compiled.asm["ptx"]
    wide = collections.Counter(re.findall(r"(ld|st)\.global\.v4\.b32", ptx))
    # Eight elements per thread: of weights, gradient and two moments; all but the gradient are written.
    vectors = {"fp32": 2, "bf16": 1}[number]
    assert wide == {"ld": 4 * vectors, "st": 3 * vectors}
    # Whole tiles and cut ones, each with a multiplication and addition of their own for both moments.
    assert len(re.findall(r"fma\.rn\.f32", ptx)) == 2 * 8 * 2
    assert len(re.findall(r"sqrt\.rn\.f32", ptx)) == 2 * 8
    assert len(re.findall(r"div\.rn\.f32", ptx)) == 2 * 8 * 2
    assert ("cvt.rn.bf16" in ptx) == (number == "bf16")
    assert not re.findall(r"(?:sqrt|div)\.(?:approx|full)|fma\.rn\.f64", ptx)
