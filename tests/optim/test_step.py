"""The step of a tensor with elements of several births equals that of one parameter per stage, within 2 ulp."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from ds_sparkling.growth import Block
from ds_sparkling.growth.births import BirthRun, stretch
from ds_sparkling.growth.schedule import rates_by_birth
from ds_sparkling.optim.scheduler import RewarmupScheduler
from ds_sparkling.optim.step import BirthStep
from ds_sparkling.spec.birth_schedule import Birth
from ds_sparkling.spec.strategy import Rewarmup, Scope
from optimizers import FusedAdam
from ulp import ulps

Make = Callable[[list[Any]], torch.optim.Optimizer]


def muon(params: list[Any]) -> torch.optim.Optimizer:
    """As DeepSpeed runs it under ZeRO: the flat gradient is the orthogonalised update already."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    return MuonWithAuxAdam([{"params": params, "use_muon": True, "lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}])


def muon_aux(params: list[Any]) -> torch.optim.Optimizer:
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    group = {"params": params, "use_muon": False, "lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    return MuonWithAuxAdam([group])


@functools.cache
def cpu_info() -> dict[str, Any]:
    """DeepSpeedCPUAdam asks for this in every constructor, which takes a second."""
    from cpuinfo import get_cpu_info

    return dict(get_cpu_info())


def cpu_adam(params: list[Any], **arguments: Any) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    with mock.patch("cpuinfo.get_cpu_info", return_value=cpu_info()):
        return DeepSpeedCPUAdam(params, **{"lr": 0.02, "betas": (0.9, 0.95), "weight_decay": 0.1, **arguments})


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, as DeepSpeed's, which takes a minute to compile: betas and a step count, but no correction."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.02, "betas": (0.9, 0.99), "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(param))
                state["step"] += 1
                update = state["exp_avg"].lerp(param.grad, 1 - beta1).sign_()
                param.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
                state["exp_avg"].lerp_(param.grad, 1 - beta2)


def adam(kind: type[torch.optim.Optimizer] = torch.optim.AdamW, **arguments: Any) -> Make:
    return lambda params: kind(params, **{"lr": 0.02, "betas": (0.9, 0.95), "weight_decay": 0.1, **arguments})


OPTIMIZERS: dict[str, Make] = {
    "adamw-fused": adam(fused=True),
    "adamw-foreach": adam(foreach=True),
    "adamw-single": adam(foreach=False),
    "adamw-0.999": adam(fused=True, betas=(0.9, 0.999)),
    "adamw-small-beta1": adam(fused=True, betas=(0.3, 0.9)),
    "adamw-no-decay": adam(fused=True, weight_decay=0.0),
    "adamw-amsgrad": adam(fused=True, amsgrad=True),
    "adamw-maximize": adam(foreach=True, maximize=True),
    "adam-l2": adam(torch.optim.Adam, fused=True),
    "deepspeed-cpu-adam": cpu_adam,
    "deepspeed-cpu-adam-l2": functools.partial(cpu_adam, adamw_mode=False, betas=(0.9, 0.999)),
    "lion": Lion,
    "sgd-momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "sgd-fused": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, fused=True),
    "sgd-plain": lambda params: torch.optim.SGD(params, lr=0.1),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1, lr_decay=0.1),
    "muon": muon,
    "muon-aux-adam": muon_aux,
}

LAYOUTS = {
    "rows": lambda row, column: (row >= 20).long() + (row >= 30).long() + 0 * column,
    "columns": lambda row, column: (column >= 24).long() + (column >= 40).long() + 0 * row,
    "both": lambda row, column: torch.maximum((row >= 20).long(), 2 * (column >= 24).long()),
    "thin": lambda row, column: (column >= 44).long() + 0 * row,  # a single column, if there are 45
    "original": lambda row, column: 0 * (row + column),
    "new": lambda row, column: 0 * (row + column) + 1,
}


