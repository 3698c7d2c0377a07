"""Muon (Jordan et al. 2024) as DeepSpeed's ZeRO applies it: gradients are orthogonalised, then stepped as by SGD.

The second half is elementwise, which is what gives new elements a learning rate of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


@torch.no_grad()
def orthogonalise(optimizer: torch.optim.Optimizer) -> None:
    """Replace every gradient by the orthogonalised momentum, Nesterov's, scaled as in DeepSpeed by sqrt(rows/columns).

    Stacked experts [E, rows, columns] are matrices one by one. The momentum is the state ``momentum_buffer``.
    """
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is None:
                continue
            state = optimizer.state[param]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(param)
            momentum = state["momentum_buffer"].lerp_(param.grad, 1 - _MOMENTUM)
            update = newton_schulz(param.grad.lerp(momentum, _MOMENTUM))
            param.grad = update * max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5


def newton_schulz(matrices: Tensor) -> Tensor:
    """An approximation of U V^T for each matrix U S V^T of [..., rows, columns]."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
