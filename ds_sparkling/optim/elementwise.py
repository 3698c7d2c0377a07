"""Whether an optimizer can be stepped piece by piece: found out by trying."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

_STEPS = 3
_SHAPE = (4, 6)


@torch.no_grad()
def steps_elementwise(optimizer: torch.optim.Optimizer, group: dict[str, Any], like: Tensor) -> bool:
    """Whether the update of an element depends on its own gradient and state and on settings alone.

    A small tensor is stepped as a whole, and again as two 1-D pieces; the optimizer's state and groups stay.

    Args:
        optimizer: the optimizer.
        group: one of its parameter groups.
        like: one of its tensors; the small one has its device, dtype and number of dimensions (two at most).
    """
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(_STEPS + 1, *_SHAPE, generator=generator).to(device=like.device, dtype=like.dtype)
    start, gradients = values[0], values[1:]
    whole = start.clone() if like.dim() > 1 else start.flatten()
    pieces = list(start.flatten().clone().split([start.numel() // 3, start.numel() - start.numel() // 3]))
    own = optimizer.state, optimizer.param_groups
    try:
        for tensors in ([whole], pieces):
            optimizer.state = defaultdict(dict)
            # One group each, as in a step (an optimizer may keep one step count for all tensors of a group).
            tried = [{**group, "params": [tensor], "lr": 0.01} for tensor in tensors]
            optimizer.param_groups = [*tried]
            settings = [{key: value for key, value in one.items() if key != "params"} for one in tried]
            for gradient in gradients:
                for tensor, grad in zip(tensors, gradient.flatten().split([t.numel() for t in tensors]), strict=True):
                    tensor.grad = grad.clone().view(tensor.shape)
                optimizer.step()
            if any(one[key] != value for one, was in zip(tried, settings, strict=True) for key, value in was.items()):
                return False  # it counts in the group, whose copies the pieces get
    finally:
        optimizer.state, optimizer.param_groups = own
    return torch.allclose(whole.flatten(), torch.cat(pieces), rtol=1e-5, atol=1e-7)
