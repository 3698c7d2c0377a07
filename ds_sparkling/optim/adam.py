"""Adam and AdamW on the CPU, in one pass over a tensor whose birth stages differ in learning rate and age.

The kernel (``adam.cpp``) is compiled at its first use and kept by PyTorch's extension cache.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import cpp_extension

from ds_sparkling.optim.segments import Segment
from ds_sparkling.optim.treatment import Treatment

logger = logging.getLogger(__name__)

#: No contraction: it would round by where vector loops begin and end.
_FLAGS = ["-O3", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
#: Further flags by what PyTorch finds that the CPU can do.
_VECTORS = {
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mprefer-vector-width=512"],
    "AVX2": ["-mavx2", "-mfma"],
}


class AdamKernel:
    """The one-pass step for one optimizer.

    Args:
        optimizer: of any class; only Adam and AdamW of torch, and DeepSpeedCPUAdam, are ever taken.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._deepspeed = type(optimizer).__name__ == "DeepSpeedCPUAdam"
        self._known = self._deepspeed or type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
        self._decoupled = getattr(optimizer, "adam_w_mode", isinstance(optimizer, torch.optim.AdamW))
        self._tables: dict[int, tuple[Sequence[Segment], Any]] = {}

    def takes(self, group: Mapping[str, Any], param: Tensor) -> bool:
        """Whether the kernel can step ``param`` as its optimizer would."""
        state = self._optimizer.state.get(param, {})
        tensors = [param, param.grad, state.get("exp_avg"), state.get("exp_avg_sq")]
        return (
            self._known
            and all(
                isinstance(tensor, Tensor)
                and tensor.device.type == "cpu"
                and tensor.dtype == torch.float32
                and tensor.is_contiguous()
                for tensor in tensors
            )
            and not any(group.get(key) for key in ("amsgrad", "maximize", "capturable", "differentiable"))
            and group.get("bias_correction", True)
            and getattr(self._optimizer, "grad_scale", None) is None
            and _library() is not None
        )

    def step(
        self, group: Mapping[str, Any], param: Tensor, segments: Sequence[Segment], stages: Sequence[Treatment]
    ) -> None:
        """Step ``param`` once.

        Args:
            group: its parameter group.
            param: 1-D or of any contiguous shape, with its gradient.
            segments: the birth stages of its elements.
            stages: what each birth stage gets.
        """
        state = self._optimizer.state[param]
        done = int(state["step"])
        state["step"] += 1
        rate = _deepspeed_rate if self._deepspeed else _torch_rate
        rates = [rate(group, stage.lr, (done if stage.age is None else min(done, stage.age)) + 1) for stage in stages]
        beta1, beta2 = (float(beta) for beta in group["betas"])
        one, first, second = (np.float32 if self._deepspeed else np.float64)(1.0), beta1, beta2
        if self._deepspeed:
            first, second = np.float32(beta1), np.float32(beta2)
        constants = (beta1, beta2, one - first, one - second, group["eps"], group["weight_decay"])
        library = _library()
        assert library is not None
        assert param.grad is not None
        library.ds_sparkling_adam_step(
            ctypes.c_void_p(param.data_ptr()),
            ctypes.c_void_p(param.grad.data_ptr()),
            ctypes.c_void_p(state["exp_avg"].data_ptr()),
            ctypes.c_void_p(state["exp_avg_sq"].data_ptr()),
            self._table(param, segments),
            ctypes.c_int64(len(segments)),
            (_Rate * len(rates))(*(_Rate(*rate) for rate in rates)),
            ctypes.byref(_Constants(*(float(constant) for constant in constants))),
            ctypes.c_int(self._deepspeed),
            ctypes.c_int(bool(group.get("decoupled_weight_decay", self._decoupled))),
            ctypes.c_int(torch.get_num_threads()),
        )

    def _table(self, param: Tensor, segments: Sequence[Segment]) -> Any:
        """The segments as the kernel reads them; made once."""
        known = self._tables.get(id(param))
        if known is None or known[0] is not segments:
            entries = [
                _Segment(s.start, s.stop, s.births, None)
                if isinstance(s.births, int)
                else _Segment(s.start, s.stop, 0, s.births.data_ptr())
                for s in segments
            ]
            known = self._tables[id(param)] = (segments, (_Segment * len(entries))(*entries))
        return known[1]


class _Rate(ctypes.Structure):
    _fields_ = [("decay", ctypes.c_float), ("step_size", ctypes.c_float), ("correction", ctypes.c_float)]


class _Segment(ctypes.Structure):
    _fields_ = [
        ("start", ctypes.c_int64),
        ("stop", ctypes.c_int64),
        ("stage", ctypes.c_int64),
        ("births", ctypes.c_void_p),
    ]


class _Constants(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_float)
        for name in ("beta1", "beta2", "one_minus_beta1", "one_minus_beta2", "eps", "weight_decay")
    ]


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


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernel; None where there is no compiler."""
    capability = torch.backends.cpu.get_cpu_capability()
    name = f"ds_sparkling_adam_{capability.lower()}"
    directory = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()) / name
    try:
        directory.mkdir(parents=True, exist_ok=True)
        cpp_extension.load(
            name,
            [str(Path(__file__).with_name("adam.cpp"))],
            extra_cflags=[*_FLAGS, *_VECTORS.get(capability, [])],
            extra_ldflags=["-fopenmp"],
            build_directory=str(directory),
            is_python_module=False,
        )
        return ctypes.CDLL(str(directory / f"{name}.so"))
    except Exception as error:
        logger.warning("the Adam kernel can't be built, so steps after a growth take longer: %s", error)
        return None
