"""Finding a model's axes: probing lists what they may be, growing a small instance tells which it is."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from ds_sparkling.axes import ParamAxes
from ds_sparkling.check.comparison import Runnable, difference_after, first_runnable, fitting_axes, tolerance
from ds_sparkling.check.forward import Inputs
from ds_sparkling.check.instance import instances
from ds_sparkling.check.proof import Proof, prove_function
from ds_sparkling.errors import PlanError
from ds_sparkling.probe import BuildModel, Reading, read

#: Readings that are tried at most; each takes some hundredths of a second.
_TRIALS = 128


@dataclass(frozen=True)
class Found:
    """The axes of a model's parameters, and whether growing along them was shown to keep its function."""

    axes: dict[str, ParamAxes]
    proof: Proof


def find_axes(
    build_model: BuildModel,
    widths: Mapping[str, int],
    growths: Sequence[Collection[str]],
    hints: Mapping[str, ParamAxes] | None = None,
    inputs: Inputs | None = None,
) -> Found:
    """What every dimension of every parameter of a model is.

    Args:
        build_model: builds the model when called with the axis widths.
        widths: the widths in force, of all axes.
        growths: sets of axes that will grow together; with none, nothing is tried and the likeliest axes are taken.
        hints: what is known already, by patterns that match whole names.
        inputs: of the model's forward; random token ids by default.

    Returns:
        The likeliest axes with which growing keeps the function of a small instance; where none can be run, the
        likeliest ones, if types and names leave no doubt.

    Raises:
        PlanError: names the parameter whose dimension can't be told, or the module that growing would change.
    """
    reading = read(build_model, widths, hints)
    if not growths:
        return Found(reading.likeliest, Proof(None, "no growth is known of"))
    try:
        runnables = [_runnable(build_model, widths, growth, inputs) for growth in growths]
    except PlanError as error:
        return _unproven(reading, f"not provable: {error}")
    for axes in itertools.islice(reading.readings(), _TRIALS):
        differences = _differences(runnables, axes)
        if len(differences) == len(runnables):
            return Found(axes, Proof(max(differences)))
    likeliest = reading.likeliest
    for growth in growths:
        proof = prove_function(build_model, likeliest, widths, dict.fromkeys(growth, 0), inputs=inputs)
        if not proof:
            return _unproven(reading, proof.reason)
    raise AssertionError("a reading that keeps the function wasn't taken")


def _runnable(
    build_model: BuildModel, widths: Mapping[str, int], growth: Collection[str], inputs: Inputs | None
) -> Runnable:
    twice = {axis: 2 * widths[axis] for axis in growth}
    return first_runnable(
        instances(build_model, widths, twice, keep_vocabulary=inputs is not None), inputs, torch.float64, seed=0
    )


def _unproven(reading: Reading, reason: str) -> Found:
    if reading.uncertain:
        error = reading.unknown(reading.uncertain[0])
        raise PlanError(f"{error}. Trying it out is {reason}") from None
    return Found(reading.likeliest, Proof(None, reason))


def _differences(runnables: Sequence[Runnable], axes: Mapping[str, ParamAxes]) -> list[float]:
    """Of the logits after each growth that keeps the function, up to the first that doesn't."""
    differences = []
    for runnable in runnables:
        difference = difference_after(runnable, fitting_axes(runnable.instance, runnable.model, axes))
        if difference > tolerance(runnable.dtype):
            break
        differences.append(difference)
    return differences
