"""A step after a growth by the optimizer's own code, on devices that nothing is read from: tensors without data."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ds_sparkling.growth import Block, birth_blocks
from ds_sparkling.growth.births import join, stretch
from ds_sparkling.optim.scheduler import RewarmupScheduler
from ds_sparkling.optim.step import _CHUNK, _CHUNK_ON_DEVICE, BirthStep, _chunk_in
from ds_sparkling.spec.axes import FIXED, Dim, ParamAxes, Role
from ds_sparkling.spec.birth_schedule import Birth
from ds_sparkling.spec.strategy import Rewarmup


class Launches(TorchDispatchMode):
    """Counts what runs on the meta device, but for views and empty tensors. (Reading its values is an error there.)"""

    def __init__(self) -> None:
        super().__init__()
        self.counted: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        tensors = [value for value in torch.utils._pytree.tree_leaves((args, made)) if isinstance(value, Tensor)]
        name = function.overloadpacket.__name__
        if any(tensor.is_meta for tensor in tensors) and not function.is_view and "empty" not in name:
            self.counted[name] += 1
        return made


def large_model(experts: int = 8, layers: int = 27) -> list[Block]:
    """One rank's part of a model of 16e9 parameters on 8 ranks, its experts' width doubled: ZeRO and expert parallel.

    64 experts of 2048 times 1408 in three matrices each, 8 of them here, and an eighth of everything else.
    """
    hidden, inner = 2048, 1408
    widths = {"inner": (inner // 2, inner)}
    out = ParamAxes((FIXED, Dim("inner", Role.FAN_OUT), FIXED), stacked_experts=True)
    back = ParamAxes((FIXED, FIXED, Dim("inner", Role.FAN_IN)), stacked_experts=True)
    matrices = [(out, (experts, inner, hidden))] * 2 + [(back, (experts, hidden, inner))]
    blocks: list[Block] = []
    end = 0
    for _ in range(layers):
        for axes, shape in matrices:
            numel = torch.Size(shape).numel()
            for block in birth_blocks(axes, shape, widths, 0, numel):
                blocks.append(dataclasses.replace(block, start=end + block.start))
            end += numel
        blocks.append(stretch(end, end + 4_000_000, 0))
        end += 4_000_000
    return join(blocks)


def grown(make: Any, blocks: list[Block], state: dict[str, Any]) -> torch.optim.Optimizer:
    """An optimizer that tells births apart, and whose only tensor has no data."""
    param = torch.empty(blocks[-1].stop, device="meta")
    param.grad = torch.empty_like(param)
    optimizer: torch.optim.Optimizer = make([param])
    optimizer.state[param].update(
        {key: torch.empty_like(param) if value is None else value for key, value in state.items()}
    )
    scheduler = RewarmupScheduler(None, optimizer)
    births = max(run.birth for block in blocks for run in block.runs)
    scheduler.births = (Birth(Rewarmup(ratio=1.3, steps=10), (0.02,), None, True, 3),) * births
    BirthStep(optimizer, scheduler, {param: 0}, lambda: {param: blocks})
    return optimizer


ADAM = {"step": torch.tensor(100.0), "exp_avg": None, "exp_avg_sq": None}
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (lambda params: torch.optim.AdamW(params, lr=0.02, foreach=True), ADAM),
    "adamw-single": (lambda params: torch.optim.AdamW(params, lr=0.02, foreach=False), ADAM),
    "adamw-amsgrad": (
        lambda params: torch.optim.AdamW(params, lr=0.02, foreach=True, amsgrad=True),
        {**ADAM, "max_exp_avg_sq": None},
    ),
    "adam-on-device": (
        lambda params: torch.optim.Adam(params, lr=0.02, foreach=False, differentiable=True),
        {**ADAM, "step": torch.empty((), device="meta")},
    ),
    "sgd": (lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9, foreach=True), {"momentum_buffer": None}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_reads_nothing_from_the_device(name: str) -> None:
    make, state = OPTIMIZERS[name]
    optimizer = grown(make, large_model(1, 2), state)
    with Launches() as launches:
        optimizer.step()
    assert launches.counted["clone"] > 4


def test_a_large_models_step_takes_few_launches() -> None:
    """Without a kernel for its optimizer. A chunk of 2^20 elements would take 21,000."""
    make, state = OPTIMIZERS["adamw"]
    blocks = large_model()
    assert 1.9e9 < blocks[-1].stop < 2.1e9
    optimizer = grown(make, blocks, state)
    with Launches() as launches:
        optimizer.step()
    assert launches.counted.total() <= 2000, launches.counted


def test_a_chunk_fits_into_free_memory() -> None:
    assert _chunk_in(80e9) == _CHUNK_ON_DEVICE
    assert _CHUNK < _chunk_in(1e9) < 1e9 / 30
    assert _chunk_in(0) == _CHUNK
