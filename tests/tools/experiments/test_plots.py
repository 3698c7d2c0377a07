"""Every panel of a results picture has a legend that names its reference, and intervals of paired differences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from experiments.catalogue import Contender, Experiment, Lab
from experiments.plots import figure_of
from experiments.results import Table, table_of
from experiments.runs import Outcome, Point
from experiments.scales import SCALES


def table(names: int, *, curved: bool = False) -> Table:
    """``names`` variants of which the first is the reference, with three seeds that differ far more than they."""
    base = SCALES["tiny"].base("")
    runs = {f"variant {number}": replace(base, lr=number + 1.0) for number in range(names)}

    def variants(_: Lab) -> Iterator[Contender]:
        for number, (name, run) in enumerate(runs.items()):
            yield Contender(name, run, "" if number == 0 else "variant 0", series="ours", x=number if curved else None)

    def outcome(number: int, seed: int) -> Outcome:
        loss = 1.0 + seed + 0.1 * number + 0.01 * (seed - 1) * number
        return Outcome(loss, 1e9, 2.0, curve=(Point(1, 1e8, loss + 1), Point(2, 1e9, loss)))

    outcomes = {
        replace(run, seed=seed).key: outcome(number, seed)
        for number, run in enumerate(runs.values())
        for seed in range(3)
    }
    return table_of(Experiment("e", "E", "Fig. 0", "?", variants, (), "how much"), Lab(SCALES["tiny"], "", 3, outcomes))


@pytest.mark.parametrize("names", [3, 25])
@pytest.mark.parametrize("curved", [False, True])
def test_both_panels_have_a_legend_and_a_reference(names: int, curved: bool) -> None:
    left, right = figure_of(table(names, curved=curved)).axes
    for axes in (left, right):
        legend = axes.get_legend()
        assert legend is not None
        texts = [text.get_text() for text in legend.get_texts()]
        assert any("variant 0" in text or "reference" in text for text in texts), texts
    legend = left.get_legend()
    assert legend is not None
    assert legend.get_title().get_text() == "paired difference, 95% interval, 3 seeds"
    legend = right.get_legend()
    assert legend is not None
    assert len(legend.get_texts()) == names  # each variant but the reference, which is the zero line


def test_the_intervals_are_those_of_paired_differences() -> None:
    """Seeds are 1 apart, differences 0.1 with a spread of 0.01: the shade is as wide as the latter's interval."""
    _, right = figure_of(table(2)).axes
    (shade,) = right.collections
    vertices = np.asarray(shade.get_paths()[0].vertices)
    half = 4.303 * 0.01 / 3**0.5
    assert np.ptp(vertices[:, 1]) == pytest.approx(2 * half, rel=1e-3)
