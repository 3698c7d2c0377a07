"""Read what a model's parameters may be, as far as shapes, types and names tell.

The model is built with one width moved at a time: the dimensions that move belong to that axis. Types of modules and
names of parameters tell the roles. Where they leave more than one way, a reading lists them all, the likeliest first,
for something that can tell them apart: growing a small instance and comparing what it computes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from ds_sparkling.discovery.build import BuildModel, build_on_meta, saved_buffers, shapes_of
from ds_sparkling.discovery.moves import HEADS, KEY_VALUE_HEADS, Moves, find_moves, pair
from ds_sparkling.discovery.roles import Candidates, OwnedParameter, candidates
from ds_sparkling.errors import PlanError
from ds_sparkling.spec.axes import Dim, ParamAxes, Role
from ds_sparkling.spec.axes_by_pattern import TO_FILL, hintable, match_hints, name_pattern

#: Powers of its own width that a model may multiply embeddings and logits by, the likeliest pairs first.
_PAIRS = tuple(itertools.product((0.0, 0.5, -0.5, 1.0, -1.0), repeat=2))
_POWERS = ((0.0, 0.0), (0.5, 0.0), (0.0, -1.0), *sorted(_PAIRS, key=lambda pair: sum(map(bool, pair))))


class UnreadableError(PlanError):
    """What a parameter's dimensions are can't be told."""


@dataclass(frozen=True)
class Head:
    """The output side of the model, of one axis that grows there.

    Attributes:
        embeddings: the embeddings that carry the axis.
        weights: linear maps outside the repeated layers that consume the axis; the last one is likely the head.
        gains: for a head that is tied: per norm that may feed it, likeliest first, its gain (and shift). Where nothing
            consumes the axis outside of the repeated layers the embedding itself may be the head, by a call of its
            own: then they come after one of no gains.
    """

    embeddings: tuple[str, ...]
    weights: tuple[str, ...]
    gains: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Reading:
    """What a model's parameters may be.

    Attributes:
        kinds: what the parameters, and the buffers of the state that move, may be; together for those of one kind.
        heads: per axis that embeddings carry, where multipliers and a tied head's factor can go.
        descriptions: per parameter, in the model's order, what is known of it, for an error.
        hinted: parameters of which a hint says all.
    """

    kinds: Sequence[Candidates]
    heads: Mapping[str, Head]
    descriptions: Mapping[str, str]
    hinted: frozenset[str] = frozenset()

    def unknown(self, name: str) -> UnreadableError:
        """The error for a parameter that nobody can be sure of, with the hint to fill in."""
        return UnreadableError(self.descriptions[name])

    @property
    def uncertain(self) -> list[str]:
        """A parameter of every kind that nobody can be sure of without trying."""
        return [kind.names[0] for kind in self.kinds if not kind.certain]

    @property
    def likeliest(self) -> dict[str, ParamAxes]:
        """The likeliest way to read the model."""
        return next(self.readings())

    def readings(self) -> Iterator[dict[str, ParamAxes]]:
        """Every way to read the model, the likeliest first."""
        powers = tuple(dict.fromkeys(_POWERS)) if self.heads else _POWERS[:1]
        for rank, *ranks in _by_sum([len(powers), *self._choices()]):
            yield from self._with_heads(self._chosen(ranks), *powers[rank])

    def alike(self) -> Iterator[dict[str, ParamAxes]]:
        """Readings in which all parameters are laid out in the same way, likely or not.

        Options are listed by orientation and then by layout, so equal shares of the way through the lists are alike.
        """
        choices = self._choices()
        parts = max(choices, default=1)
        ranks = ([part * count // parts for count in choices] for part in range(1, parts))
        for chosen in dict.fromkeys(map(tuple, ranks)):
            yield from self._with_heads(self._chosen(chosen), 0.0, 0.0)

    def _choices(self) -> list[int]:
        """How many options every kind has that has more than one."""
        return [len(kind.options) for kind in self.kinds if len(kind.options) > 1]

    def _chosen(self, ranks: Sequence[int]) -> dict[str, ParamAxes]:
        """The axes by the rank of what is chosen for every kind that has a choice."""
        rank = iter(ranks)
        axes: dict[str, ParamAxes] = {}
        for kind in self.kinds:
            axes |= dict.fromkeys(kind.names, kind.options[next(rank) if len(kind.options) > 1 else 0])
        return {name: axes[name] for name in self.descriptions}

    def _with_heads(
        self, axes: dict[str, ParamAxes], embedding: float, logits: float
    ) -> Iterator[dict[str, ParamAxes]]:
        """``axes`` with the multipliers, and with each norm that may feed a tied head."""
        options = [_head_options(axis, head, axes, embedding, logits) for axis, head in self.heads.items()]
        for changes in itertools.product(*options):
            changed = dict(axes)
            for change in changes:
                changed.update({name: param_axes for name, param_axes in change.items() if name not in self.hinted})
            yield changed


def _by_sum(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All tuples of numbers below ``sizes``, those with the smallest sums first, one at a time."""

    def of_sum(total: int, sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
        if not sizes:
            if total == 0:
                yield ()
            return
        for first in range(min(total + 1, sizes[0])):
            for rest in of_sum(total - first, sizes[1:]):
                yield (first, *rest)

    for total in range(sum(size - 1 for size in sizes) + 1):
        yield from of_sum(total, sizes)


def probe(
    build_model: BuildModel, widths: Mapping[str, int], hints: Mapping[str, ParamAxes] | None = None
) -> dict[str, ParamAxes]:
    """What every dimension of every parameter of the model is, by shapes, types and names alone.

    Args:
        build_model: builds the model when called with the axis widths.
        widths: the widths to probe around, one per axis.
        hints: what is known already, by patterns that match whole names.

    Returns:
        name -> :class:`ParamAxes`, in the model's order, tied parameters once, under their first name.

    Raises:
        PlanError: names the parameter whose dimension can't be told.
    """
    reading = read(build_model, widths, hints)
    if reading.uncertain:
        raise reading.unknown(reading.uncertain[0])
    return reading.likeliest


def read(build_model: BuildModel, widths: Mapping[str, int], hints: Mapping[str, ParamAxes] | None = None) -> Reading:
    """All ways to read the model.

    Args, Raises: as :func:`probe`, but what can be told by trying is no error.
    """
    model = build_on_meta(build_model, widths)
    kinds: dict[str, Candidates] = {}
    descriptions: dict[str, str] = {}
    shapes = shapes_of(model)
    buffers = saved_buffers(model).keys()
    hinted = match_hints(hints or {}, hintable(shapes, buffers, hints or {}), "axes")
    moves = find_moves(build_model, widths, hinted.keys())
    for name in shapes:
        place = _place(model, name, moves)
        given = hinted.get(name)
        if name in buffers and not place.moves:
            continue
        found = candidates(place) if given is None else Candidates((name,), (given,), True)
        descriptions[name] = _description(place)
        if not found.options:
            raise UnreadableError(descriptions[name])
        # Layers may have parameters of one name that aren't alike.
        kind = f"{name_pattern(name)} {found.options} {found.certain}"
        kinds[kind] = replace(found, names=(*kinds[kind].names, name)) if kind in kinds else found
    axes = _likeliest(kinds.values())
    groups, indices = _groups(build_model, widths, axes), _indices(axes)
    settled = [
        # A buffer's entries may be of any type, so new ones are copies even of what is looked up.
        _settled(kind, groups, set() if kind.names[0] in buffers else indices)
        for kind in kinds.values()
    ]
    return Reading(settled, _heads(model, _likeliest(settled)), descriptions, frozenset(hinted))


def _likeliest(kinds: Iterable[Candidates]) -> dict[str, ParamAxes]:
    return {name: kind.options[0] for kind in kinds for name in kind.names}


def _place(model: nn.Module, name: str, moves: Moves) -> OwnedParameter:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    shape = tuple(getattr(module, leaf).shape)
    moving = {position: moves[name, position] for position in range(len(shape)) if (name, position) in moves}
    return OwnedParameter(name, module, shape, moving)


def _description(place: OwnedParameter) -> str:
    dims = [TO_FILL if position in place.moves else {} for position in range(len(place.shape))]
    entry = json.dumps({name_pattern(place.name): {"dims": dims}})
    moving = ", ".join(f"dimension {position} is {move}" for position, move in place.moves.items())
    return (
        f"{place.name} ({type(place.owner).__name__}, shape {place.shape}): {moving}, and what that means can't be "
        f'told. Say it in "sparkling": {{"axes": {entry}}}, each "{TO_FILL}" replaced by something like '
        '{"axis": "hidden_size", "role": "fan_in"}'
    )


def key_value_heads(model: nn.Module) -> int | None:
    """How many key/value heads a model's config says it has, if it does."""
    config = getattr(model, "config", None)
    counts = [getattr(config, name, None) for name in KEY_VALUE_HEADS]
    return next((count for count in counts if isinstance(count, int)), None)


def _groups(build_model: BuildModel, widths: Mapping[str, int], axes: Mapping[str, ParamAxes]) -> dict[str, str | int]:
    """Per axis that counts query heads, what groups them."""
    carried = {axis for param_axes in axes.values() for axis in param_axes.axes}
    groups: dict[str, str | int] = {}
    for heads in carried & set(HEADS):
        shared = [axis for axis in KEY_VALUE_HEADS if axis in carried]
        if shared:
            groups[heads] = shared[0]
        if widths.keys() & set(KEY_VALUE_HEADS):
            continue  # if no parameter carries them, as under latent attention, heads are not grouped
        counts = [key_value_heads(model) for model in pair(build_model, widths, heads)]
        if counts[0] is not None and counts[0] == counts[1] and widths[heads] % counts[0] == 0:
            groups[heads] = counts[0]
    return groups


def _indices(axes: Mapping[str, ParamAxes]) -> set[str | None]:
    """Axes that count what embeddings look up."""
    return {leaf.axis for param_axes in axes.values() for leaf in param_axes.leaves if leaf.role is Role.INDEX}


def _settled(found: Candidates, groups: Mapping[str, str | int], indices: set[str | None]) -> Candidates:
    """Candidates with what the other parameters tell about their axes."""

    def settle(leaf: Dim) -> Dim:
        if leaf.axis is not None and leaf.axis in groups:
            return replace(leaf, groups=groups[leaf.axis])
        if leaf.axis in indices:
            return replace(leaf, role=Role.INDEX, alive=())
        return leaf

    options = [option.mapped(settle) for option in found.options]
    return replace(found, options=tuple(dict.fromkeys(options)))


def _heads(model: nn.Module, axes: Mapping[str, ParamAxes]) -> dict[str, Head]:
    """Where the factors of each axis's output side can go.

    Raises:
        PlanError: if a weight is shared in a way that can't grow, or no norm can take a tied head's factor (App. D.1).
    """
    modules = dict(model.named_modules())
    embeddings: dict[str, list[str]] = {}
    for name, param_axes in axes.items():
        if isinstance(modules[name.rpartition(".")[0]], nn.Embedding) and param_axes.dims[1].axis is not None:
            embeddings.setdefault(param_axes.dims[1].axis, []).append(name)
    tied = _tied_heads(model, axes)
    repeated = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    heads = {}
    for axis, names in embeddings.items():
        gains: dict[str, list[str]] = {}
        weights, consumed = [], False
        for name, param_axes in axes.items():
            if axis not in param_axes.axes or name.startswith(repeated):
                continue
            consumed |= any(leaf.axis == axis and leaf.role is Role.FAN_IN for leaf in param_axes.leaves)
            if param_axes.dims[0].role is Role.GAIN:
                gains.setdefault(name.rpartition(".")[0], []).append(name)
            elif isinstance(modules[name.rpartition(".")[0]], nn.Linear) and param_axes.dims[-1].axis == axis:
                weights.append(name)
        norms = tuple(tuple(names) for names in reversed(gains.values()))
        if axis in tied and not norms:
            raise PlanError(
                f"{tied[axis]} is tied to the embedding, so {axis}'s fan-in factor must go into the norm before the "
                "head; found none outside the repeated layers"
            )
        if axis not in tied:
            norms = () if consumed or not norms else ((), *norms)
        heads[axis] = Head(tuple(names), tuple(weights), norms)
    return heads


def _tied_heads(model: nn.Module, axes: Mapping[str, ParamAxes]) -> dict[str, str]:
    """Axis -> the head that is tied to an embedding which carries it."""
    modules = dict(model.named_modules(remove_duplicate=False))  # one module may have several names
    first_name = {id(param): name for name, param in model.named_parameters()}
    tied: dict[str, str] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        first = first_name[id(param)]
        if name == first or not axes[first].axes:
            continue
        owners = modules[first.rpartition(".")[0]], modules[name.rpartition(".")[0]]
        if owners[0] is owners[1] or _used_alike(*owners, first, name):
            continue
        if not (isinstance(owners[0], nn.Embedding) and isinstance(owners[1], nn.Linear)):
            raise PlanError(f"{name} shares its weight with {first}; only a linear head tied to the embedding can grow")
        if axes[first].dims[1].axis is not None:
            tied[axes[first].dims[1].axis or ""] = name
    return tied


def _used_alike(owner: nn.Module, other: nn.Module, name: str, shared: str) -> bool:
    """Whether modules use a parameter that they share for the same, so that it grows alike for both.

    Those of one kind do; and a bias is one wherever it is, as that of a head which the module around it holds, too.
    """
    if name.endswith("bias") and shared.endswith("bias"):
        return True
    if type(owner) is not type(other):
        return False
    return isinstance(owner, nn.ParameterList) or name.rpartition(".")[2] == shared.rpartition(".")[2]


def _head_options(
    axis: str, head: Head, axes: Mapping[str, ParamAxes], embedding: float, logits: float
) -> list[dict[str, ParamAxes]]:
    """The changes that the multipliers ask for; one set per norm (and kind of gain) that may feed a tied head."""
    bases = [
        {name: _powered(axes[name], axis, embedding) for name in names if embedding}
        # A model may multiply the sum of its embeddings, or that of tokens alone before learned positions come to it.
        for names in dict.fromkeys((head.embeddings, head.embeddings[:1]) if embedding else (head.embeddings,))
    ]
    if not head.gains:
        outputs = [
            {name: _powered(axes[name], axis, logits) for name in names if logits}
            for names in dict.fromkeys((head.weights[-1:], head.weights) if logits else (head.weights,))
        ]
        return [base | output for base in bases for output in outputs]
    return [
        base
        | {
            # The tied weight brings its own correction for the embedding's multiplier into the logits.
            name: replace(_powered(axes[name], axis, logits - embedding), head_gain=True, offset=_offset(name, offset))
            for name in gains
        }
        for base in bases
        for gains in head.gains
        for offset in ((0.0, 1.0) if gains else (0.0,))
    ]


def _offset(name: str, offset: float) -> float:
    """A norm's shift is what it is; its gain may be stored without an offset of 1."""
    return 0.0 if name.endswith("bias") else offset


def _powered(axes: ParamAxes, axis: str, power: float) -> ParamAxes:
    return axes.mapped(lambda leaf: replace(leaf, power=power) if leaf.axis == axis else leaf)
