"""What an optimizer keeps is found out by trying, for the real sizes, and the optimizer is left as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_sparkling.errors import PlanError, SparklingError, UnsupportedError
from ds_sparkling.optim.optimizer_trial import what_is_kept
from ds_sparkling.spec.state_kinds import StateKind
from ds_sparkling.spec.strategy import OptimizerState, Strategy
from optimizers import CountingSGD, Keeping, ScheduleFreeAdam, Wrapping

Make = Callable[[Any], torch.optim.Optimizer]

#: (optimizer, its per-element states that are moments, weights, its numbers)
KNOWN: list[tuple[Make, set[str], set[str], set[str]]] = [
    (lambda p: torch.optim.AdamW(p, amsgrad=True), {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}, set(), {"step"}),
    (lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-3)), {"exp_avg", "exp_avg_sq"}, set(), {"step"}),
    (lambda p: torch.optim.SGD(p, lr=0.1), set(), set(), set()),
    (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1.0), {"momentum_buffer"}, set(), set()),
    (
        lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.9),
        {"square_avg", "grad_avg", "momentum_buffer"},
        set(),
        {"step"},
    ),
    (torch.optim.Adagrad, {"sum"}, set(), {"step"}),
    (torch.optim.Adadelta, {"square_avg", "acc_delta"}, set(), {"step"}),
    (torch.optim.Adamax, {"exp_avg", "exp_inf"}, set(), {"step"}),
    (torch.optim.NAdam, {"exp_avg", "exp_avg_sq"}, set(), {"step", "mu_product"}),
    (torch.optim.ASGD, set(), {"ax"}, {"step", "eta", "mu"}),
    (ScheduleFreeAdam, {"exp_avg_sq"}, {"z"}, {"step"}),
    (lambda p: ScheduleFreeAdam(p, counts=True), {"exp_avg_sq"}, {"z"}, set()),
]


def kept(make: Make, shape: tuple[int, ...] = (7,)) -> Any:
    optimizer = make([torch.ones(shape)])
    return what_is_kept(optimizer, optimizer.param_groups[0], optimizer.param_groups[0]["params"][0])


@pytest.mark.parametrize(("make", "moments", "weights", "numbers"), KNOWN)
@pytest.mark.parametrize("shape", [(7,), (3, 5)])
def test_states_are_told_by_trying(
    make: Make, moments: set[str], weights: set[str], numbers: set[str], shape: tuple[int, ...]
) -> None:
    found = kept(make, shape)
    assert (found.per_element - found.weights, found.weights, found.numbers) == (moments, weights, numbers)
    found.check("it", Strategy())  # and their names say so


def told(make: Make, strategy: Strategy | None = None) -> str:
    with pytest.raises(SparklingError) as caught:
        kept(make).check("MyOptimizer", strategy or Strategy())
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize("shape", [(7,), (3, 5)])
@pytest.mark.parametrize(
    "keep",
    [
        {"codes": lambda p: torch.zeros(p.shape, dtype=torch.uint8)},
        {"absmax": lambda p: torch.zeros(p.numel() // 256)},
        {"exp_avg": lambda p: p.to_sparse()},
        {"history": lambda p: [p]},
    ],
)
@pytest.mark.parametrize("above", [0, 4095, 100_000])
def test_state_that_cannot_grow_is_refused_though_small_tensors_have_none(
    keep: dict[str, Any], above: int, shape: tuple[int, ...]
) -> None:
    with pytest.raises(UnsupportedError, match=rf"Keeping keeps state '{next(iter(keep))}'.*use an optimizer like"):
        kept(lambda p: Keeping(p, keep, above), shape)


def test_quantised_state_in_a_tensor_of_its_own_kind_is_refused() -> None:
    class Quantised(Tensor):
        pass

    with pytest.raises(UnsupportedError, match=r"state 'exp_avg'.* a Quantised of"):
        kept(lambda p: Keeping(p, {"exp_avg": lambda p: torch.zeros_like(p).as_subclass(Quantised)}, 4095))


def test_states_of_unknown_kind_can_be_declared() -> None:
    make: Make = lambda p: Keeping(p, {"ema": torch.clone, "gradient_sum": torch.zeros_like})  # noqa: E731
    assert '"state_kinds": {"ema": "moment"}' in told(make)
    declared = {"ema": StateKind.WEIGHTS, "gradient_sum": StateKind.MOMENT}
    kept(make).check("it", Strategy(state_kinds=declared))
    assert "no known degree" in told(
        make, Strategy(optimizer_state=OptimizerState.COPY_SCALED, state_kinds={**declared})
    )


@pytest.mark.parametrize(
    ("key", "make", "looks"), [("exp_avg", torch.clone, "weights"), ("z", torch.zeros_like, "moment")]
)
def test_a_state_that_is_not_what_its_name_says_is_refused(key: str, make: Any, looks: str) -> None:
    message = told(lambda p: Keeping(p, {key: make}))
    assert "MyOptimizer's state" in message
    assert f'"state_kinds": {{"{key}": "{looks}"}}' in message
    kept(lambda p: Keeping(p, {key: make})).check("it", Strategy(state_kinds={key: StateKind(looks)}))


def test_numbers_that_do_not_start_at_zero_are_not_dropped() -> None:
    assert "mu_product" in told(torch.optim.NAdam, Strategy(optimizer_state=OptimizerState.DROP))


class Failing(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise KeyError("something")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Failing(p, lr=0.1), "Failing can't be tried.*KeyError: 'something'.*use an optimizer like"),
        (torch.optim.LBFGS, "LBFGS can't be tried.*closure"),
        (Wrapping, "Wrapping wraps a SGD"),
    ],
)
def test_an_optimizer_that_cannot_be_tried_is_named(make: Make, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        kept(make)


class Restless(torch.optim.SGD):
    """Changes everything that it can lay hands on."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1, momentum=0.9)
        self.count, self.total = 0, torch.zeros(())
        self.seen: list[int] = []
        for group in self.param_groups:
            group["history"] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        self.count += 1
        self.seen.append(self.count)
        self.total += 1
        self.late = True
        for group in self.param_groups:
            group["history"].append(self.count)
            group["lr"] *= 0.5


