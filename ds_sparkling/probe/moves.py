"""Which dimensions of which parameters move when a width does, and by how much.

The ancestor is mup's base and delta shapes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from ds_sparkling.errors import PlanError
from ds_sparkling.probe.build import BuildModel, build_on_meta

#: Widths that count attention heads, and those that count the key/value heads that query heads share.
HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "num_query_heads")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "num_query_groups")

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Move:
    """What a dimension does when widths do.

    Attributes:
        axis: the axis that it carries.
        per_unit: its entries per unit of the axis.
        coupled: whether other axes have a say in its size, so that they can only grow together.
    """

    axis: str
    per_unit: int
    coupled: bool = False


#: (parameter, dimension) -> what it does, for those that move
Moves = dict[tuple[str, int], Move]


def find_moves(build_model: BuildModel, widths: Mapping[str, int]) -> Moves:
    """What moves with the axes of ``widths``, found by doubling one at a time.

    Raises:
        PlanError: if no parameter moves; or names what moves by anything but a multiple of a width.
    """
    shapes = _shapes(build_on_meta(build_model, widths))
    changes: dict[tuple[str, int], dict[str, tuple[int, int]]] = {}
    for axis in widths:
        before, after = pair(build_model, widths, axis)
        _check_state(before, after, axis)
        small, large = _shapes(before), _shapes(after)
        for name, shape in small.items():
            for position, sizes in enumerate(zip(shape, large[name], strict=True)):
                if sizes[0] != sizes[1]:
                    changes.setdefault((name, position), {})[axis] = sizes
    if widths and not changes:
        axes = ", ".join(map(repr, widths))
        raise PlanError(f"no parameter changes with {axes}: is it a width, and does build_model pass it on?")
    moves: Moves = {}
    together: dict[tuple[str, ...], Shapes] = {}
    for (name, position), sizes_by_axis in changes.items():
        size = shapes[name][position]
        found = _simple(sizes_by_axis, widths, size)
        if found is None and len(sizes_by_axis) > 1:
            involved = tuple(sizes_by_axis)
            if involved not in together:
                doubled = {**widths, **{axis: 2 * widths[axis] for axis in involved}}
                together[involved] = _shapes(build_on_meta(build_model, doubled))
            found = _coupled(widths, involved, size, together[involved][name][position])
        if found is None:
            raise _irregular(name, position, size, sizes_by_axis, widths)
        moves[name, position] = found
    return moves


def _simple(changes: Mapping[str, tuple[int, int]], widths: Mapping[str, int], size: int) -> Move | None:
    """A dimension that is a multiple of one axis, if it is."""
    if len(changes) != 1:
        return None
    ((axis, (small, large)),) = changes.items()
    per_unit, rest = divmod(large - small, widths[axis])
    return Move(axis, per_unit) if not rest and per_unit * widths[axis] == size else None


def _coupled(widths: Mapping[str, int], axes: Collection[str], size: int, doubled: int) -> Move | None:
    """A dimension that several axes make, and that doubles when they all do; it goes to the narrowest, heads first."""
    if doubled != 2 * size:
        return None
    order = sorted(axes, key=lambda axis: (axis not in KEY_VALUE_HEADS, axis not in HEADS, widths[axis]))
    return next((Move(axis, size // widths[axis], coupled=True) for axis in order if size % widths[axis] == 0), None)


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
            f"{name}: dimension {position} changes with {' and '.join(changes)}, and not as their common multiple; "
            "such a dimension can't grow"
        )
    ((axis, (small, large)),) = changes.items()
    heads = "" if axis in HEADS + KEY_VALUE_HEADS else "; if it is made of heads, let their number grow along"
    return PlanError(
        f"{name}: dimension {position} of size {size} goes from {small} to {large} when {axis} goes from "
        f"{widths[axis]} to {2 * widths[axis]}; only multiples of the width can grow{heads}"
    )


def _shapes(model: nn.Module) -> Shapes:
    return {name: tuple(param.shape) for name, param in model.named_parameters()}


def _check_state(before: nn.Module, after: nn.Module, axis: str) -> None:
    """Refuse an axis that changes which parameters there are, or buffers that belong to the model's state.

    All other buffers the model makes anew by itself.
    """
    if _shapes(before).keys() != _shapes(after).keys():
        raise PlanError(f"changing {axis} changes which parameters the model has; such an axis can't grow")
    saved = before.state_dict().keys()
    shapes = {name: buffer.shape for name, buffer in before.named_buffers()}
    for name, buffer in after.named_buffers():
        if name in saved and shapes.get(name) != buffer.shape:
            raise PlanError(f"buffer {name} changes its shape with {axis}; growing buffers isn't supported")
