"""Each alarm fires when it should, once, and not otherwise."""

from __future__ import annotations

import math
import random

import pytest

from ds_sparkling.monitoring.alarms import ExpertAlarm, LossAlarm, TwinAlarm


def falling(step: int) -> float:
    """A noisy loss curve as trainings have them."""
    return 2.0 + 4.0 * math.exp(-step / 80) + random.Random(step).gauss(0.0, 0.05)


def messages(losses: dict[int, float]) -> dict[int, str]:
    alarm = LossAlarm()
    seen = {step: alarm.see(step, loss) for step, loss in losses.items()}
    return {step: message for step, message in seen.items() if message is not None}


def test_a_falling_noisy_loss_is_no_spike() -> None:
    assert messages({step: falling(step) for step in range(1000)}) == {}


def test_a_spike_is_told_once_until_it_is_over() -> None:
    losses = {step: falling(step) for step in range(600)}
    losses |= dict.fromkeys((300, 301, 302, 500), 4.0)
    found = messages(losses)
    assert list(found) == [300, 500]
    assert "loss spike at step 300: the loss is 4.0000, above the threshold of 2." in found[300]
    assert "resume from a checkpoint" in found[300]


def test_a_level_that_stays_is_a_new_level() -> None:
    losses = {step: falling(step) for step in range(400)} | {step: falling(step) + 2.0 for step in range(400, 800)}
    losses[700] = 7.0
    assert list(messages(losses)) == [400, 700]


def test_a_loss_that_is_not_finite_is_a_spike_from_the_first_step_on() -> None:
    found = messages({0: math.nan, 1: math.inf, **dict.fromkeys(range(2, 30), 2.0), 30: math.nan})
    assert list(found) == [0, 30]
    assert "the loss is nan" in found[0]


COSINES = {"layers.0.experts.w1": 0.999995, "layers.0.experts.w2": 0.995, "layers.0.self_attn.o_proj.weight": 0.5}


def test_twins_are_locked_when_the_rewarmup_is_over_and_they_are_alike() -> None:
    alarm = TwinAlarm()
    assert alarm.see(1, 249, 250, COSINES) is None
    message = alarm.see(1, 250, 250, COSINES)
    assert message is not None
    assert "250 steps after growth 1" in message
    assert (
        "in 1 of 3 parameters looked at, most in layers.0.experts.w1 (mean cosine 1.0000; above 0.99999, or" in message
    )
    assert "asymmetric_reset" in message
    assert alarm.see(1, 300, 250, COSINES) is None
    assert alarm.see(2, 300, 250, COSINES) is not None  # another growth is another event


def test_twins_that_are_still_parting_are_no_alarm_until_they_stop() -> None:
    alarm = TwinAlarm()
    for age, cosine in ((1, 0.99999), (50, 0.998), (100, 0.994), (140, 0.9935)):
        assert alarm.see(1, age, 30, {"w1": cosine}) is None
    assert alarm.see(1, 150, 30, {"w1": 0.9935}) is not None
    assert TwinAlarm().see(1, 50, 30, {"w1": 0.999995}) is not None


def test_one_measurement_of_twins_that_are_not_the_same_is_no_alarm() -> None:
    """As soon as there is a second one, from when they were younger, it tells whether they part."""
    alarm = TwinAlarm()
    assert alarm.see(1, 50, 30, {"w1": 0.9992}) is None
    assert alarm.see(1, 100, 30, {"w1": 0.9992}) is not None
    alarm = TwinAlarm()
    assert alarm.see(1, 50, 30, {"w1": 0.9998}) is None
    assert alarm.see(1, 100, 30, {"w1": 0.9992}) is None


@pytest.mark.parametrize("every", [1, 10, 50, 500])
@pytest.mark.parametrize("begin", [1, 600])
def test_steady_parting_is_no_alarm_however_often_it_is_looked_at_and_after_a_resumption(
    every: int, begin: int
) -> None:
    alarm = TwinAlarm()
    for age in range(begin, 3000, every):
        assert alarm.see(1, age, 250, {"w1": 1 - 1e-5 * age}) is None or age < 101


def test_twins_have_time_to_part_without_a_rewarmup_too() -> None:
    alarm = TwinAlarm()
    assert alarm.see(1, 1, 0, {"w1": 1.0}) is None
    assert alarm.see(1, 100, 0, {"w1": 1.0}) is not None


def test_parted_twins_are_no_alarm() -> None:
    assert TwinAlarm().see(1, 1000, 250, {"w1": 0.98, "w2": -0.1}) is None


def test_dead_experts_are_told_once_until_they_live_again() -> None:
    alarm = ExpertAlarm()
    for step in (50, 100, 150):  # a router that has just begun, as far as this shows
        assert alarm.see(step, "layers.3", [100.0, 300.0, 200.0, 0.0]) is None
    assert alarm.see(200, "layers.3", [100.0, 300.0, 200.0, 0.0]) == (
        "dead experts at step 200 in layers.3: experts 3 of 4 got at most 0.0000 of an even share of the tokens over "
        "the last 4 measurements (threshold 0.01). Raise the load-balancing loss's coefficient, or lower the learning "
        "rate"
    )
    assert alarm.see(250, "layers.3", [100.0, 300.0, 200.0, 0.0]) is None
    others = [alarm.see(step, "layers.4", [100.0, 300.0, 200.0, 0.0]) for step in (50, 100, 150, 200)]
    assert others[3] is not None
    assert alarm.see(300, "layers.3", [100.0, 0.0, 200.0, 200.0]) is None  # 1 lives by earlier measurements
    for step in (350, 400, 450):
        alarm.see(step, "layers.3", [100.0, 100.0, 200.0, 200.0])
    dying = [alarm.see(step, "layers.3", [100.0, 100.0, 200.0, 0.0]) for step in (500, 550, 600, 650)]
    assert [message is not None for message in dying] == [False, False, False, True]


@pytest.mark.parametrize("counts", [[30.0, 31.0, 29.0, 2.0], [20.0, 0.0, 20.0, 20.0]])
def test_few_tokens_and_few_but_some_tokens_are_no_alarm(counts: list[float]) -> None:
    for seen in ([0.25 * count for count in counts], [10.0 * count + 10.0 for count in counts]):
        alarm = ExpertAlarm()
        assert [alarm.see(step, "layers.0", seen) for step in range(5)] == [None] * 5
