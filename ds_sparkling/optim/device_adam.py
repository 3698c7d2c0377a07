"""Adam and AdamW on a GPU, in one pass over all tensors whose births differ in learning rate and age.

Weights, gradient and both moments are read once, weights and moments written once. An element's birth follows from its
index, by the same blocks that the optimizer's other steps go by. The kernels
(:mod:`ds_sparkling.optim.device_adam_kernels`) need Triton, which PyTorch's wheels for CUDA bring along.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_sparkling.growth import Block
from ds_sparkling.growth.births import BirthRun
from ds_sparkling.optim.adam_settings import is_decoupled, is_ordinary
from ds_sparkling.optim.element_rates import Apart

logger = logging.getLogger(__name__)

#: Kinds of numbers that weights, gradients and moments may be; they are added up in float32.
_NUMBERS = (torch.float32, torch.bfloat16, torch.float16)
#: Runs of so many tiles on average are entries of their own, whose elements needn't find out where they lie.
_LONG = 32
#: Rows of more elements are never counted along by the kernel, which does so in 32 bits.
_LONGEST_ROW = 1 << 29
#: Tables that are kept, of one set of tensors each.
_MOST_TABLES = 256


class DeviceAdam:
    """The one-pass step for one optimizer.

    Args:
        optimizer: of any class; only torch's Adam and AdamW, and DeepSpeed's FusedAdam, are ever taken.
        tile: how many elements a program steps; a power of 2.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, tile: int = 1024) -> None:
        self._optimizer = optimizer
        self._tile = tile
        self._known = type(optimizer).__name__ == "FusedAdam" or type(optimizer) in (
            torch.optim.Adam,
            torch.optim.AdamW,
        )
        self._tables: dict[tuple[Any, ...], _Table] = {}

    def takes(self, group: Mapping[str, Any], param: Tensor) -> bool:
        """Whether the kernel can step ``param`` as its optimizer would."""
        state = self._optimizer.state.get(param, {})
        tensors = [param, param.grad, state.get("exp_avg"), state.get("exp_avg_sq")]
        return (
            self._known
            and is_ordinary(group)
            and all(
                isinstance(tensor, Tensor)
                and tensor.device.type == _device_type()
                and tensor.dtype in _NUMBERS
                and tensor.is_contiguous()
                for tensor in tensors
            )
            and (not _counts_on_device(state["step"], param) or state["step"].dtype == torch.float32)
            and _kernels(param.device) is not None
        )

    def step(self, apart: Sequence[Apart]) -> None:
        """Step tensors that :meth:`takes` takes, once; all that hold the same kinds of numbers in one pass.

        Nothing is read from the device. Where a gradient scaler has found infinite gradients, nothing changes.
        """
        passes: dict[_Kind, list[Apart]] = {}
        for each in apart:
            passes.setdefault(self._kind(each), []).append(each)
        for kind, members in passes.items():
            self._step(kind, members)

    def forget_blocks(self) -> None:
        """Other blocks may come for a tensor that was stepped before."""
        self._tables.clear()

    def _kind(self, each: Apart) -> _Kind:
        tensors = self._tensors(each)
        return _Kind(
            each.param.device,
            tuple(tensor.dtype for tensor in tensors),
            is_decoupled(self._optimizer, each.group),
            all(tensor.data_ptr() % 16 == 0 for tensor in tensors),
        )

    def _tensors(self, each: Apart) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        state = self._optimizer.state[each.param]
        assert each.param.grad is not None
        return each.param, each.param.grad, state["exp_avg"], state["exp_avg_sq"]

    def _step(self, kind: _Kind, members: Sequence[Apart]) -> None:
        kernels = _kernels(kind.device)
        assert kernels is not None
        births = max(len(each.by_birth) for each in members)
        addresses, settings = [], []
        for each in members:
            state = self._optimizer.state[each.param]
            count = state["step"]
            on_device = _counts_on_device(count, each.param)
            addresses += [*(tensor.data_ptr() for tensor in self._tensors(each)), count.data_ptr() if on_device else 0]
            settings += _settings(each, 0.0 if on_device else float(count), births)
            if not on_device:
                state["step"] += 1
        tensors, settings_there = _sent(addresses, settings, kind.device)
        rates = torch.empty(len(members) * (kernels.CONSTANTS + 3 * births), device=kind.device)
        found_inf, grad_scale = (self._scalers(name, kind.device) for name in ("found_inf", "grad_scale"))
        table = self._table(members, kind.device)
        with torch.cuda.device_of(members[0].param):
            kernels.prepare_rates[(len(members),)](
                tensors,
                settings_there,
                rates,
                found_inf,
                births,
                DECOUPLED=kind.decoupled,
                SETTINGS=kernels.SETTINGS,
                CONSTANTS=kernels.CONSTANTS,
                PADDED=_power_of_two(births),
            )
            if len(table.programs):
                p, g, m, v = (kernels.NUMBERS[dtype] for dtype in kind.numbers)
                kernels.step_elements[(len(table.programs),)](
                    table.programs,
                    table.entries,
                    table.stops,
                    table.births,
                    tensors,
                    rates,
                    births,
                    found_inf,
                    grad_scale,
                    P=p,
                    G=g,
                    M=m,
                    V=v,
                    DECOUPLED=kind.decoupled,
                    ALIGNED=kind.aligned,
                    CONSTANTS=kernels.CONSTANTS,
                    TILE=self._tile,
                    enable_fp_fusion=False,
                )

    def _scalers(self, name: str, device: torch.device) -> Tensor | None:
        """What a gradient scaler leaves for a fused optimizer to do, if there is one."""
        value = getattr(self._optimizer, name, None)
        return None if value is None else value.to(device, torch.float32, non_blocking=True)

    def _table(self, members: Sequence[Apart], device: torch.device) -> _Table:
        """What the programs work on; made once for the same grown tensors."""
        # While all of a tensor is treated alike, it is a single block, and not those of its births.
        key = tuple((each.param, each.blocks[0] if len(each.blocks) == 1 else None) for each in members)
        if key not in self._tables:
            if len(self._tables) >= _MOST_TABLES:
                self._tables.clear()
            self._tables[key] = _Table([each.blocks for each in members], self._tile, device)
        return self._tables[key]


