"""Few cases in which any two values of any two parameters meet, instead of the full product; or a share of it each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def pairwise(
    values: Mapping[str, Sequence[Any]], possible: Callable[..., bool] = lambda **_: True
) -> list[dict[str, Any]]:
    """Cases by parameter name, greedily: each is the one that has most pairs of values that haven't met yet.

    Args:
        possible: whether a case can be; called with the parameters as keywords.
    """
    cases = [dict(zip(values, case, strict=True)) for case in itertools.product(*values.values())]
    positions = [{name: values[name].index(case[name]) for name in values} for case in cases if possible(**case)]
    pairs = [frozenset(itertools.combinations(position.items(), 2)) for position in positions]
    apart, chosen = frozenset().union(*pairs), []
    while apart:
        best = max(range(len(pairs)), key=lambda at: len(pairs[at] & apart))
        apart -= pairs[best]
        chosen.append({name: values[name][at] for name, at in positions[best].items()})
    return chosen


def shares(cases: Sequence[T], steps: int, kind: Callable[[T], object]) -> list[tuple[T, tuple[int, ...]]]:
    """Each case with the numbers of the steps that it takes: all for the first case of a kind, three for the others.

    Every step is taken by about as many of the others as any other step.
    """
    kinds: set[object] = set()
    dealt = []
    for number, case in enumerate(cases):
        whole = kind(case) not in kinds
        kinds.add(kind(case))
        spread = {(number + steps * third // 3) % steps for third in range(3)}
        dealt.append((case, tuple(range(steps)) if whole else tuple(sorted(spread))))
    return dealt
