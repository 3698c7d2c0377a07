"""Find a model's axes: probing lists what they may be, growing a small instance tells which it is."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ds_sparkling.discovery.build import BuildModel
from ds_sparkling.discovery.forward import Inputs, NotRunnableError
from ds_sparkling.discovery.layer_lists import at_depth, layer_axes
from ds_sparkling.discovery.moves import counts_experts
from ds_sparkling.discovery.patience import Patience
from ds_sparkling.discovery.proof import Attempt, Proof, kept, refutation
from ds_sparkling.discovery.reading import Reading, UnreadableError, probe, read
from ds_sparkling.discovery.trial import Trial, TrialGrowth, trials_of
from ds_sparkling.errors import PlanError
from ds_sparkling.spec.axes import Dim, ParamAxes
from ds_sparkling.spec.strategy import Strategy

#: Readings that are tried at most, of the likeliest and of those laid out alike; each takes hundredths of a second.
_READINGS = 128


@dataclass(frozen=True)
class Found:
    """What is known of a model's parameters.

    Attributes:
        axes: what their dimensions are.
        proof: whether growing widths was shown to keep the model's function.
        tried: the axes of which ``axes`` is known to be right: those that were tried; all, if types and names leave
            no doubt.
    """

    axes: dict[str, ParamAxes]
    proof: Proof
    tried: tuple[str, ...]


@dataclass(frozen=True)
class WidthsAlone:
    """A model, and the growths of its widths alone: what counts layers stays what it is.

    Attributes:
        build_model: builds the model from its widths.
        widths: those in force.
        growths: the widths that grow together, and what to; one growth after the other.
        layer_axes: the axes that were left out.
    """

    build_model: BuildModel
    widths: dict[str, int]
    growths: tuple[dict[str, int], ...]
    layer_axes: tuple[str, ...]

    @classmethod
    def of(
        cls, build_model: BuildModel, widths: Mapping[str, int], growths: Sequence[Mapping[str, int]]
    ) -> WidthsAlone:
        """Those of any growths.

        Raises:
            PlanError: if the model can't be built as it is.
        """
        deep = layer_axes(build_model, widths, widths)
        alone = ({axis: width for axis, width in growth.items() if axis not in deep} for growth in growths)
        return cls(
            at_depth(build_model, {axis: widths[axis] for axis in deep}),
            {axis: width for axis, width in widths.items() if axis not in deep},
            tuple(growth for growth in alone if growth),
            deep,
        )


def axes_to_grow(
    build_model: BuildModel,
    widths: Mapping[str, int],
    growths: Sequence[Mapping[str, int]],
    grown: Sequence[Mapping[str, int]],
    strategy: Strategy,
    hints: Mapping[str, ParamAxes] | None = None,
    inputs: Inputs | None = None,
    *,
    check: bool = True,
) -> Found:
    """The axes for some growths to come, each tried as its strategy promises.

    Args:
        build_model: builds the model when called with the axis widths.
        widths: the widths in force, of all axes.
        growths: the axes that will grow together, and their new widths; one growth after the other.
        grown: those that have grown together already; they must be read as they were then.
        strategy: how the growths will be.
        hints: what is known already, by patterns that match whole names.
        inputs: of the model's forward; random token ids by default.
        check: whether to try; otherwise types and names have to tell.

    Raises:
        PlanError: as :func:`find_axes`.
    """
    alone = WidthsAlone.of(build_model, widths, growths)
    if not check:
        axes = probe(alone.build_model, alone.widths, hints)
        return Found(axes, Proof(None, "check is false"), tuple(sorted(widths)))
    past = [tuple(axis for axis in growth if axis not in alone.layer_axes) for growth in grown]
    trials = [*planned(alone.widths, alone.growths, strategy)]
    trials += [TrialGrowth(alone.widths, growth) for growth in past if growth]
    found = _find(alone.build_model, alone.widths, trials, hints, inputs)
    return replace(found, tried=tuple(sorted({*found.tried, *alone.layer_axes})))


def planned(
    widths: Mapping[str, int], growths: Sequence[Mapping[str, int]], strategy: Strategy
) -> Iterator[TrialGrowth]:
    """Growths that follow one another."""
    for after in growths:
        yield TrialGrowth(widths, tuple(after), after, strategy)
        widths = {**widths, **after}


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
    return _find(build_model, widths, [TrialGrowth(widths, tuple(growth)) for growth in growths], hints, inputs)


def _find(
    build_model: BuildModel,
    widths: Mapping[str, int],
    growths: Sequence[TrialGrowth],
    hints: Mapping[str, ParamAxes] | None,
    inputs: Inputs | None,
) -> Found:
    reading = read(build_model, widths, hints)
    _refuse_experts(reading)
    if not growths:
        return _unproven(reading, widths, "no growth is known of", sure=False)
    tried = tuple(sorted({axis for growth in growths for axis in growth.axes}))
    patience = Patience()
    attempts: list[Attempt] = []
    try:
        sets = [trials_of(build_model, growth, reading.likeliest, inputs, patience) for growth in growths]
        copies = [trial for trials in sets for trial in trials.copies]
        unequal = [trial for trials in sets for trial in trials.unequal]
        found: Attempt | None = None
        for axes in itertools.chain(
            itertools.islice(reading.readings(), _READINGS), itertools.islice(reading.alike(), _READINGS)
        ):
            patience.spend(f"reading {len(attempts) + 1} of what {', '.join(tried)} may be")
            attempts.append(_attempt(copies, axes))
            if attempts[-1].passed < len(copies):
                continue
            found = found or attempts[-1]
            if _attempt(unequal, axes).passed == len(unequal):
                found = attempts[-1]
                break
        if found is None:
            raise refutation(copies, attempts, patience)
        _refuse_untold(reading, found.axes, tried, copies, patience)
        worst = kept([trial for trials in sets for trial in trials.planned], found.axes, patience)
        doubt = next((f"not provable: {trials.doubt}" for trials in sets if trials.doubt), "")
        proof = Proof(None, doubt) if doubt else Proof(max(worst, found.difference))
        return Found(dict(found.axes), proof, tried if reading.uncertain else tuple(sorted(widths)))
    except NotRunnableError as error:
        return _unproven(reading, widths, f"not provable: {error}")


def _attempt(trials: Sequence[Trial], axes: dict[str, ParamAxes]) -> Attempt:
    """How many trials a reading passes before the first that it fails."""
    worst = 0.0
    for passed, trial in enumerate(trials):
        try:
            difference = trial.difference(axes)
        except PlanError as error:
            return Attempt(axes, passed, error=error)
        worst = max(worst, difference)
        if difference > trial.tolerance:
            return Attempt(axes, passed, worst)
    return Attempt(axes, len(trials), worst)


def _refuse_experts(reading: Reading) -> None:
    """Raise PlanError for an axis that counts experts."""
    for name, axes in reading.likeliest.items():
        for axis in axes.dims[0].axes if axes.stacked_experts else ():
            raise counts_experts(axis, f"{name} stacks them")


def _refuse_untold(
    reading: Reading, axes: Mapping[str, ParamAxes], tried: Collection[str], trials: Sequence[Trial], patience: Patience
) -> None:
    """Raise UnreadableError for a parameter that passes every trial read otherwise, too: no trial tells what it is.

    It doesn't matter what a parameter is that has a part in the outputs and no say in them, as the bias of attention's
    keys, which is the same for all of them.
    """
    for kind in reading.kinds:
        names = kind.names
        for option in kind.options:
            other = {name: _told_apart(axes[name], option, tried) for name in names}
            if all(other[name] == axes[name] for name in names):
                continue
            patience.spend(f"reading {names[0]} otherwise")
            if _attempt(trials, {**axes, **other}).passed == len(trials) and not trials[0].subject.uses(names):
                raise UnreadableError(
                    f"{reading.unknown(names[0])}. Trying it out doesn't tell: a small instance keeps its function "
                    "either way, so nothing that it computes depends on this, neither its logits nor its loss in "
                    "training; pass inputs with which something does, or say what it is"
                )


def _told_apart(chosen: ParamAxes, option: ParamAxes, tried: Collection[str]) -> ParamAxes:
    """``chosen`` with the dimensions of ``option`` where copies along the ``tried`` axes would be others."""
    dims = []
    for dim, other in zip(chosen.dims, option.dims, strict=True):
        differs = (dim.axes | other.axes) & set(tried) and _as_copied(dim) != _as_copied(other)
        dims.append(replace(other, power=dim.power) if differs and other.axes else other if differs else dim)
    return replace(chosen, dims=tuple(dims))


def _as_copied(dim: Dim) -> Dim:
    """A dimension without what copies don't ask for."""
    return replace(dim.mapped(lambda leaf: replace(leaf, alive=())), power=0.0)


def _unproven(reading: Reading, widths: Mapping[str, int], reason: str, *, sure: bool = True) -> Found:
    """The likeliest axes, if they are ``sure`` or needn't be."""
    if reading.uncertain and sure:
        error = reading.unknown(reading.uncertain[0])
        raise UnreadableError(f"{error}. Trying it out is {reason}") from None
    return Found(reading.likeliest, Proof(None, reason), () if reading.uncertain else tuple(sorted(widths)))