class _Kind(NamedTuple):
    """What tensors that are stepped in one pass have in common."""

    device: torch.device
    numbers: tuple[torch.dtype, ...]
    decoupled: bool
    aligned: bool


class _Table:
    """Which elements each program steps, and their births; see the kernels for the layout.

    Attributes:
        programs, entries, stops, births: tensors that the kernel reads.
    """

    def __init__(self, tensors: Sequence[Sequence[Block]], tile: int, device: torch.device) -> None:
        entries: list[tuple[int, ...]] = []
        counts: list[int] = []
        stops: list[int] = []
        births: list[int] = []
        placed: dict[tuple[BirthRun, ...], int] = {}
        programs = 0
        for tensor, blocks in enumerate(tensors):
            for start, stop, runs in _entries(blocks, _LONG * tile):
                size = _power_of_two(len(runs))
                if runs not in placed:
                    placed[runs] = len(stops)
                    padded = [*runs, *[runs[-1]] * (size - len(runs))]
                    # A run of a single birth may be longer than 32 bits tell, and nobody looks for its end.
                    stops += [run.stop if size > 1 else 0 for run in padded]
                    births += [run.birth for run in padded]
                first, end = start // tile, -(-stop // tile)
                row = runs[-1].stop
                entries.append((tensor, start, stop, row, first - programs, placed[runs], size.bit_length() - 1))
                counts.append(end - first)
                programs += end - first
        numbers = torch.arange(len(entries), dtype=torch.int32)
        self.programs = torch.repeat_interleave(numbers, torch.tensor(counts, dtype=torch.int64)).to(device)
        self.entries = torch.tensor(entries, dtype=torch.int64, device=device)
        self.stops = torch.tensor(stops, dtype=torch.int32, device=device)
        self.births = torch.tensor(births, dtype=torch.int32, device=device)


