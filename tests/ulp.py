"""Distances of fp32 tensors in units in the last place."""

from __future__ import annotations

import torch
from torch import Tensor


def ulps(first: Tensor, second: Tensor) -> int:
    """The largest distance of two fp32 tensors' elements; 0 if they are empty."""

    def ordered(tensor: Tensor) -> Tensor:
        bits = tensor.contiguous().view(torch.int32).long()
        return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    return int((ordered(first) - ordered(second)).abs().max()) if first.numel() else 0
