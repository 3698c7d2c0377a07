"""The scheduler in the engine's slot: base rates untouched, a curve per growth, state that resumes to the last bit."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as torch_schedulers

from ds_sparkling.errors import ConfigError
from ds_sparkling.growth.schedule import warmup_cosine
from ds_sparkling.optim.scheduler import RewarmupScheduler, grown_state, regrouped_state
from ds_sparkling.spec.strategy import BiasCorrection, OptimizerState, Rewarmup, RewarmupCurve, Scope, Strategy

Make = Callable[[torch.optim.Optimizer], Any]


def deepspeed_schedule(name: str, **arguments: Any) -> Make:
    def make(optimizer: torch.optim.Optimizer) -> Any:
        from deepspeed.runtime import lr_schedules

        return getattr(lr_schedules, name)(optimizer, **arguments)

    return make


def warmup_then_cosine(optimizer: torch.optim.Optimizer) -> Any:
    warmup = torch_schedulers.LinearLR(optimizer, 0.1, total_iters=5)
    cosine = torch_schedulers.CosineAnnealingLR(optimizer, 35, eta_min=1e-4)
    return torch_schedulers.SequentialLR(optimizer, [warmup, cosine], [5])


COSINES: dict[str, Make] = {
    "WarmupCosineLR": deepspeed_schedule(
        "WarmupCosineLR", total_num_steps=41, warmup_num_steps=5, cos_min_ratio=0.1, warmup_type="linear"
    ),
    "CosineAnnealingLR": lambda optimizer: torch_schedulers.CosineAnnealingLR(optimizer, 40, eta_min=1e-4),
    "SequentialLR": warmup_then_cosine,
}
OTHERS: dict[str, Make] = {
    "WarmupLR": deepspeed_schedule("WarmupLR", warmup_num_steps=5, warmup_type="linear"),
    "WarmupDecayLR": deepspeed_schedule("WarmupDecayLR", total_num_steps=40, warmup_num_steps=5),
    "OneCycle": deepspeed_schedule("OneCycle", cycle_min_lr=1e-4, cycle_max_lr=1e-2, cycle_first_step_size=9),
    "LambdaLR": lambda optimizer: torch_schedulers.LambdaLR(optimizer, lambda step: 0.99**step),
    "ExponentialLR": lambda optimizer: torch_schedulers.ExponentialLR(optimizer, 0.97),
    "none": lambda optimizer: None,
}


def two_groups() -> torch.optim.Optimizer:
    """The second at a tenth of the rate."""
    return torch.optim.SGD(
        [{"params": [torch.ones(1)], "lr": 1e-2}, {"params": [torch.ones(1)], "lr": 1e-3, "weight_decay": 0.5}], lr=1.0
    )


def make(schedule: Make) -> RewarmupScheduler:
    optimizer = two_groups()
    return RewarmupScheduler(schedule(optimizer), optimizer)


def run(scheduler: RewarmupScheduler, steps: int) -> list[list[list[float]]]:
    """Rates of both groups at every step."""
    rates = []
    for _ in range(steps):
        rates.append([scheduler.rates(0), scheduler.rates(1)])
        scheduler.optimizer.step()
        scheduler.step()
    return rates


def base_rates(schedule: Make, steps: int) -> list[list[float]]:
    optimizer = two_groups()
    base = schedule(optimizer)
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        if base is not None:
            base.step()
    return rates


@pytest.mark.parametrize("name", [*COSINES, *OTHERS])
def test_old_elements_stay_on_the_base_schedule(name: str) -> None:
    schedule = {**COSINES, **OTHERS}[name]
    scheduler = make(schedule)
    before = run(scheduler, 10)
    scheduler.born(Strategy(rewarmup=Rewarmup(steps=3)))
    found = [[rates[0] for rates in groups] for groups in before + run(scheduler, 20)]
    assert found == base_rates(schedule, 30)


@pytest.mark.parametrize("name", COSINES)
def test_on_a_cosine_new_elements_follow_the_papers_curve_to_its_end(name: str) -> None:
    scheduler = make(COSINES[name])
    run(scheduler, 12)
    starts = [group["lr"] for group in scheduler.optimizer.param_groups]
    scheduler.born(Strategy(rewarmup=Rewarmup(ratio=1.3, steps=8)))
    rates = run(scheduler, 40)
    remaining = scheduler.births[0].base.remaining  # type: ignore[union-attr]
    end = min(range(40), key=lambda t: rates[t][0][0])  # where the base schedule is lowest
    assert remaining in (end, end + 1)  # DeepSpeed's first step has no rate of its own, so its curve is one step late
    ends = [1e-3, 1e-4] if name == "WarmupCosineLR" else [1e-4, 1e-4]
    for t in range(remaining):
        for group in (0, 1):
            expected = warmup_cosine(
                t, warmup=8, total=remaining, start=starts[group], peak=1.3 * starts[group], end=ends[group]
            )
            assert rates[t][group][1] == expected
    for groups in rates[remaining:]:
        assert all(old == new for old, new in groups)


@pytest.mark.parametrize("name", COSINES)
@pytest.mark.parametrize("scope", [Scope.NEW, Scope.ALL])
def test_a_faster_decay_comes_to_its_end_sooner_and_stays_there(name: str, scope: Scope) -> None:
    scheduler = make(COSINES[name])
    run(scheduler, 12)
    scheduler.born(Strategy(rewarmup=Rewarmup(ratio=1.0, steps=0, scope=scope, faster_decay=0.25)))
    rates = run(scheduler, 40)
    remaining = scheduler.births[0].base.remaining  # type: ignore[union-attr]
    ends = [1e-3, 1e-4] if name == "WarmupCosineLR" else [1e-4, 1e-4]
    for group in (0, 1):
        new = [groups[group][1] for groups in rates]
        assert new[0] == pytest.approx(rates[0][group][0] if scope is Scope.NEW else new[0])
        assert all(later < sooner for sooner, later in itertools.pairwise(new[: round(0.75 * remaining)]))
        assert new[round(0.75 * remaining) : remaining] == [ends[group]] * (remaining - round(0.75 * remaining))
        if scope is Scope.ALL:
            assert [groups[group][0] for groups in rates] == new


@pytest.mark.parametrize("name", COSINES)
@pytest.mark.parametrize("grown_at", [6, 12, 30])
def test_going_on_from_another_step_is_the_base_schedule_from_there(name: str, grown_at: int) -> None:
    whole = base_rates(COSINES[name], 60)
    for from_step in (grown_at, 7, 20):
        scheduler = make(COSINES[name])
        run(scheduler, grown_at)
        strategy = Strategy(rewarmup=Rewarmup(ratio=1.0, steps=0, scope=Scope.ALL, from_step=from_step))
        scheduler.born(strategy)
        found = run(scheduler, 10)  # to where the last of them is at its end
        expected = whole[from_step : from_step + 10]
        for groups, rates in zip(found, expected, strict=True):
            for group in (0, 1):
                assert groups[group] == pytest.approx([rates[group]] * 2, rel=1e-9)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("rewarmup", [Rewarmup(faster_decay=0.5, steps=0), Rewarmup(ratio=1.0, steps=0, from_step=3)])
def test_what_changes_a_cosine_needs_one(name: str, rewarmup: Rewarmup) -> None:
    scheduler = make(OTHERS[name])
    run(scheduler, 8)
    with pytest.raises(ConfigError, match="change a cosine, but"):
        scheduler.check(Strategy(rewarmup=rewarmup))


@pytest.mark.parametrize("name", COSINES)
def test_there_is_no_going_on_from_beyond_the_end(name: str) -> None:
    scheduler = make(COSINES[name])
    run(scheduler, 12)
    with pytest.raises(ConfigError, match=r"has only \d+ steps; leave them out"):
        scheduler.check(Strategy(rewarmup=Rewarmup(ratio=1.0, steps=0, from_step=500)))


@pytest.mark.parametrize("name", [*COSINES, *OTHERS])
def test_otherwise_they_follow_a_factor_on_the_base_rate(name: str) -> None:
    scheduler = make({**COSINES, **OTHERS}[name])
    run(scheduler, 12)
    curve = RewarmupCurve.FACTOR if name in COSINES else RewarmupCurve.AUTO
    scheduler.born(Strategy(rewarmup=Rewarmup(ratio=2.0, steps=4, curve=curve)))
    for t, groups in enumerate(run(scheduler, 10)):
        for old, new in groups:
            assert new == pytest.approx(old * (1 + min(t / 4, 1)), rel=1e-12)


@pytest.mark.parametrize("steps", [27, 28, 29])
def test_a_rewarmup_that_doesnt_fit_before_the_end_gets_a_factor(steps: int) -> None:
    scheduler = make(COSINES["CosineAnnealingLR"])
    run(scheduler, 12)
    scheduler.born(Strategy(rewarmup=Rewarmup(steps=steps)))
    assert (scheduler.births[0].base is not None) == (steps < 28)
    if steps >= 28:
        with pytest.raises(ConfigError, match="ends in 28 steps"):
            scheduler.born(Strategy(rewarmup=Rewarmup(steps=steps, curve=RewarmupCurve.COSINE)))


def test_in_its_own_warmup_even_a_cosine_gets_a_factor() -> None:
    """There the paper's curve would keep new elements at the small rate of that moment."""
    scheduler = make(COSINES["WarmupCosineLR"])
    run(scheduler, 2)
    with pytest.raises(ConfigError, match="still warming up"):
        scheduler.born(Strategy(rewarmup=Rewarmup(curve=RewarmupCurve.COSINE)))
    scheduler.born(Strategy(rewarmup=Rewarmup(ratio=2.0, steps=4)))
    for t, groups in enumerate(run(scheduler, 30)):
        assert groups[0][1] == pytest.approx(groups[0][0] * (1 + min(t / 4, 1)))


