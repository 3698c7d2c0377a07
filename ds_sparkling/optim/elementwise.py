"""Find out, by trying, whether an optimizer can be stepped piece by piece."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ds_sparkling.optim.optimizer_trial import SMALL, STEPS, random_like, step_apart


def steps_elementwise(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], like: Tensor) -> bool:
    """Whether the update of an element depends on its own gradient and state and on settings alone.

    A small tensor is stepped as a whole, and again as two 1-D pieces; the optimizer's state and groups stay.

    Args:
        optimizer: the optimizer.
        group: one of its parameter groups.
        like: one of its tensors; the small one has its device, dtype and number of dimensions (two at most).

    Raises:
        UnsupportedError: if the optimizer can't be tried.
    """
    start, *gradients = random_like(SMALL[like.dim() > 1], like, STEPS + 1)
    whole = step_apart(optimizer, group, [start], [[gradient] for gradient in gradients])
    if whole.counted:
        return False  # it counts in the group, whose copies the pieces get
    sizes = [start.numel() // 3, start.numel() - start.numel() // 3]
    # One group each, as in a step (an optimizer may keep one step count for all tensors of a group).
    pieces = step_apart(
        optimizer, group, start.flatten().split(sizes), [gradient.flatten().split(sizes) for gradient in gradients]
    )
    return torch.allclose(whole.tensors[0].flatten(), torch.cat(pieces.tensors), rtol=1e-5, atol=1e-7)
