"""Steps of the one-pass Adam kernel for GPUs, taken by Triton's interpreter; for a process with TRITON_INTERPRET=1."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ds_sparkling.growth import Block
from ds_sparkling.optim.adam import AdamKernel
from ds_sparkling.optim.device_adam import DeviceAdam, _kernels
from ds_sparkling.optim.element_rates import Apart, Treatment
from ds_sparkling.optim.scheduler import RewarmupScheduler
from ds_sparkling.optim.step import BirthStep
from ds_sparkling.spec.birth_schedule import Birth
from ds_sparkling.spec.strategy import Rewarmup
from grown_parameters import expand
from optimizers import FusedAdam

MAKE: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "Adam": torch.optim.Adam,
    "FusedAdam": FusedAdam,
}


@dataclass(frozen=True)
class Case:
    """Tensors to be stepped.

    Attributes:
        blocks: of each tensor, the births of its elements.
        treatments: what each birth gets.
        optimizer: of :data:`MAKE`.
        settings: the optimizer's arguments.
        dtype: of weights and moments.
        done: steps that were taken before.
        scalers: what a gradient scaler leaves at the optimizer.
    """

    blocks: Sequence[Sequence[Block]]
    treatments: tuple[Treatment, ...]
    optimizer: str = "AdamW"
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    done: int = 7
    scalers: dict[str, float] = field(default_factory=dict)
    tile: int = 64


def prepare() -> None:
    """Let the interpreter round as a GPU does: once in a fused multiplication and addition, and to the nearest."""
    from triton.runtime import interpreter

    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}

    def fma(_: Any, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    def converted(values: Any, source: Any, target: Any, _: Any) -> Any:
        found = torch.from_numpy(np.ascontiguousarray(values)).view(kinds[str(source)]).to(kinds[str(target)])
        return found.view(torch.int16 if found.element_size() == 2 else torch.int32).numpy()

    interpreter.InterpreterBuilder.create_fma = fma
    interpreter._convert_float = converted
    np.seterr(all="ignore")  # lanes that a mask leaves out


class Stepped:
    """The tensors of a case, with an optimizer and state, before and after a step."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(0)
        self.case = case
        self.params = []
        for blocks in case.blocks:
            numel = blocks[-1].stop if blocks else 0
            param, grad, first = (torch.randn(numel, generator=generator).to(case.dtype) for _ in range(3))
            second = (torch.rand(numel, generator=generator) + 1e-3).to(case.dtype)
            param.grad = grad
            self.params.append(param)
            if param is self.params[0]:
                self.optimizer = MAKE[case.optimizer]([param], **case.settings)
            else:
                self.optimizer.add_param_group({"params": [param]})
            count = case.done if case.optimizer == "FusedAdam" else torch.tensor(float(case.done))
            self.optimizer.state[param].update(step=count, exp_avg=first, exp_avg_sq=second)
        for name, value in case.scalers.items():
            setattr(self.optimizer, name, torch.tensor(value))
        self.apart = [
            Apart(group, group["params"][0], blocks, case.treatments)
            for group, blocks in zip(self.optimizer.param_groups, case.blocks, strict=True)
        ]
        self.before = self.now()

    def now(self) -> list[tuple[Tensor, ...]]:
        """Weights, gradient and moments of each tensor."""
        found: list[tuple[Tensor, ...]] = []
        for param in self.params:
            state = self.optimizer.state[param]
            assert param.grad is not None
            found.append((param.clone(), param.grad.clone(), state["exp_avg"].clone(), state["exp_avg_sq"].clone()))
        return found

    def counts(self) -> list[int]:
        return [int(self.optimizer.state[param]["step"]) for param in self.params]

    def step(self) -> Stepped:
        kernel = DeviceAdam(self.optimizer, tile=self.case.tile)
        for each in self.apart:
            assert kernel.takes(each.group, each.param)
        kernel.step(self.apart)
        return self


