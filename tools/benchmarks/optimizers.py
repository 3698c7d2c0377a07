"""The optimizers whose step is measured; each imported when it is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

_ADAM: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}


def _of_torch(name: str, **options: Any) -> Callable[[list[Tensor]], Optimizer]:
    def make(params: list[Tensor]) -> Optimizer:
        import torch

        return getattr(torch.optim, name)(params, **options)

    return make


def _cpu_adam(params: list[Tensor]) -> Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(params, **_ADAM)


def _cpu_lion(params: list[Tensor]) -> Optimizer:
    from deepspeed.ops.lion import DeepSpeedCPULion

    return DeepSpeedCPULion(params, lr=1e-4, weight_decay=0.1)


OPTIMIZERS: dict[str, Callable[[list[Tensor]], Optimizer]] = {
    "adamw-fused": _of_torch("AdamW", fused=True, **_ADAM),
    "adamw-foreach": _of_torch("AdamW", foreach=True, **_ADAM),
    "adamw-amsgrad": _of_torch("AdamW", fused=True, amsgrad=True, **_ADAM),
    "deepspeed-cpu-adam": _cpu_adam,
    "deepspeed-cpu-lion": _cpu_lion,
    "sgd": _of_torch("SGD", lr=0.01, momentum=0.9, weight_decay=0.1),
    "rmsprop": _of_torch("RMSprop", lr=1e-3),
    "adagrad": _of_torch("Adagrad", lr=0.01),
}