def blocks_of(births: Tensor) -> list[Block]:
    """Blocks of a matrix of births, row by row; rows that are alike become one block."""
    blocks: list[Block] = []
    row = births.shape[1]
    for number, values in enumerate(births.tolist()):
        changes = [column for column in range(1, row) if values[column] != values[column - 1]]
        runs = tuple(BirthRun(stop, values[stop - 1]) for stop in [*changes, row])
        if blocks and blocks[-1].runs == runs:
            blocks[-1] = Block(blocks[-1].start, blocks[-1].rows + 1, runs)
        else:
            blocks.append(Block(number * row, 1, runs))
    return blocks


class Grown:
    """A flat tensor after growths, its optimizer and births."""

    def __init__(self, make: Make, matrix: Tensor, *, old_steps: int) -> None:
        self.generator = torch.Generator().manual_seed(1)
        births = matrix.flatten()
        self.births = births
        self.param = torch.randn(births.numel(), generator=self.generator)
        self.optimizer = make([self.param])
        for _ in range(old_steps):
            self.param.grad = self.gradient()
            self.optimizer.step()
        for value in self.optimizer.state.get(self.param, {}).values():
            if isinstance(value, Tensor) and value.shape == self.param.shape:
                value[births > 0] = 0.0
        self.scheduler = RewarmupScheduler(None, self.optimizer)
        self.made = 0

        def blocks() -> dict[Tensor, list[Block]]:
            self.made += 1
            return {self.param: blocks_of(matrix)}

        self.step = BirthStep(self.optimizer, self.scheduler, {self.param: 0}, blocks)

    def gradient(self) -> Tensor:
        return torch.randn(self.births.numel(), generator=self.generator)

    def advance(self) -> None:
        self.param.grad = self.gradient()
        self.optimizer.step()
        self.scheduler.step()


