"""Tell by its name what an optimizer's per-element state is: that decides how it grows.

A moment sums up gradients, and is empty where there were none. Weights are a second set of the model's (an average, or
the iterate that an average is taken of), and have to grow as the weights themselves do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from ds_sparkling.errors import PlanError


class StateKind(Enum):
    """What a per-element state is.

    Attributes:
        MOMENT: a sum or a mean over gradients or updates; zero says that there were none.
        WEIGHTS: another set of the parameter's weights.
    """

    MOMENT = "moment"
    WEIGHTS = "weights"


@dataclass(frozen=True)
class _Known:
    """A state that optimizers keep under a name of their own.

    Attributes:
        kind: what it is.
        degree: of a moment, the power of the gradient that it holds; None if it isn't a power of it.
    """

    kind: StateKind
    degree: int | None = None


_KNOWN = {
    "exp_avg": _Known(StateKind.MOMENT, 1),
    "exp_avg_sq": _Known(StateKind.MOMENT, 2),
    "max_exp_avg_sq": _Known(StateKind.MOMENT, 2),  # amsgrad
    "exp_inf": _Known(StateKind.MOMENT, 1),  # Adamax
    "momentum_buffer": _Known(StateKind.MOMENT, 1),  # SGD, Muon, RMSprop
    "grad_avg": _Known(StateKind.MOMENT, 1),  # RMSprop
    "square_avg": _Known(StateKind.MOMENT, 2),  # RMSprop, Adadelta
    "acc_delta": _Known(StateKind.MOMENT),  # Adadelta
    "sum": _Known(StateKind.MOMENT, 2),  # Adagrad
    "z": _Known(StateKind.WEIGHTS),  # schedule-free optimizers
    "ax": _Known(StateKind.WEIGHTS),  # ASGD
}


def state_kind(key: str, declared: Mapping[str, StateKind]) -> StateKind:
    """What the state ``key`` is.

    Args:
        key: the optimizer's own name of it.
        declared: what a user has said that states are; goes before what is known.

    Raises:
        PlanError: if neither tells.
    """
    if key in declared:
        return declared[key]
    if key not in _KNOWN:
        raise PlanError(
            f"the optimizer keeps a state {key!r} of unknown kind (known: {', '.join(_KNOWN)}); say what it is in the "
            f'"sparkling" block: "state_kinds": {{"{key}": "moment"}} if it sums up gradients, so that new elements '
            f'have none, or {{"{key}": "weights"}} if it is a second set of weights, which grows as they do'
        )
    return _KNOWN[key].kind


def gradient_degree(key: str) -> int | None:
    """How a moment scales when gradients do: the power of the gradient that it holds; None if that isn't known."""
    known = _KNOWN.get(key)
    return None if known is None else known.degree
