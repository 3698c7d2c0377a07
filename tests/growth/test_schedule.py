"""The learning-rate curves against the paper's formulas, written out."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_sparkling.errors import ConfigError
from ds_sparkling.growth.schedule import (
    BaseRate,
    CosineRewarmup,
    Curve,
    FactorRewarmup,
    OtherStepRewarmup,
    WeightNormRewarmup,
    curve_of,
    rates_by_birth,
    warmup_cosine,
)
from ds_sparkling.spec.birth_schedule import Birth, CosineBase
from ds_sparkling.spec.strategy import Rewarmup, RewarmupCurve, Scope

rates = st.floats(1e-6, 1.0)
CURVES = (RewarmupCurve.AUTO, RewarmupCurve.COSINE, RewarmupCurve.FACTOR)


@given(st.integers(0, 50), st.integers(1, 200), st.integers(0, 300), rates, rates, rates)
def test_warmup_cosine_is_eq_25_and_26(warmup: int, decay: int, t: int, start: float, peak: float, end: float) -> None:
    total = warmup + decay
    found = warmup_cosine(t, warmup=warmup, total=total, start=start, peak=peak, end=end)
    if t >= total:
        assert found == end
    elif t <= warmup and warmup:
        assert found == pytest.approx((1 - t / warmup) * start + t / warmup * peak, rel=1e-12)
    else:
        assert found == pytest.approx(
            (peak + end) / 2 + (peak - end) / 2 * math.cos(math.pi * (t - warmup) / decay),
            rel=1e-12,
            abs=1e-12 * max(peak, end),
        )
    rounding = 1e-12 * max(start, peak, end)
    assert min(start, peak, end) - rounding <= found <= max(start, peak, end) + rounding


def birth(age: int, base: CosineBase | None, **rewarmup: object) -> Birth:
    return Birth(Rewarmup(**rewarmup), (0.01, 0.1), base, restart=True, age=age)  # type: ignore[arg-type]


def rate(born: Birth, group: int, base_rate: float) -> float:
    return curve_of(born).rate(born.age, group, base_rate)


def test_new_elements_follow_eq_27_and_28_in_every_group() -> None:
    base = CosineBase(remaining=1000, ends=(0.001, 0.002), total=2000, warmup=60)
    for age, group, expected in [
        (0, 0, 0.01),
        (125, 0, 0.01 * 1.15),
        (250, 0, 0.013),
        (250, 1, 0.13),
        (625, 1, (0.13 + 0.002) / 2),
        (999, 0, 0.001 + 0.006 * (1 + math.cos(math.pi * 749 / 750))),
    ]:
        assert rate(birth(age, base, ratio=1.3, steps=250), group, 0.5) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("age", [1000, 1001, 5000])
def test_once_the_base_is_at_its_end_new_elements_are_on_it(age: int) -> None:
    assert rate(birth(age, CosineBase(1000, (0.001, 0.002), 2000, 60)), 0, 0.00123) == 0.00123


@pytest.mark.parametrize(("age", "factor"), [(0, 1.0), (1, 1.15), (2, 1.3), (3, 1.3), (10**6, 1.3)])
def test_without_a_cosine_the_base_rate_gets_a_factor(age: int, factor: float) -> None:
    assert rate(birth(age, None, ratio=1.3, steps=2), 1, 0.7) == pytest.approx(0.7 * factor, rel=1e-12)


@pytest.mark.parametrize(
    ("age", "factor"), [(0, 1.0), (1, 2.0), (2, 3.0), (3, 2.0 + 0.5**0.5), (4, 2.0), (6, 1.0), (10**6, 1.0)]
)
def test_the_factor_comes_back_to_one_along_half_a_cosine(age: int, factor: float) -> None:
    rewarmup = Rewarmup(ratio=3.0, steps=2, curve=RewarmupCurve.FACTOR, decay_steps=4)
    assert rate(Birth(rewarmup, (0.5,), None, restart=True, age=age), 0, 0.7) == pytest.approx(0.7 * factor, rel=1e-12)


@pytest.mark.parametrize("base", [None, CosineBase(1000, (0.001, 0.002), 2000, 60)])
def test_a_rewarmup_of_no_steps_starts_at_its_peak(base: CosineBase | None) -> None:
    assert rate(birth(0, base, ratio=1.5, steps=0), 0, 0.01) == pytest.approx(0.015, rel=1e-12)


def test_every_stage_has_its_own_curve() -> None:
    first = birth(30, None, ratio=2.0, steps=10)
    second = birth(5, None, ratio=3.0, steps=10)
    assert rates_by_birth([first, second], 0, 1.0) == [1.0, 2.0, 2.0]
    assert rates_by_birth([], 0, 1.0) == [1.0]


def test_scope_all_lifts_older_elements_and_none_lifts_nobody() -> None:
    new = birth(10, None, ratio=2.0, steps=10)
    everyone = birth(10, None, ratio=3.0, steps=10, scope=Scope.ALL)
    nobody = birth(10, None, ratio=4.0, steps=10, scope=Scope.NONE)
    assert rates_by_birth([new, everyone], 0, 1.0) == [3.0, 3.0, 3.0]
    assert rates_by_birth([everyone, new], 0, 1.0) == [3.0, 3.0, 2.0]
    assert rates_by_birth([new, nobody], 0, 1.0) == [1.0, 2.0, 1.0]


@given(
    st.builds(
        Birth,
        st.builds(
            Rewarmup,
            ratio=st.floats(0.1, 10),
            steps=st.integers(0, 10**6),
            scope=st.sampled_from(Scope),
            curve=st.sampled_from(CURVES),
        ),
        st.tuples(rates, rates),
        st.none()
        | st.builds(
            CosineBase, st.integers(0, 10**6), st.tuples(rates, rates), st.integers(0, 10**6), st.integers(0, 9)
        ),
        st.booleans(),
        st.integers(0, 10**6),
    )
)
def test_a_birth_survives_json(birth: Birth) -> None:
    assert Birth.from_dict(json.loads(json.dumps(birth.to_dict()))) == birth
    assert birth.older().age == birth.age + 1


@pytest.mark.parametrize("wrong", [{"ratio": 0.0}, {"ratio": math.inf}, {"ratio": math.nan}, {"steps": -1}])
def test_a_rewarmup_that_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=rf"rewarmup\.{next(iter(wrong))}"):
        Rewarmup(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rewarmup", "cosine", "curve"),
    [
        ({"scope": Scope.NONE}, True, BaseRate),
        ({"curve": RewarmupCurve.AUTO}, True, CosineRewarmup),
        ({"curve": RewarmupCurve.AUTO}, False, FactorRewarmup),
        ({"curve": RewarmupCurve.COSINE}, True, CosineRewarmup),
        ({"curve": RewarmupCurve.FACTOR}, False, FactorRewarmup),
        ({"ratio": 1.0, "steps": 0, "from_step": 3}, True, OtherStepRewarmup),
        ({"ratio": 1.0, "steps": 0, "curve": RewarmupCurve.WEIGHT_NORM}, False, WeightNormRewarmup),
    ],
)
def test_every_curve_is_a_class_and_auto_becomes_one(
    rewarmup: dict[str, object], cosine: bool, curve: type[Curve]
) -> None:
    base = CosineBase(1000, (0.001, 0.002), 2000, 60) if cosine else None
    found = birth(0, base, **rewarmup)
    assert type(curve_of(found)) is curve
    assert curve_of(found).follows_norms == (curve is WeightNormRewarmup)
