"""Eq. 29 against a naive sum, and the paper's Table 2 from the configs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_sparkling.errors import ConfigError
from ds_sparkling.planner.compute import Recipe, sweep
from ds_sparkling.planner.recipes import equal_share, planned
from ds_sparkling.planner.subject import Options, PlannedRun, read_subject

CONFIGS = Path(__file__).parents[2] / "configs"


@st.composite
def recipes(draw: st.DrawFn) -> tuple[Recipe, int, list[int]]:
    """A recipe, the number of its steps and the steps of its growths."""
    growths = draw(st.integers(1, 4))
    steps = draw(st.integers(growths + 1, 60))
    at = sorted(draw(st.sets(st.integers(1, steps - 1), min_size=growths, max_size=growths)))
    active = draw(st.lists(st.integers(1, 10**6), min_size=growths + 1, max_size=growths + 1))
    return Recipe("any", tuple(active), tuple(step / steps for step in at)), steps, at


@given(recipes())
def test_flops_are_those_of_every_step(made: tuple[Recipe, int, list[int]]) -> None:
    recipe, steps, at = made
    naive = sum(6 * recipe.active[sum(step >= grown for grown in at)] for step in range(steps))
    assert recipe.flops(steps) == pytest.approx(naive)
    assert recipe.saved == pytest.approx(1 - naive / (6 * recipe.active[-1] * steps), abs=1e-9)


@given(st.integers(1, 10**9), st.integers(1, 10**9), st.floats(0.01, 0.99))
def test_one_growth_is_equation_29(before: int, wider: int, share: float) -> None:
    after = before + wider
    (recipe,) = sweep(before, after, [share])
    tokens = 7e9
    expanded = share * tokens
    assert recipe.flops(tokens) == pytest.approx(6 * (before * expanded + after * (tokens - expanded)))
    assert equal_share(recipe) == pytest.approx(share, abs=1e-6)


@given(recipes())
def test_the_equal_share_saves_as_much(made: tuple[Recipe, int, list[int]]) -> None:
    recipe, *_ = made
    narrow, wide = recipe.active[0], recipe.active[-1]
    if not narrow < wide:
        return
    saved = equal_share(recipe) * (1 - narrow / wide)
    assert saved == pytest.approx(recipe.saved, abs=1e-9)


@pytest.mark.parametrize("shares", [(0.0,), (1.0,), (0.5, 0.5), (0.6, 0.4)])
def test_growths_out_of_order_are_refused(shares: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="one after the other"):
        Recipe("wrong", tuple(range(1, len(shares) + 2)), shares)


def test_a_model_too_few_is_refused() -> None:
    with pytest.raises(ConfigError, match="2 growths need 3 models, got 2"):
        Recipe("wrong", (1, 2), (0.2, 0.4))


# The paper's Table 2


def subject(name: str) -> PlannedRun:
    return read_subject(str(CONFIGS / f"olmoe-0.5b-2.5b-{name}.json"), Options(tokens=200e9))


def digits(value: float, count: int) -> float:
    """``value`` in so many digits, as the paper prints it."""
    return float(f"{value:.{count - 1}e}")


@pytest.mark.parametrize(
    ("name", "active", "total", "saved"),
    [
        ("inner2x", (751e6, 3), (5e9, 1), 0.20),
        ("hidden2x", (900e6, 2), (5.13e9, 3), 0.25),
        ("joint2x", (1.5e9, 2), (9.96e9, 3), 0.35),
    ],
)
def test_table_2(name: str, active: tuple[float, int], total: tuple[float, int], saved: float) -> None:
    found = subject(name)
    (growth,) = found.growths
    assert growth.share == pytest.approx(0.5)
    assert digits(found.model.active(found.model.widths), 3) == 450e6
    assert digits(found.model.parameters(found.model.widths), 3) == 2.56e9
    assert digits(found.model.active(growth.widths), active[1]) == active[0]
    assert digits(found.model.parameters(growth.widths), total[1]) == total[0]
    assert round(planned(found).saved, 2) == saved


def test_the_papers_flops() -> None:
    """9.01e20 -> 7.21e20 for Inner 2x; the paper's first figure is 6 x 751M x 200B, of the rounded parameters."""
    recipe = planned(subject("inner2x"))
    assert digits(6 * digits(recipe.active[1], 3) * 200e9, 3) == 9.01e20
    assert 6 * recipe.active[1] * 200e9 == pytest.approx(9.01e20, rel=1e-3)
    assert digits(recipe.flops(200e9), 3) == 7.21e20


def test_the_configs_are_of_200_billion_tokens() -> None:
    path = CONFIGS / "olmoe-0.5b-2.5b-joint2x.json"
    assert digits(read_subject(str(path), Options()).tokens, 4) == 200e9
    assert json.loads(path.read_text())["training"]["steps"] == 63578
