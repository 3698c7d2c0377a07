"""List what a dimension that moves may be, by the module's type and the parameter's name, likeliest first.

A buffer holds numbers per unit, which new units take over from their sources.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.modules.conv import _ConvNd

from ds_sparkling.discovery.moves import HEADS, KEY_VALUE_HEADS, Move
from ds_sparkling.spec.axes import FIXED, Dim, Norm, ParamAxes, Role

#: Parameters that hold gate and up projections in one.
_FUSED_GATE_UP = ("gate_up_proj", "gate_and_up_proj", "w13", "w12")
#: Their counterparts, which lead back.
_DOWN = ("down_proj", "w2")
#: Parameters that hold query, key and value projections in one.
_FUSED_QKV = ("qkv", "qkv_proj", "query_key_value", "c_attn", "wqkv", "in_proj_qkv")
#: Parameters that make queries.
_QUERIES = ("q_proj", "q_b_proj", "wq", "wq_b", "query")
#: Parameters (or the linear maps they belong to) whose output is multiplied with another one's: gates, and queries.
_FACTORS = ("gate_proj", "w1", *_QUERIES)


@dataclass(frozen=True)
class Candidates:
    """What the dimensions of parameters of one kind may be.

    Attributes:
        names: the parameters; of a model, all whose names differ in numbers alone.
        options: the likeliest first; none if nothing is known of such a parameter.
        certain: whether the first is right even if nobody proves it.
    """

    names: tuple[str, ...]
    options: tuple[ParamAxes, ...]
    certain: bool


@dataclass(frozen=True)
class OwnedParameter:
    """A parameter, where it stands, and what it does when widths move.

    Attributes:
        name: its name in the model.
        owner: the module that holds it.
        shape: its shape.
        moves: dimension -> what that does, for those that move.
    """

    name: str
    owner: nn.Module
    shape: tuple[int, ...]
    moves: Mapping[int, Move]

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def parent(self) -> str:
        return self.name.split(".")[-2] if "." in self.name else ""

    @property
    def kind(self) -> str:
        return type(self.owner).__name__.lower()

    @property
    def is_buffer(self) -> bool:
        return self.leaf in self.owner._buffers

    @property
    def is_bias(self) -> bool:
        return self.leaf.endswith("bias")

    @property
    def is_of_torch(self) -> bool:
        """A module whose use of its parameters is known; containers leave that to the model's own."""
        container = isinstance(self.owner, nn.ParameterList | nn.ParameterDict)
        return type(self.owner).__module__.startswith("torch.nn") and not container

    def called(self, names: tuple[str, ...]) -> bool:
        return any(part.lower().removesuffix("_bias") in names for part in (self.leaf, self.parent))


def makes_queries(name: str) -> bool:
    """Whether a parameter's name is that of what makes queries, alone or with keys and values."""
    return any(part.lower() in _QUERIES + _FUSED_QKV for part in name.split(".")[-2:])


def candidates(place: OwnedParameter) -> Candidates:
    """What the dimensions of a parameter may be."""
    ndim, moves, names = len(place.shape), place.moves, (place.name,)
    if not moves:
        return Candidates(names, (ParamAxes((FIXED,) * ndim, stacked_experts=_stacked(place)),), True)
    if place.is_buffer:
        ways = [_layouts(place, Role.PER_UNIT, moves[at])[0] if at in moves else [FIXED] for at in range(ndim)]
        return Candidates(names, tuple(map(ParamAxes, itertools.product(*ways))), False)
    options: list[ParamAxes] = []
    stacked = _stacked(place)
    orientations, told = _orientations(place, stacked)
    for rank, roles in enumerate(orientations):
        layouts = [
            _layouts(place, role, moves[position]) if position in moves else ([FIXED], True)
            for position, role in enumerate(roles)
        ]
        if rank == 0:
            told &= all(sure for _, sure in layouts)
        for dims in itertools.product(*(ways for ways, _ in layouts)):
            options.append(ParamAxes(dims, stacked_experts=stacked, norm=_norm(place)))
    unique = tuple(dict.fromkeys(options))
    return Candidates(names, unique, told)


