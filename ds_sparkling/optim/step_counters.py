"""The numbers that an optimizer keeps of a tensor beside its per-element state: step counters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def same_numbers(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two parameters' numbers are the same, so that they can share one flat tensor."""
    return first.keys() == second.keys() and all(float(first[key]) == float(second[key]) for key in first)
