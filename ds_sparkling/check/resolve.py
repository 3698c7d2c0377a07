"""Finding a model's axes: probing lists what they may be, growing a small instance tells which it is."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ds_sparkling.axes import ParamAxes
from ds_sparkling.check.comparison import Runnable, difference_after, first_runnable, fitting_axes, tolerance
from ds_sparkling.check.forward import Inputs, NotRunnableError
from ds_sparkling.check.instance import instances
from ds_sparkling.check.proof import Proof, prove_function
from ds_sparkling.errors import PlanError
from ds_sparkling.probe import BuildModel, Reading, UnreadableError, probe, read
from ds_sparkling.strategy import Strategy

#: Readings that are tried at most; each takes some hundredths of a second.
_TRIALS = 128


@dataclass(frozen=True)
class Found:
    """What is known of a model's parameters.

    Attributes:
        axes: what their dimensions are.
        proof: whether growing was shown to keep the model's function.
        tried: the axes of which ``axes`` is known to be right: those that were tried; all, if types and names leave
            no doubt.
    """

    axes: dict[str, ParamAxes]
    proof: Proof
    tried: tuple[str, ...]

    @property
    def doubt(self) -> str:
        """What to warn of; empty if growing keeps the function."""
        return "" if self.proof else f"whether growing keeps the model's function is not known: {self.proof.reason}"


def axes_to_grow(
    build_model: BuildModel,
    widths: Mapping[str, int],
    growths: Sequence[Mapping[str, int]],
    grown: Sequence[Mapping[str, int]],
    strategy: Strategy,
    hints: Mapping[str, ParamAxes] | None = None,
    *,
    check: bool = True,
) -> Found:
    """The axes for some growths to come, each tried as its strategy promises.

    Args:
        build_model: builds the model when called with the axis widths.
        widths: the widths in force, of all axes.
        growths: the axes that will grow together, and their new widths.
        grown: those that have grown together already; they must be read as they were then.
        strategy: how the growths will be.
        hints: what is known already, by patterns that match whole names.
        check: whether to try; otherwise types and names have to tell.

    Raises:
        PlanError: as :func:`find_axes`.
    """
    if not check:
        return Found(probe(build_model, widths, hints), Proof(None, "check is false"), tuple(sorted(widths)))
    found = find_axes(build_model, widths, [tuple(growth) for growth in (*growths, *grown)], hints)
    for growth in growths if found.proof else []:
        proof = prove_function(build_model, found.axes, widths, growth, strategy)
        found = replace(found, proof=proof if not proof else found.proof)
    return found


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
        return _unproven(reading, widths, "no growth is known of", sure=False)
    tried = tuple(sorted({axis for growth in growths for axis in growth}))
    try:
        runnables = [_runnable(build_model, widths, growth, inputs) for growth in growths]
        for axes in itertools.islice(reading.readings(), _TRIALS):
            differences = _differences(runnables, axes)
            if len(differences) == len(runnables):
                return Found(axes, Proof(max(differences)), tried if reading.uncertain else tuple(sorted(widths)))
    except NotRunnableError as error:
        return _unproven(reading, widths, f"not provable: {error}")
    for growth in growths:
        proof = prove_function(build_model, reading.likeliest, widths, dict.fromkeys(growth, 0), inputs=inputs)
        if not proof:
            return _unproven(reading, widths, proof.reason)
    return _unproven(reading, widths, "not provable: the model's logits differ between two runs")


def _runnable(
    build_model: BuildModel, widths: Mapping[str, int], growth: Collection[str], inputs: Inputs | None
) -> Runnable:
    twice = {axis: 2 * widths[axis] for axis in growth}
    try:
        small = instances(build_model, widths, twice, keep_vocabulary=inputs is not None)
        return first_runnable(small, inputs, torch.float64, seed=0)
    except PlanError as error:
        raise NotRunnableError(str(error)) from error


def _unproven(reading: Reading, widths: Mapping[str, int], reason: str, *, sure: bool = True) -> Found:
    """The likeliest axes, if they are ``sure`` or needn't be."""
    if reading.uncertain and sure:
        error = reading.unknown(reading.uncertain[0])
        raise UnreadableError(f"{error}. Trying it out is {reason}") from None
    return Found(reading.likeliest, Proof(None, reason), () if reading.uncertain else tuple(sorted(widths)))


def _differences(runnables: Sequence[Runnable], axes: Mapping[str, ParamAxes]) -> list[float]:
    """Of the logits after each growth that keeps the function, up to the first that doesn't."""
    differences = []
    for runnable in runnables:
        difference = difference_after(runnable, fitting_axes(runnable.instance, runnable.model, axes))
        if difference > tolerance(runnable.dtype):
            break
        differences.append(difference)
    return differences