def _orientations(place: OwnedParameter, stacked: bool) -> tuple[list[tuple[Role, ...]], bool]:
    """The roles that the dimensions may have, and whether the first ones are sure."""
    out, into, ndim = Role.FAN_OUT, Role.FAN_IN, len(place.shape)
    if isinstance(place.owner, nn.Embedding):
        return [(Role.INDEX, out)], True
    if isinstance(place.owner, nn.Linear):
        return [(out, into) if ndim == 2 else (out,)], True
    if _norm(place) is not None:
        return [(Role.GAIN,)], True
    if isinstance(place.owner, _ConvNd):
        return _of_convolution(place.owner, ndim)
    if place.is_of_torch:
        return [], False
    if place.kind == "conv1d":  # of transformers: a linear map whose weight is [in, out]
        return [(into, out) if ndim == 2 else (out,)], True
    if ndim == 1:
        return [(out,) if place.is_bias else (Role.PER_UNIT,)], True
    if ndim == 2 and place.is_bias:
        return [(out, out)], True
    if ndim == 2:
        return [(out, into), (into, out)], "router" in place.kind or "gate" in place.kind
    if ndim == 3 and stacked:
        ways: list[tuple[Role, ...]] = [(out, out, into), (out, into, out)]
        transposed = _transposed(place)
        return ways[::-1] if transposed else ways, transposed is not None
    if ndim == 3:
        return [(into, out, out), (into, into, out), (out, out, into), (out, into, into)], False
    return [], False


def _transposed(place: OwnedParameter) -> bool | None:
    """Whether stacked experts are [experts, in, out], as their module says or shows; None if it doesn't."""
    owner, rows = place.owner, place.shape[1:]
    if isinstance(said := getattr(owner, "is_transposed", None), bool):
        return said
    for into, out in (("in_features", "out_features"), ("input_size", "output_size")):
        sizes = getattr(owner, into, None), getattr(owner, out, None)
        if sizes[0] != sizes[1] and rows in (sizes, sizes[::-1]):
            return rows == sizes
    shapes = {name: tuple(param.shape[1:]) for name, param in owner.named_parameters(recurse=False) if param.dim() == 3}
    fused = next((shapes[name] for name in _FUSED_GATE_UP if name in shapes), None)
    down = next((shapes[name] for name in _DOWN if name in shapes), None)
    if fused is None or down is None:
        return None
    if fused == (2 * down[1], down[0]):
        return False
    return True if fused == (down[1], 2 * down[0]) else None


def _of_convolution(conv: _ConvNd, ndim: int) -> tuple[list[tuple[Role, ...]], bool]:
    """The roles of a convolution's weight or bias; those of the kernel's own dimensions don't matter.

    One that convolves every channel for itself holds numbers per unit. In other groups new channels are copies as long
    as whole groups are, which has to be tried.
    """
    out, into = Role.FAN_OUT, Role.FAN_IN
    if conv.groups > 1 and conv.groups == conv.in_channels:
        return [(Role.PER_UNIT,) * ndim], True
    if ndim == 1:
        return [(out,)], True
    pair = (into, out) if conv.transposed else (out, into)
    return [(*pair, *(into,) * (ndim - 2))], conv.groups == 1


def _stacked(place: OwnedParameter) -> bool:
    """Whether a parameter is one of experts stacked as [experts, ...] in a module of the model's own.

    What grows along its first dimension is none, unless something about it is called experts.
    """
    if place.is_of_torch:
        return False
    first = [axis for axis, _ in place.moves[0].shares] if 0 in place.moves else []
    if first and not any("expert" in word.lower() for word in (*first, place.name, place.kind)):
        return False
    beside = any(param.dim() == 3 and len(param) == place.shape[0] for param in place.owner.parameters(recurse=False))
    return len(place.shape) == 3 or (len(place.shape) == 2 and place.is_bias and beside)


def _norm(place: OwnedParameter) -> Norm | None:
    if len(place.shape) != 1 or not any(part in place.kind for part in ("norm", "rms")):
        return None
    if place.is_of_torch and not isinstance(place.owner, nn.LayerNorm | nn.RMSNorm):
        return None  # norms over groups or batches
    return Norm.LAYER if "layernorm" in place.kind else Norm.RMS