@pytest.mark.parametrize("name", OTHERS)
def test_a_cosine_that_isnt_there_cant_be_asked_for(name: str) -> None:
    scheduler = make(OTHERS[name])
    with pytest.raises(ConfigError, match=r"curve is 'cosine', but a .* 'factor'"):
        scheduler.born(Strategy(rewarmup=Rewarmup(curve=RewarmupCurve.COSINE)))


@pytest.mark.parametrize("stop", [3, 11, 13, 17, 26])
@pytest.mark.parametrize("name", [*COSINES, *OTHERS])
def test_resumed_rates_are_the_same_to_the_last_bit(name: str, stop: int) -> None:
    """Growths after 10 and 20 steps; the state goes through JSON on the way, which keeps every bit of a float."""
    schedule = {**COSINES, **OTHERS}[name]

    def go_on(scheduler: RewarmupScheduler, first: int, last: int) -> list[list[list[float]]]:
        rates = []
        for step in range(first, last):
            if step in (10, 20):
                scheduler.born(Strategy(rewarmup=Rewarmup(steps=4)))
            rates += run(scheduler, 1)
        return rates

    whole = go_on(make(schedule), 0, 35)
    scheduler = make(schedule)
    go_on(scheduler, 0, stop)
    state = scheduler.state_dict()
    groups = [group["lr"] for group in scheduler.optimizer.param_groups]
    if name not in ("LambdaLR", "SequentialLR"):  # torch keeps objects in these two
        state = json.loads(json.dumps(state))
    resumed = make(schedule)
    resumed.load_state_dict(state)
    for group, lr in zip(resumed.optimizer.param_groups, groups, strict=True):
        group["lr"] = lr  # the optimizer's own state brings these back
    assert resumed.births == scheduler.births
    assert go_on(resumed, stop, 35) == whole[stop:]


