"""Optimizers for tests that keep what torch's own don't."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]


class ScheduleFreeAdam(torch.optim.Optimizer):
    """Like the schedule-free ones: parameters are y = (1 - beta) z + beta x, z is what takes steps, x its average.

    Args:
        counts: count steps in the groups, as the published ones do, instead of per tensor.
    """

    def __init__(self, params: Any, lr: float = 1e-2, *, counts: bool = False) -> None:
        self.counts = counts
        super().__init__(params, {"lr": lr, "beta": 0.9, "weight_decay": 0.0, "train_mode": False})

    def train(self) -> None:
        for group in self.param_groups:
            group["train_mode"] = True

    @torch.no_grad()
    def averaged(self, group: dict[str, Any], param: Tensor) -> Tensor:
        """x: what the model is evaluated at."""
        z: Tensor = self.state[param]["z"]
        return (param - (1 - group["beta"]) * z) / group["beta"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("call train() before step()")
            if self.counts:
                group["k"] = group.get("k", 0) + 1
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["z"] = param.clone()
                    state["exp_avg_sq"] = torch.zeros_like(param)
                    if not self.counts:
                        state["step"] = 0
                if not self.counts:
                    state["step"] += 1
                count = group["k"] if self.counts else state["step"]
                x = (param - (1 - group["beta"]) * state["z"]) / group["beta"]
                state["exp_avg_sq"].mul_(0.95).addcmul_(param.grad, param.grad, value=0.05)
                denominator = (state["exp_avg_sq"] / (1 - 0.95**count)).sqrt_().add_(1e-8)
                state["z"].addcdiv_(param.grad, denominator, value=-group["lr"])
                x.lerp_(state["z"], 1 / count)
                param.copy_((1 - group["beta"]) * state["z"] + group["beta"] * x)


class Keeping(torch.optim.Optimizer):
    """SGD that keeps something of each tensor besides.

    Args:
        keep: makes it, by name, from the tensor.
        above: only of tensors with more elements.
    """

    def __init__(self, params: Any, keep: dict[str, Callable[[Tensor], Any]], above: int = 0) -> None:
        self.keep, self.above = keep, above
        super().__init__(params, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                if not self.state[param] and param.numel() > self.above:
                    self.state[param].update({key: make(param) for key, make in self.keep.items()})
                param.sub_(param.grad, alpha=group["lr"])


class CountingSGD(torch.optim.Optimizer):
    """Counts its steps in the parameter group.

    Args:
        late: begin at the first step.
    """

    def __init__(self, params: Any, late: bool = False) -> None:
        super().__init__(params, {"lr": 0.1, **({} if late else {"step": 0})})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(param.grad, alpha=group["lr"])


class Wrapping(torch.optim.Optimizer):
    """Steps another optimizer, as look-ahead and schedule-free wrappers do."""

    def __init__(self, params: Any) -> None:
        self.base = torch.optim.SGD(params, lr=0.1)
        self.param_groups = self.base.param_groups
        self.defaults = self.base.defaults
        self.state = self.base.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base.step()


class FusedAdam(torch.optim.Optimizer):
    """As DeepSpeed's, which needs a GPU: it counts in the state of a group's last tensor, for all of them.

    Args:
        counts_each: count in every tensor's state instead.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        *,
        counts_each: bool = False,
    ) -> None:
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})
        self.adam_w_mode = int(adam_w_mode)
        self.counts_each = counts_each

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            stepped = [param for param in group["params"] if param.grad is not None]
            for param in stepped:
                if not self.state[param]:
                    zeros = (torch.zeros_like(param), torch.zeros_like(param))
                    self.state[param].update(step=0, exp_avg=zeros[0], exp_avg_sq=zeros[1])
            for param in stepped if self.counts_each else stepped[-1:]:
                self.state[param]["step"] += 1
            for param in stepped:
                counted = self.state[param if self.counts_each else stepped[-1]]["step"]
                self._step(group, param, self.state[param], counted if group["bias_correction"] else math.inf)

    def _step(self, group: dict[str, Any], param: Tensor, state: dict[str, Any], count: float) -> None:
        beta1, beta2 = group["betas"]
        grad = param.grad if self.adam_w_mode else param.grad + group["weight_decay"] * param
        state["exp_avg"].mul_(beta1).add_(grad, alpha=1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = (
            state["exp_avg"] / (1 - beta1**count) / ((state["exp_avg_sq"] / (1 - beta2**count)).sqrt() + group["eps"])
        )
        if self.adam_w_mode:
            update += group["weight_decay"] * param
        param.sub_(update, alpha=group["lr"])