def _entries(blocks: Sequence[Block], long: int) -> Iterator[tuple[int, int, tuple[BirthRun, ...]]]:
    """First element, element after the last, and runs of each row, of what programs are told to work on."""
    for block in blocks:
        if len(block.runs) == 1 or block.row < min(_LONGEST_ROW, long * len(block.runs)):
            yield block.start, block.stop, block.runs
            continue
        for row in range(block.rows):
            start = block.start + row * block.row
            column = 0
            for run in block.runs:
                yield start + column, start + run.stop, (BirthRun(run.stop - column, run.birth),)
                column = run.stop


def _settings(each: Apart, done: float, births: int) -> list[float]:
    """A tensor's row of settings for the kernel that prepares rates."""
    group = each.group
    beta1, beta2 = (float(beta) for beta in group["betas"])
    # torch.lerp's weight; from the other end if that is nearer.
    weight = 1.0 - beta1 if 1.0 - beta1 < 0.5 else -beta1
    corrects = group.get("bias_correction", True)
    logs = [math.log(beta) if corrects and beta > 0 else -math.inf for beta in (beta1, beta2)]
    ages = [math.inf if treatment.age is None else float(treatment.age) for treatment in each.by_birth]
    padding = [0.0] * (births - len(each.by_birth))
    return [
        *(done, group["weight_decay"], *logs, weight, beta2, 1.0 - beta2, group["eps"]),
        *(treatment.lr for treatment in each.by_birth),
        *padding,
        *ages,
        *padding,
    ]


def _sent(addresses: Sequence[int], settings: Sequence[float], device: torch.device) -> tuple[Tensor, Tensor]:
    """Both as tensors on the device, by one copy that nobody waits for."""
    bits = torch.empty(len(addresses) + len(settings), dtype=torch.int64, pin_memory=device.type == "cuda")
    bits[: len(addresses)] = torch.tensor(addresses, dtype=torch.int64)
    bits[len(addresses) :].view(torch.float64)[:] = torch.tensor(settings, dtype=torch.float64)
    there = bits.to(device, non_blocking=True)
    return there[: len(addresses)], there[len(addresses) :].view(torch.float64)


def _counts_on_device(count: Any, param: Tensor) -> bool:
    return isinstance(count, Tensor) and count.device == param.device


def _power_of_two(number: int) -> int:
    """The least power of two that isn't less."""
    return 1 << (number - 1).bit_length()


def _device_type() -> str:
    """Where Triton's kernels run: its interpreter reads the memory of the CPU."""
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@functools.cache
def _kernels(device: torch.device) -> Any:
    """The module of kernels, which have been tried on ``device``; None where they don't run."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        from ds_sparkling.optim import device_adam_kernels as kernels

        with torch.cuda.device(device) if device.type == "cuda" else torch.no_grad():
            tensors = torch.zeros(5, dtype=torch.int64, device=device)
            settings = torch.zeros(kernels.SETTINGS + 2, dtype=torch.float64, device=device)
            rates = torch.zeros(kernels.CONSTANTS + 3, device=device)
            names = {"SETTINGS": kernels.SETTINGS, "CONSTANTS": kernels.CONSTANTS}
            kernels.prepare_rates[(1,)](tensors, settings, rates, None, 1, DECOUPLED=True, PADDED=1, **names)
    except Exception as error:  # whatever a compiler, a driver or Triton itself may say
        logger.warning("the Adam kernel doesn't run on %s, so steps after a growth take longer: %s", device, error)
        return None
    return kernels