def test_the_base_scheduler_alone_can_load_the_state_and_its_state_can_be_loaded() -> None:
    schedule = COSINES["WarmupCosineLR"]
    scheduler = make(schedule)
    run(scheduler, 7)
    scheduler.born(Strategy())
    plain = make(schedule).base
    plain.load_state_dict(scheduler.state_dict())
    assert plain.last_batch_iteration == 6
    other = make(schedule)
    other.load_state_dict(plain.state_dict())
    assert other.base.last_batch_iteration == 6
    assert other.births == ()
    make(OTHERS["none"]).load_state_dict(None)


def test_a_base_scheduler_that_wants_arguments_gets_them() -> None:
    """An engine falls back to step(increment) on a TypeError; the age must count once."""

    class Megatron:
        done = 0

        def step(self, increment: int) -> None:
            self.done += increment

    scheduler = make(lambda _: Megatron())
    scheduler.born(Strategy(rewarmup=Rewarmup(curve=RewarmupCurve.FACTOR)))
    with pytest.raises(TypeError):
        scheduler.step()
    scheduler.step(16)
    assert scheduler.base.done == 16
    assert scheduler.done == 16
    assert scheduler.births[0].age == 1


@pytest.mark.parametrize("state", OptimizerState)
@pytest.mark.parametrize("correction", BiasCorrection)
def test_only_empty_moments_restart(state: OptimizerState, correction: BiasCorrection) -> None:
    scheduler = make(OTHERS["none"])
    scheduler.born(Strategy(optimizer_state=state, bias_correction=correction))
    reset = state in (OptimizerState.ASYMMETRIC_RESET, OptimizerState.ASYMMETRIC_RESET_SCALED)
    assert scheduler.births[0].restart == (reset and correction is BiasCorrection.RESTART)