def worst_error(case: Case) -> float:
    """The largest distance of weights or moments from a step in float64, in ulp of their kind of numbers.

    Where terms cancel, it is in ulp of these. Also holds a float32 step of torch's optimizers bit for
    bit against that of the kernel for CPUs.
    """
    stepped = Stepped(case).step()
    worst = 0.0
    beta1, beta2 = stepped.optimizer.param_groups[0]["betas"]
    group = stepped.optimizer.param_groups[0]
    decoupled = group.get("decoupled_weight_decay", getattr(stepped.optimizer, "adam_w_mode", None))
    fine = {torch.float32: 1.0, torch.bfloat16: 2.0**16, torch.float16: 2.0**13}[case.dtype]
    for blocks, before, after in zip(case.blocks, stepped.before, stepped.now(), strict=True):
        births = expand(list(blocks), len(before[0])).long()
        lr = torch.tensor([each.lr for each in case.treatments], dtype=torch.float64)[births]
        ages = [case.done if each.age is None else min(case.done, each.age) for each in case.treatments]
        t = torch.tensor(ages, dtype=torch.float64)[births] + 1
        p, g, m, v = (tensor.double() for tensor in before)
        decay = group["weight_decay"]
        g = unscaled = g / case.scalers.get("grad_scale", 1.0)
        # Beside the results, what they would be if nothing cancelled.
        large = g.abs()
        if decoupled:
            p = p * (1 - lr * decay)
        else:
            g, large = g + p * decay, large + p.abs() * decay
        m, m_large = beta1 * m + (1 - beta1) * g, beta1 * m.abs() + (1 - beta1) * large
        v, v_large = beta2 * v + (1 - beta2) * g**2, beta2 * v + (1 - beta2) * large**2
        one, two = (1 - beta1**t, 1 - beta2**t) if group.get("bias_correction", True) else (1.0, 1.0)
        size = lr / one / ((v / two).sqrt() + group["eps"])
        p, p_large = p - size * m, p.abs() + size * m_large
        expected = ((p, p_large), (unscaled, unscaled.abs()), (m, m_large), (v, v_large))
        for (exact, terms), found in zip(expected, after, strict=True):
            scale = torch.maximum(exact.abs(), terms).float().numpy()
            errors = (found.double() - exact).abs().numpy() / (np.spacing(scale) * fine)
            worst = max(worst, float(errors.max(initial=0.0)))
    assert stepped.counts() == [case.done + 1] * len(case.blocks)
    if case.optimizer != "FusedAdam" and case.dtype == torch.float32 and not case.scalers:
        other = Stepped(case)
        AdamKernel(other.optimizer).step(other.apart)
        for ours, theirs in zip(stepped.now(), other.now(), strict=True):
            for mine, its in zip(ours, theirs, strict=True):
                assert torch.equal(mine, its)
    return worst


def changes(case: Case) -> bool:
    """Whether a step changes anything, counts included."""
    stepped = Stepped(case).step()
    before, after = (
        torch.cat([part for tensors in all_ for part in tensors]) for all_ in (stepped.before, stepped.now())
    )
    return not torch.equal(before, after) or stepped.counts() != [case.done] * len(case.blocks)


def launches(case: Case) -> list[str]:
    """The kernels that a step launches."""
    kernels = _kernels(torch.device("cpu"))
    launched: list[str] = []

    class Recorded:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(kernels, name)

        def __getitem__(self, grid: Any) -> Any:
            launched.append(self.name)
            return self.kernel[grid]

    with (
        mock.patch.object(kernels, "prepare_rates", Recorded("prepare_rates")),
        mock.patch.object(kernels, "step_elements", Recorded("step_elements")),
    ):
        Stepped(case).step()
    return launched


class NothingIsRead(TorchDispatchMode):
    """Fails where a tensor's values decide what the host does."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero"), name
        return function(*args, **(kwargs or {}))


def birth_step(blocks: Sequence[Block], steps: int) -> int:
    """Steps of a torch optimizer through :class:`BirthStep` that read nothing after a first one; their count."""
    param = torch.randn(blocks[-1].stop)
    optimizer = torch.optim.AdamW([param], lr=0.02, fused=True)
    param.grad = torch.randn_like(param)
    optimizer.step()
    scheduler = RewarmupScheduler(None, optimizer)
    births = max(run.birth for block in blocks for run in block.runs)
    scheduler.births = (Birth(Rewarmup(ratio=1.5, steps=4), (0.02,), None, True, 0),) * births
    BirthStep(optimizer, scheduler, {param: 0}, lambda: {param: blocks})
    before = param.clone()
    with NothingIsRead():
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
    assert not torch.equal(before, param)
    assert math.isfinite(float(param.sum()))
    return int(optimizer.state[param]["step"])
