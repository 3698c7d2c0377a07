"""Trying an optimizer out tells whether it can be stepped piece by piece, and leaves it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_sparkling.optim.elementwise import steps_elementwise
from optimizers import CountingSGD

ELEMENTWISE: list[Callable[[Any], torch.optim.Optimizer]] = [
    lambda p: torch.optim.AdamW(p, lr=0.0, fused=True),
    lambda p: torch.optim.Adam(p, amsgrad=True, foreach=True),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.NAdam,
]


class NormalisedSGD(torch.optim.Optimizer):
    """Divides a tensor's gradient by its norm, so an element's update depends on the others."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(param.grad / param.grad.norm(), alpha=group["lr"])


@pytest.mark.parametrize("make", ELEMENTWISE)
@pytest.mark.parametrize("shape", [(7,), (3, 5)])
def test_elementwise_optimizers_are_known_and_left_alone(
    make: Callable[[Any], torch.optim.Optimizer], shape: tuple[int, ...]
) -> None:
    param = torch.ones(shape)
    optimizer = make([param])
    param.grad = torch.ones(shape)
    optimizer.step()
    state = {key: torch.as_tensor(value).clone() for key, value in optimizer.state[param].items() if value is not None}
    before = param.clone()
    assert steps_elementwise(optimizer, optimizer.param_groups[0], param)
    assert torch.equal(param, before)
    assert list(optimizer.state) == [param]
    assert optimizer.param_groups[0]["params"][0] is param
    for key, value in state.items():
        assert torch.equal(torch.as_tensor(optimizer.state[param][key]), value)


@pytest.mark.parametrize(
    "make", [NormalisedSGD, torch.optim.Adafactor, CountingSGD, lambda p: CountingSGD(p, late=True)]
)
def test_others_are_found_out(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    param = torch.ones(4, 4)
    optimizer = make([param])
    assert not steps_elementwise(optimizer, optimizer.param_groups[0], param)
    assert optimizer.param_groups[0]["params"][0] is param