def test_groups_that_were_given_anothers_settings_are_restored() -> None:
    scheduler = make(OTHERS["none"])
    state = scheduler.state_dict()
    loaded = make(OTHERS["none"])
    first, second = loaded.optimizer.param_groups
    second.update({key: value for key, value in first.items() if key != "params"})
    loaded.load_state_dict(state)
    assert loaded.restore_groups() == ["1.lr", "1.weight_decay"]
    assert (second["lr"], second["weight_decay"]) == (1e-3, 0.5)
    assert loaded.restore_groups() == []


def test_settled_growths_count_as_old() -> None:
    scheduler = make(OTHERS["none"])
    scheduler.settle(2)
    assert scheduler.rates(1) == [1e-3] * 3
    assert [birth.restart for birth in scheduler.births] == [False, False]
    assert all(birth.rewarmup.scope is Scope.NONE for birth in scheduler.births)


CONFIGURED = {
    "WarmupCosineLR": {
        "type": "WarmupCosineLR",
        "params": {"total_num_steps": 41, "warmup_num_steps": 5, "cos_min_ratio": 0.1, "warmup_type": "linear"},
    }
}


@pytest.mark.parametrize("steps", [3, 12, 38])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", [*COSINES, *OTHERS])
def test_a_saved_state_grows_as_the_scheduler_does(name: str, plain: bool, steps: int) -> None:
    """Also that of a base scheduler alone, as far as it or the config tells what it is."""
    scheduler = make({**COSINES, **OTHERS}[name])
    run(scheduler, steps)
    strategy = Strategy(rewarmup=Rewarmup(steps=4))
    base = None if scheduler.base is None else scheduler.base.state_dict()
    state = json.loads(json.dumps(base if plain else scheduler.state_dict(), default=str))
    found = grown_state(state, scheduler.optimizer.param_groups, strategy, CONFIGURED.get(name, {}))
    scheduler.born(strategy)
    (expected,), (birth,) = scheduler.state_dict()["ds_sparkling"]["births"], found["ds_sparkling"]["births"]
    if expected["base"] is not None and plain:
        assert birth["base"].pop("ends") == pytest.approx(expected["base"].pop("ends"), rel=1e-12)
    assert birth == expected


def test_a_saved_state_follows_other_groups() -> None:
    scheduler = make(COSINES["SequentialLR"])
    run(scheduler, 12)
    scheduler.born(Strategy(rewarmup=Rewarmup(steps=4)))
    state = regrouped_state(scheduler.state_dict(), [1, 0, 1])
    assert state is not None
    own, before = state["ds_sparkling"], scheduler.state_dict()["ds_sparkling"]
    for found, expected in [
        (own["births"][0]["starts"], before["births"][0]["starts"]),
        (own["births"][0]["base"]["ends"], before["births"][0]["base"]["ends"]),
        (own["groups"], before["groups"]),
        (state["_last_lr"], scheduler.get_last_lr()),
        (state["_schedulers"][1]["base_lrs"], scheduler.base._schedulers[1].base_lrs),
    ]:
        assert found == [expected[1], expected[0], expected[1]]