def interrupt(optimizer: torch.optim.Optimizer) -> None:
    """DeepSpeedCPUAdam multiplies up beta^t, rounding every time, while its calls' steps are consecutive.

    With more than one tensor they aren't, and it takes the power.
    """
    if type(optimizer).__name__ == "DeepSpeedCPUAdam":
        other = torch.zeros(1)
        other.grad = torch.zeros(1)
        optimizer.state[other] = {"step": 10**6, "exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)}
        optimizer.param_groups[0]["params"] = [other]
        optimizer.step()


def one_parameter_per_stage(grown: Grown, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the next step of ``grown`` gives if each birth is a parameter of its own, stepped by ``optimizer``."""
    state = grown.optimizer.state.get(grown.param, {})
    rates = rates_by_birth(grown.scheduler.births, 0, grown.optimizer.param_groups[0]["lr"])
    stepped = {"param": grown.param.clone()}
    stepped |= {k: v.clone() for k, v in state.items() if isinstance(v, Tensor) and v.shape == grown.param.shape}
    assert grown.param.grad is not None
    for stage, rate in enumerate(rates):
        chosen = grown.births == stage
        if not chosen.any():
            continue
        own = grown.param[chosen].clone()
        own.grad = grown.param.grad[chosen].clone()
        interrupt(optimizer)
        optimizer.state.clear()
        optimizer.param_groups[0].update(params=[own], lr=rate)
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == grown.param.shape:
                optimizer.state[own][key] = value[chosen].clone()
            else:
                optimizer.state[own][key] = copy.deepcopy(value)
        birth = grown.scheduler.births[stage - 1] if stage else None
        if birth is not None and birth.restart and "betas" in grown.optimizer.param_groups[0] and "step" in state:
            number = torch.tensor(float(birth.age)) if isinstance(state["step"], Tensor) else birth.age
            optimizer.state[own]["step"] = number
        optimizer.step()
        stepped["param"][chosen] = own
        for key, value in optimizer.state[own].items():
            if isinstance(value, Tensor) and value.shape == own.shape:
                stepped.setdefault(key, torch.zeros_like(grown.param))[chosen] = value
    return stepped


def layout(name: str, optimizer: str = "") -> Tensor:
    """Births in a matrix whose sizes divide by nothing; but DeepSpeed rounds otherwise what its vectors leave over."""
    rows, columns = (40, 48) if "deepspeed" in optimizer else (37, 45)
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    return LAYOUTS[name](row, column).to(torch.uint8)


@pytest.mark.parametrize("restart", [True, False], ids=["restart", "inherit"])
@pytest.mark.parametrize(
    ("name", "where"),
    # Without new elements the step is the optimizer's own; DeepSpeed's multiplies beta^t up in single precision then.
    [(name, where) for name in OPTIMIZERS for where in LAYOUTS if "deepspeed" not in name or where != "original"],
)
def test_stages_step_as_parameters_of_their_own(name: str, where: str, restart: bool) -> None:
    make = OPTIMIZERS[name]
    grown = Grown(make, layout(where, name), old_steps=12)
    reference = make([torch.zeros(1)])
    rewarmup = Rewarmup(ratio=1.3, steps=4)
    births = [Birth(rewarmup, (0.02,), None, restart, age) for age in (9, 0)]
    grown.scheduler.births = tuple(births)
    for number in range(8):
        grown.optimizer.param_groups[0]["lr"] = 0.02 * (1 - 0.1 * number)
        grown.param.grad = grown.gradient()
        expected = one_parameter_per_stage(grown, reference)
        count = grown.optimizer.state[grown.param].get("step")
        count = None if count is None else int(count)
        grown.optimizer.step()
        grown.scheduler.step()
        state = grown.optimizer.state[grown.param]
        assert ulps(grown.param, expected.pop("param")) <= 2, number
        for key, value in expected.items():
            assert ulps(state[key], value) <= 2, (number, key)
        if count is not None:
            assert int(state["step"]) == count + 1
        assert list(grown.optimizer.state) in ([grown.param], [])
        assert grown.optimizer.param_groups[0]["params"][0] is grown.param


@pytest.mark.parametrize("name", ["adamw-fused", "adamw-foreach", "sgd-momentum", "lion", "adagrad"])
def test_a_growth_before_the_first_step(name: str) -> None:
    """There is no state yet; every element's starts in this step."""
    make = OPTIMIZERS[name]
    grown = Grown(make, layout("both", name), old_steps=0)
    reference = make([torch.zeros(1)])
    grown.scheduler.births = tuple(Birth(Rewarmup(ratio=2.0, steps=0), (0.02,), None, True, 0) for _ in range(2))
    for _ in range(2):
        grown.param.grad = grown.gradient()
        expected = one_parameter_per_stage(grown, reference)
        grown.optimizer.step()
        grown.scheduler.step()
        assert ulps(grown.param, expected.pop("param")) <= 2
        for key, value in expected.items():
            assert ulps(grown.optimizer.state[grown.param][key], value) <= 2, key


def test_a_step_that_a_gradient_scaler_skips_is_no_step() -> None:
    """torch's GradScaler leaves ``found_inf`` to a fused kernel, and takes no step otherwise."""
    grown = Grown(OPTIMIZERS["adamw-fused"], layout("both"), old_steps=3)
    grown.scheduler.births = tuple(Birth(Rewarmup(ratio=1.5, steps=2), (0.02,), None, True, 0) for _ in range(2))
    grown.param.grad = torch.full_like(grown.param, torch.inf)
    grown.optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    before = grown.param.clone()
    grown.optimizer.step()
    assert torch.equal(grown.param, before)
    assert int(grown.optimizer.state[grown.param]["step"]) == 3


@pytest.mark.parametrize("counts_each", [False, True])
def test_fused_adam_counts_right_wherever_it_counts(counts_each: bool) -> None:
    """In one tensor for all of a group, or in each, of which one came later."""
    results = []
    settings: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.99), "weight_decay": 0.1}
    makes: list[Make] = [
        lambda params: FusedAdam(params, **settings, counts_each=counts_each),
        lambda params: torch.optim.AdamW(params, **settings, foreach=True),
    ]
    for make in makes:
        generator = torch.Generator().manual_seed(0)
        params = [torch.randn(12, generator=generator) for _ in range(3)]
        optimizer = make(params)
        scheduler = RewarmupScheduler(None, optimizer)
        blocks = {param: [stretch(0, 12, 0)] for param in params}
        blocks[params[1]] = [Block(0, 2, (BirthRun(2, 0), BirthRun(6, 1)))]
        BirthStep(optimizer, scheduler, dict.fromkeys(params, 0), blocks.copy)
        for number in range(7):
            for param in params:
                param.grad = torch.randn(12, generator=generator)
            if counts_each and number < 2:
                params[0].grad = None
            if number == 3:
                scheduler.births = (Birth(Rewarmup(ratio=1.5, steps=2), (0.02,), None, True, 0),)
            optimizer.step()
            scheduler.step()
        results.append(torch.cat(params))
    assert torch.allclose(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_a_single_number_as_a_parameter_takes_one_step_at_a_time() -> None:
    param = torch.ones(())
    optimizer = torch.optim.AdamW([param], lr=0.02, foreach=True)
    scheduler = RewarmupScheduler(None, optimizer)
    BirthStep(optimizer, scheduler, {param: 0}, lambda: {param: [stretch(0, 1, 0)]})
    scheduler.births = (Birth(Rewarmup(ratio=2.0, steps=0, scope=Scope.ALL), (0.02,), None, False, 0),)
    alone = torch.ones(())
    reference = torch.optim.AdamW([alone], lr=0.04, foreach=True)
    for _ in range(5):
        param.grad, alone.grad = torch.ones(()), torch.ones(())
        optimizer.step()
        reference.step()
    assert int(optimizer.state[param]["step"]) == 5
    assert float(param) == pytest.approx(float(alone), rel=1e-6)


def test_tensors_without_new_elements_are_stepped_as_ever() -> None:
    grown = Grown(OPTIMIZERS["adamw-foreach"], layout("original"), old_steps=3)
    alone = Grown(OPTIMIZERS["adamw-foreach"], layout("original"), old_steps=3)
    grown.scheduler.births = tuple(Birth(Rewarmup(ratio=1.5, steps=2), (0.02,), None, True, 0) for _ in range(2))
    calls = []

    def own(*_: Any, **__: Any) -> None:
        calls.append(grown.optimizer.param_groups[0]["params"][0] is grown.param)
        alone_step()

    alone_step = grown.step._own_step
    grown.step._own_step = own  # type: ignore[assignment]
    for _ in range(3):
        grown.advance()
        alone.advance()
    assert calls == [True] * 3
    assert torch.equal(grown.param, alone.param)


@pytest.mark.parametrize("name", ["adamw-fused", "adamw-foreach", "sgd-momentum", "deepspeed-cpu-adam"])
def test_a_chunk_at_a_time_gives_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for chunk in (1 << 20, 100):
        monkeypatch.setattr("ds_sparkling.optim.step._CHUNK", chunk)
        grown = Grown(OPTIMIZERS[name], layout("both"), old_steps=3)
        grown.scheduler.births = tuple(Birth(Rewarmup(ratio=1.5, steps=2), (0.02,), None, True, 0) for _ in range(2))
        for _ in range(4):
            grown.advance()
        results.append(grown.param)
    assert ulps(*results) <= 4


def test_the_kernel_gives_the_same_on_any_number_of_threads() -> None:
    threads = torch.get_num_threads()
    results: list[tuple[Tensor, Tensor]] = []
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            grown = Grown(OPTIMIZERS["adamw-fused"], layout("both"), old_steps=2)
            grown.scheduler.births = tuple(
                Birth(Rewarmup(ratio=1.5, steps=2), (0.02,), None, True, 0) for _ in range(2)
            )
            # The first, plain steps are torch's own, whose vector tails round by the number of threads.
            grown.param.copy_(results[0][0] if results else grown.param)
            start = grown.param.clone()
            for value in (grown.optimizer.state[grown.param][key] for key in ("exp_avg", "exp_avg_sq")):
                value.fill_(0.5)
            for _ in range(4):
                grown.advance()
            results.append((start, grown.param))
    finally:
        torch.set_num_threads(threads)
    for _, param in results[1:]:
        assert torch.equal(param, results[0][1])


# -- when nothing differs ----------------------------------------------------------------------------------------


def plain_and_grown(births: tuple[Birth, ...], name: str, factor: float = 1.0) -> tuple[Tensor, Grown]:
    """A parameter stepped by the optimizer alone with ``factor`` times its rate, and one under a BirthStep."""
    alone = Grown(OPTIMIZERS[name], layout("both"), old_steps=3)
    grown = Grown(OPTIMIZERS[name], layout("both"), old_steps=3)
    grown.scheduler.births = births
    alone.optimizer.param_groups[0]["lr"] *= factor
    for _ in range(3):
        alone.advance()
        grown.advance()
    return alone.param, grown


@pytest.mark.parametrize("name", ["adamw-fused", "adamw-foreach", "sgd-momentum", "deepspeed-cpu-adam"])
@pytest.mark.parametrize(
    "births",
    [
        (),
        (Birth(Rewarmup(scope=Scope.NONE), (0.02,), None, False, 5),),
        # 0.95^717 is nothing next to 1: both bias corrections are over.
        (Birth(Rewarmup(scope=Scope.NONE), (0.02,), None, True, 800),),
        (Birth(Rewarmup(ratio=1.0), (0.02,), None, False, 800),),
    ],
)
def test_while_all_stages_are_alike_the_step_is_the_optimizers_own(name: str, births: tuple[Birth, ...]) -> None:
    alone, grown = plain_and_grown(births, name)
    assert torch.equal(grown.param, alone)
    assert grown.made == 0


def test_scope_all_steps_the_whole_tensor_at_the_lifted_rate() -> None:
    births = (Birth(Rewarmup(ratio=2.0, steps=0, scope=Scope.ALL), (0.02,), None, False, 0),)
    alone, grown = plain_and_grown(births, "adamw-fused", 2.0)
    assert ulps(grown.param, alone) <= 2
    assert grown.made == 0
    assert grown.optimizer.param_groups[0]["lr"] == 0.02


def test_blocks_are_made_once_and_again_after_they_were_forgotten() -> None:
    grown = Grown(OPTIMIZERS["adamw-fused"], layout("both"), old_steps=3)
    grown.scheduler.births = (Birth(Rewarmup(ratio=1.3, steps=2), (0.02,), None, False, 0),) * 2
    grown.advance()
    grown.advance()
    assert grown.made == 1
    grown.step.forget_blocks()
    grown.advance()
    assert grown.made == 2


def test_a_closure_and_tensors_without_gradients() -> None:
    grown = Grown(OPTIMIZERS["adamw-foreach"], layout("columns"), old_steps=1)
    other = torch.ones(3)
    grown.optimizer.param_groups[0]["params"].append(other)
    grown.scheduler.births = (Birth(Rewarmup(ratio=1.3, steps=0), (0.02,), None, True, 0),) * 2
    grown.param.grad = grown.gradient()
    before = grown.param.clone()
    assert grown.optimizer.step(lambda: 3.5) == 3.5
    assert not torch.equal(grown.param, before)
    assert torch.equal(other, torch.ones(3))


def test_a_scheduler_made_later_can_still_watch_the_step() -> None:
    """torch's schedulers wrap ``optimizer.step`` through its ``__func__``."""
    grown = Grown(OPTIMIZERS["adamw-fused"], layout("columns"), old_steps=1)
    grown.scheduler.births = (Birth(Rewarmup(ratio=1.3, steps=0), (0.02,), None, True, 0),) * 2
    torch.optim.lr_scheduler.LambdaLR(grown.optimizer, lambda _: 1.0)
    before = grown.param.clone()
    grown.advance()
    assert not torch.equal(grown.param, before)
    assert grown.made == 1