def _layouts(place: OwnedParameter, role: Role, move: Move) -> tuple[list[Dim], bool]:
    """How the entries of a moving dimension may lie, and whether the first way is sure."""
    if not move.plain:
        return _parted(place, role, move), False
    ((axis, per_unit),) = move.shares
    alive = (0,) if role is Role.FAN_OUT and place.called(_FACTORS) else ()
    if per_unit == 1:
        return [Dim(axis, role, alive=alive)], not move.coupled
    blocks = Dim(axis, role, block=per_unit, alive=alive)
    fused = role is Role.FAN_OUT and place.called(_FUSED_QKV)
    if axis in HEADS + KEY_VALUE_HEADS:
        return ([blocks, *_equal_parts(axis, role, per_unit)], False) if fused else ([blocks], not move.coupled)
    segments = Dim(axis, role, segments=per_unit, alive=alive)
    if _counts_heads(axis):
        return [blocks, segments], False
    if role is not Role.FAN_OUT:
        return [segments, blocks] if _sizes_heads(axis) else [blocks, segments], False
    if place.called(_FUSED_GATE_UP) and per_unit % 2 == 0:
        halves = Dim(axis, role, block=per_unit // 2, segments=2, alive=(0,))
        ways = [halves, replace(halves, interleaved=True)]
        turns = getattr(place.owner, "is_concatenated", True) is False  # experts of transformers say so
        return ways[::-1] if turns else ways, not move.coupled
    if fused:
        return [replace(segments, alive=(0,)), blocks, *_products(place, [segments])], False
    if _sizes_heads(axis):
        return [*_products(place, [segments]), segments, blocks], False
    return [blocks, segments, *_products(place, [segments])], False


def _counts_heads(axis: str) -> bool:
    return axis in HEADS + KEY_VALUE_HEADS or "heads" in axis


def _sizes_heads(axis: str) -> bool:
    return axis.endswith("head_dim")


def _equal_parts(axis: str, role: Role, per_unit: int) -> list[Dim]:
    """Queries, keys and values, or two of these, of blocks end to end."""
    return [
        Dim(axis, role, block=per_unit // count, segments=count, alive=(0,)) for count in (3, 2) if not per_unit % count
    ]


def _parted(place: OwnedParameter, role: Role, move: Move) -> list[Dim]:
    """Ways in which parts of several axes, or of axes and what stays, make a dimension.

    The parts are in one of their orders once, or once per head, of which there are as many as units have entries.
    """
    ways: list[Dim] = []
    for parts in itertools.product(*(_leaves(role, *share) for share in move.shares)):
        fixed = (Dim(fixed=move.fixed),) if move.fixed else ()
        ways += [Dim(parts=order) for order in itertools.permutations((*parts, *fixed))]
    heads = math.gcd(move.fixed, *(per_unit for _, per_unit in move.shares))
    if heads > 1 and not any(_counts_heads(axis) for axis, _ in move.shares):
        leaves = [Dim(axis, role, segments=per_unit // heads) for axis, per_unit in move.shares]
        fixed = (Dim(fixed=move.fixed // heads),) if move.fixed else ()
        ways = [Dim(parts=order, segments=heads) for order in itertools.permutations((*leaves, *fixed))] + ways
    (axis, per_unit), *others = move.shares
    if move.fixed and not others and _counts_heads(axis) and per_unit > 1 and per_unit % 2:
        # Mamba-2: gates and inputs of all heads, what groups of heads share, and a step size per head.
        both = Dim(axis, role, block=per_unit // 2, segments=2)
        ways = [Dim(parts=(both, Dim(fixed=move.fixed), Dim(axis, role))), *ways]
    if role is Role.FAN_OUT and place.called(_FACTORS + _FUSED_QKV):
        ways = [replace(way, parts=(_alive(way.parts[0]), *way.parts[1:])) for way in ways]
    products = _products(place, ways) if role is Role.FAN_OUT else []
    return [*products, *ways] if any(_sizes_heads(axis) for axis, _ in move.shares) else [*ways, *products]


def _leaves(role: Role, axis: str, per_unit: int) -> list[Dim]:
    """How the entries of one axis may lie in a part."""
    if per_unit == 1:
        return [Dim(axis, role)]
    blocks = Dim(axis, role, block=per_unit)
    if axis in KEY_VALUE_HEADS and per_unit % 2 == 0:  # keys and values end to end
        return [Dim(axis, role, block=per_unit // 2, segments=2), blocks]
    if _counts_heads(axis):
        return [blocks]
    return [Dim(axis, role, segments=per_unit), blocks]


def _alive(part: Dim) -> Dim:
    return part if part.axis is None else replace(part, alive=(0,))


def _products(place: OwnedParameter, ways: list[Dim]) -> list[Dim]:
    """What queries may be to a size of heads: the side of the product with keys that is summed over.

    Attention scales the product by the root of the head's size, or leaves it.
    """
    if not place.called(_QUERIES):
        return []
    found = []
    for way in ways:
        summed = way.mapped(lambda leaf: replace(leaf, role=Role.FAN_IN, alive=()))
        found += [replace(summed, power=-0.5), summed]
    return found
