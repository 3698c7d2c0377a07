"""Find which dimensions of which parameters move when a width does, and by how much.

The ancestor is mup's base and delta shapes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from ds_sparkling.discovery.build import BuildModel, build_on_meta, names_known, shapes_of
from ds_sparkling.errors import PlanError

#: Widths that count attention heads, and those that count the key/value heads that query heads share.
HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "num_query_heads")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "num_query_groups")

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Move:
    """What a dimension does when widths do.

    Attributes:
        shares: the axes that it carries, and its entries per unit of each.
        fixed: its entries that stay whatever the widths.
        coupled: whether other axes have a say in its size, so that they can only grow together.
    """

    shares: tuple[tuple[str, int], ...]
    fixed: int = 0
    coupled: bool = False

    @property
    def plain(self) -> bool:
        """Whether it is a multiple of one width."""
        return len(self.shares) == 1 and not self.fixed

    def __str__(self) -> str:
        multiples = [f"{per_unit} times {axis}" for axis, per_unit in self.shares]
        return " and ".join(multiples + ([f"{self.fixed} entries that stay"] if self.fixed else []))


#: (parameter or buffer of the state, dimension) -> what it does, for those that move
Moves = dict[tuple[str, int], Move]


def find_moves(build_model: BuildModel, widths: Mapping[str, int], told: Collection[str] = ()) -> Moves:
    """What moves with the axes of ``widths``, found by doubling one at a time.

    A dimension that moves with one axis and back with another, and stays when all of these double, doesn't count.
    Axes that the model takes only in a fixed ratio double together; what then moves goes to the one that it is a
    multiple of.

    Args:
        told: parameters of which it needn't be known, because a hint tells; what can't be told of them is left out.

    Raises:
        PlanError: if no parameter moves; or names what moves by anything but multiples of widths.
    """
    changes: dict[tuple[str, int], dict[str, tuple[int, int]]] = {}
    bound, failure = [], None
    for axis in widths:
        try:
            models = pair(build_model, widths, axis)
        except PlanError as error:
            bound.append(axis)
            failure = failure or error
            continue
        for place, both in _changed(*models, axis):
            changes.setdefault(place, {})[axis] = both
    if failure is not None:
        for place, both in _changed(*_bound_pair(build_model, widths, bound, failure), " and ".join(bound)):
            axis = _multiple_of(both[1] - both[0], bound, widths)
            changes.setdefault(place, {})[axis] = both
    sizes, moves = _Sizes(build_model, widths, bound), Moves()
    changes = {place: by_axis for place, by_axis in changes.items() if not sizes.stays(place, by_axis)}
    if widths and not changes:
        axes = ", ".join(map(repr, widths))
        names = names_known(
            build_model, getattr(build_on_meta(build_model, widths), "config", None), next(iter(widths))
        )
        raise PlanError(f"no parameter changes with {axes}: is it a width, and does build_model pass it on?{names}")
    for place, by_axis in changes.items():
        found = sizes.sum_of_multiples(place, by_axis) or sizes.common_multiple(place, by_axis)
        if found is not None:
            moves[place] = found
        elif place[0] not in told:
            raise _irregular(*place, sizes.at(place), by_axis, widths)
    return moves


def _changed(before: nn.Module, after: nn.Module, axis: str) -> Iterator[tuple[tuple[str, int], tuple[int, int]]]:
    """Every dimension that isn't the same in two models, and its sizes in them.

    Raises:
        PlanError: if the models have other parameters, or buffers that belong to their state.
    """
    small, large = shapes_of(before), shapes_of(after)
    new = sorted(small.keys() ^ large.keys())
    if any("expert" in name for name in new):
        raise counts_experts(axis, f"more of them makes {new[0]}, for one")
    if new:
        raise PlanError(
            f"changing {axis} changes which parameters (or buffers of its state) the model has ({new[0]}, for one): it "
            "counts modules and is no width; such an axis can't grow"
        )
    for name, shape in small.items():
        for position, both in enumerate(zip(shape, large[name], strict=True)):
            if both[0] != both[1]:
                yield (name, position), both


def _bound_pair(
    build_model: BuildModel, widths: Mapping[str, int], bound: Collection[str], failure: PlanError
) -> tuple[nn.Module, nn.Module]:
    """The model before and after the axes that can't double one by one double together.

    Raises:
        PlanError: the ``failure`` of doubling one, if that doesn't help.
    """
    if len(bound) < 2:
        raise failure
    try:
        doubled = build_on_meta(build_model, {**widths, **{axis: 2 * widths[axis] for axis in bound}})
    except PlanError:
        raise failure from None
    return build_on_meta(build_model, widths), doubled


def _multiple_of(moved: int, axes: Collection[str], widths: Mapping[str, int]) -> str:
    """The axis that moves a dimension by so much: one of just that width, else the narrowest it is a multiple of."""
    order = sorted(axes, key=lambda axis: (widths[axis] != moved, moved % widths[axis] != 0, widths[axis]))
    return order[0]


class _Sizes:
    """What a dimension's size is at multiples of the widths, each built once."""

    def __init__(self, build_model: BuildModel, widths: Mapping[str, int], bound: Collection[str]) -> None:
        self._build_model = build_model
        self._widths = widths
        self._bound = frozenset(bound)
        self._shapes: dict[tuple[int, frozenset[str]], Shapes] = {}

    def at(self, place: tuple[str, int], times: int = 1, axes: Collection[str] = ()) -> int:
        """The size of a dimension with some axes ``times`` as wide.

        Raises:
            PlanError: if the model can't be built so.
        """
        moved = frozenset(axes) | (self._bound if self._bound & set(axes) else frozenset())
        key = (times, moved)
        if key not in self._shapes:
            wide = {**self._widths, **{axis: times * self._widths[axis] for axis in moved}}
            self._shapes[key] = shapes_of(build_on_meta(self._build_model, wide))
        return self._shapes[key][place[0]][place[1]]

    def stays(self, place: tuple[str, int], changes: Mapping[str, tuple[int, int]]) -> bool:
        """Whether a dimension is what it was when all axes that move it double."""
        return len(changes) > 1 and self.at(place, 2, tuple(changes)) == self.at(place)

    def sum_of_multiples(self, place: tuple[str, int], changes: Mapping[str, tuple[int, int]]) -> Move | None:
        """A dimension whose size is made of a multiple of every width that moves it and of what stays, if it is.

        Twice the widths can't tell that from other sizes if something stays or several add up; three times can.
        """
        shares = []
        for axis, (small, large) in changes.items():
            per_unit, rest = divmod(large - small, self._widths[axis])
            if rest or per_unit < 1:
                return None
            shares.append((axis, per_unit))
        moving = sum(per_unit * self._widths[axis] for axis, per_unit in shares)
        found = Move(tuple(shares), self.at(place) - moving, coupled=not self._bound.isdisjoint(changes))
        if found.fixed < 0:
            return None
        if found.plain or self.at(place, 3, tuple(changes)) == found.fixed + 3 * moving:
            return found
        return None

    def common_multiple(self, place: tuple[str, int], changes: Mapping[str, tuple[int, int]]) -> Move | None:
        """A dimension that several axes make, and that doubles when all do; it goes to the narrowest, heads first."""
        size, widths = self.at(place), self._widths
        if len(changes) < 2 or self.at(place, 2, tuple(changes)) != 2 * size:
            return None
        order = sorted(changes, key=lambda axis: (axis not in KEY_VALUE_HEADS, axis not in HEADS, widths[axis]))
        whole = [axis for axis in order if size % widths[axis] == 0]
        return Move(((whole[0], size // widths[whole[0]]),), coupled=True) if whole else None


def pair(build_model: BuildModel, widths: Mapping[str, int], axis: str) -> tuple[nn.Module, nn.Module]:
    """The model before and after ``axis`` doubles; if it can't alone, both with other widths doubled, too."""
    failure: PlanError | None = None
    for others in _supports(widths, axis):
        around = {**widths, **{other: 2 * widths[other] for other in others}}
        try:
            return build_on_meta(build_model, around), build_on_meta(build_model, {**around, axis: 2 * widths[axis]})
        except PlanError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _supports(widths: Mapping[str, int], axis: str) -> Iterator[tuple[str, ...]]:
    others = tuple(other for other in widths if other != axis)
    yield ()
    if others:
        yield from ((other,) for other in others)
        yield others


def _irregular(
    name: str, position: int, size: int, changes: Mapping[str, tuple[int, int]], widths: Mapping[str, int]
) -> PlanError:
    if len(changes) > 1:
        return PlanError(
            f"{name}: dimension {position} changes with {' and '.join(changes)}, and neither as their common multiple "
            "nor as a sum of multiples; such a dimension can't grow"
        )
    ((axis, (small, large)),) = changes.items()
    heads = "" if axis in HEADS + KEY_VALUE_HEADS else "; if it is made of heads, let their number grow along"
    groups, rest = divmod(widths[axis], size)
    if not rest and groups > 1 and large == 2 * small:
        return PlanError(
            f"{name}: dimension {position} of size {size} is a share of {axis} ({widths[axis]}), as of {groups} groups "
            f"whose number stays; such a dimension can't grow. Let the number of groups follow {axis}, each of {size}"
            f"{heads}"
        )
    return PlanError(
        f"{name}: dimension {position} of size {size} goes from {small} to {large} when {axis} goes from "
        f"{widths[axis]} to {2 * widths[axis]}; only multiples of the width, beside what stays, can grow{heads}"
    )


def counts_experts(axis: str, where: str) -> PlanError:
    """The error for an axis that is the number of experts, which ``where`` shows."""
    return PlanError(
        f"{axis} counts experts ({where}), and isn't a width: a router has to learn of new experts, which no copying "
        "does. Models get wider here, and the number of experts stays as it is; grow the width of the experts instead"
    )
