"""Adam and AdamW on the CPU, in one pass over a tensor whose births differ in learning rate and age.

The kernel (``adam.cpp``) is compiled at its first use.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ds_sparkling.growth import Block
from ds_sparkling.native import library
from ds_sparkling.optim.adam_settings import is_decoupled, is_ordinary
from ds_sparkling.optim.element_rates import Apart


class AdamKernel:
    """The one-pass step for one optimizer.

    Args:
        optimizer: of any class; only torch's fused Adam and AdamW, and DeepSpeedCPUAdam, are ever taken.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._deepspeed = type(optimizer).__name__ == "DeepSpeedCPUAdam"
        self._known = self._deepspeed or type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
        self._tables: dict[Tensor, _Table] = {}

    def takes(self, group: Mapping[str, Any], param: Tensor) -> bool:
        """Whether the kernel can step ``param`` as its optimizer would."""
        state = self._optimizer.state.get(param, {})
        tensors = [param, param.grad, state.get("exp_avg"), state.get("exp_avg_sq")]
        return (
            self._known
            # torch's other implementations round as its vector maths library does, which differs between builds.
            and (self._deepspeed or group.get("fused") is True)
            and all(
                isinstance(tensor, Tensor)
                and tensor.device.type == "cpu"
                and tensor.dtype == torch.float32
                and tensor.is_contiguous()
                for tensor in tensors
            )
            and is_ordinary(group)
            and group.get("bias_correction", True)
            # What a gradient scaler leaves for torch's kernel to do.
            and getattr(self._optimizer, "grad_scale", None) is None
            and getattr(self._optimizer, "found_inf", None) is None
            and _library() is not None
        )

    def step(self, apart: Sequence[Apart]) -> None:
        """Step tensors that :meth:`takes` takes, once; of any contiguous shape, with their gradients."""
        for each in apart:
            self._step(each)

    def _step(self, each: Apart) -> None:
        group, param = each.group, each.param
        state = self._optimizer.state[param]
        done = int(state["step"])
        state["step"] += 1
        rate = _deepspeed_rate if self._deepspeed else _torch_rate
        rates = [
            rate(group, birth.lr, (done if birth.age is None else min(done, birth.age)) + 1) for birth in each.by_birth
        ]
        precision = np.float32 if self._deepspeed else np.float64
        betas = [precision(beta) for beta in group["betas"]]
        constants = [*betas, *(precision(1.0) - beta for beta in betas), group["eps"], group["weight_decay"]]
        table = self._table(param, each.blocks)
        library = _library()
        assert library is not None
        assert param.grad is not None
        library.ds_sparkling_adam_step(
            ctypes.c_void_p(param.data_ptr()),
            ctypes.c_void_p(param.grad.data_ptr()),
            ctypes.c_void_p(state["exp_avg"].data_ptr()),
            ctypes.c_void_p(state["exp_avg_sq"].data_ptr()),
            table.blocks,
            ctypes.c_int64(table.count),
            (_Rate * len(rates))(*(_Rate(*rate) for rate in rates)),
            ctypes.byref(_Constants(*(float(constant) for constant in constants))),
            ctypes.c_int(self._deepspeed),
            ctypes.c_int(is_decoupled(self._optimizer, group)),
            ctypes.c_int(torch.get_num_threads()),
        )

    def forget_blocks(self) -> None:
        """Other blocks may come for a tensor that was stepped before."""
        self._tables.clear()

    def _table(self, param: Tensor, blocks: Sequence[Block]) -> _Table:
        """The blocks as the kernel reads them; made once for those of a grown tensor."""
        if len(blocks) == 1:
            return _Table(blocks)
        if param not in self._tables:
            self._tables[param] = _Table(blocks)
        return self._tables[param]


class _Rate(ctypes.Structure):
    _fields_ = [("decay", ctypes.c_float), ("step_size", ctypes.c_float), ("correction", ctypes.c_float)]


class _BirthRun(ctypes.Structure):
    _fields_ = [("stop", ctypes.c_int64), ("birth", ctypes.c_int64)]


class _Block(ctypes.Structure):
    _fields_ = [
        ("start", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("row", ctypes.c_int64),
        ("runs", ctypes.POINTER(_BirthRun)),
        ("count", ctypes.c_int64),
    ]


class _Constants(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_float)
        for name in ("beta1", "beta2", "one_minus_beta1", "one_minus_beta2", "eps", "weight_decay")
    ]


class _Table:
    """Blocks as the kernel reads them."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._runs = [
            (_BirthRun * len(block.runs))(*(_BirthRun(run.stop, run.birth) for run in block.runs)) for block in blocks
        ]
        self.count = len(blocks)
        self.blocks = (_Block * self.count)(
            *(
                _Block(block.start, block.rows, block.row, runs, len(runs))
                for block, runs in zip(blocks, self._runs, strict=True)
            )
        )


def _torch_rate(group: Mapping[str, Any], lr: float, t: int) -> tuple[float, float, float]:
    """Decay factor, step size and bias correction of step ``t``, in double as torch computes them."""
    beta1, beta2 = (float(beta) for beta in group["betas"])
    return 1.0 - lr * group["weight_decay"], lr / (1.0 - beta1**t), math.sqrt(1.0 - beta2**t)


def _deepspeed_rate(group: Mapping[str, Any], lr: float, t: int) -> tuple[float, float, float]:
    """The same as DeepSpeedCPUAdam computes them, in single precision."""
    f = np.float32
    beta1_t, beta2_t = (f(float(f(beta)) ** t) for beta in group["betas"])
    step_size = f(-1.0) * f(lr) / (f(1.0) - beta1_t)
    correction = f(1.0) / np.sqrt(f(1.0) - beta2_t)
    return float(f(-1.0) * f(lr) * f(group["weight_decay"])), float(step_size), float(correction)


def _library() -> ctypes.CDLL | None:
    """The compiled kernel; None where there is no compiler."""
    return library(Path(__file__).with_name("adam.cpp"), "steps after a growth take longer")
