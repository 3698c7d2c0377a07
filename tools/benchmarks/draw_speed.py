"""Drawing the entries of one matrix, timed against normal_."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ds_sparkling.growth import Widener, make_plan
from ds_sparkling.spec.axes import FIXED, Dim, ParamAxes, Role
from ds_sparkling.spec.strategy import Init, Scaling, Strategy

COLUMNS = (
    ("what", "{}"),
    ("elements", "{:d}"),
    ("M elements/s", "{:.1f}"),
    ("normal_, M elements/s", "{:.1f}"),
    ("times normal_", "{:.2f}"),
)

#: How many times as many columns, and the strategy.
_KINDS = {
    "random": (8, Strategy(fan_out=Init.RANDOM, fan_in=Init.RANDOM, scaling=Scaling.RMS)),
    "cancelling": (8, Strategy(fan_out=Init.RANDOM, fan_in=Init.CANCEL, scaling=Scaling.NONE)),
    "perturbed": (2, Strategy(perturbation=0.1)),
    "perturbed, tripled": (3, Strategy(perturbation=0.1)),
}


@dataclass(frozen=True)
class DrawRow:
    """One line of the table, and one object of the JSON file."""

    what: str
    elements: int
    millions_per_second: float
    normal_millions_per_second: float
    ratio: float


def measure(elements: int, columns: int, dtype: torch.dtype, repeat: int) -> list[DrawRow]:
    """All lines of the table.

    Args:
        elements: of the grown weight, about.
        columns: of the weight before the growth.
    """
    return [_measure(what, elements, columns, dtype, repeat) for what in _KINDS]


def _measure(what: str, elements: int, columns: int, dtype: torch.dtype, repeat: int) -> DrawRow:
    times, strategy = _KINDS[what]
    rows = max(elements // (times * columns), 1)
    axes = {"w": ParamAxes((FIXED, Dim("i", Role.FAN_IN)))}
    plan = make_plan({"w": (rows, columns)}, axes, {"i": columns}, {"i": times * columns}, strategy, number=1)
    old = torch.randn(rows, columns).to(dtype)
    widener = Widener(plan, "w")
    statistics = widener.statistics(old)
    out = torch.empty(widener.numel, dtype=dtype)
    runs: tuple[Callable[[], object], ...] = (lambda: widener.weight(old, out, 0, statistics), out.normal_)
    seconds = [min(each) for each in zip(*([_seconds(run) for run in runs] for _ in range(repeat)), strict=True)]
    speed, normal_speed = (widener.numel / each / 1e6 for each in seconds)
    return DrawRow(what, widener.numel, speed, normal_speed, speed / normal_speed)


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