@pytest.mark.parametrize("make", [Restless, lambda p: CountingSGD(p, late=True), ScheduleFreeAdam, torch.optim.AdamW])
def test_the_optimizer_is_left_as_it_was(make: Make) -> None:
    fired = []
    param = torch.ones(3, 4)
    optimizer = make([param])
    optimizer.register_step_post_hook(lambda *_: fired.append(1))
    if isinstance(optimizer, ScheduleFreeAdam):
        optimizer.train()
    param.grad = torch.ones(3, 4)
    optimizer.step()
    before = copy.deepcopy({key: value for key, value in vars(optimizer).items() if not key.startswith("_")})
    values, count = param.clone(), len(fired)
    what_is_kept(optimizer, optimizer.param_groups[0], param)
    after = {key: value for key, value in vars(optimizer).items() if not key.startswith("_")}
    assert repr(after) == repr(before)
    assert optimizer.param_groups[0]["params"][0] is param
    assert list(optimizer.state) in ([], [param])
    assert torch.equal(param, values)
    assert len(fired) == count


def test_a_trial_neither_needs_training_mode_nor_changes_it() -> None:
    optimizer = ScheduleFreeAdam([torch.ones(3)])
    assert what_is_kept(optimizer, optimizer.param_groups[0], torch.ones(3)).weights == {"z"}
    assert optimizer.param_groups[0]["train_mode"] is False


def test_an_unknown_state_is_a_plan_error() -> None:
    with pytest.raises(PlanError, match="'ema' of unknown kind"):
        kept(lambda p: Keeping(p, {"ema": torch.clone})).check("it", Strategy())
