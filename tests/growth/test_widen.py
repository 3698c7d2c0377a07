"""Widening against a reference that looks at one element at a time, and against itself in pieces.

The reference below shares no code with the package: it decodes every index by the layout that axes.py states and
multiplies by the method's factors in NumPy scalars of the tensor's precision, so results are compared bit for bit.
"""

from __future__ import annotations

import gc
import itertools
import math
import pickle
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_sparkling.errors import PlanError
from ds_sparkling.growth import GrowthPlan, GrowthTables, Widener, make_plan
from ds_sparkling.growth import tables as tables_module
from ds_sparkling.growth.plan_in_words import plan_in_words
from ds_sparkling.growth.stretches import Packed
from ds_sparkling.growth.survey import Spread, Survey
from ds_sparkling.spec.axes import FIXED, Dim, Norm, ParamAxes, Role
from ds_sparkling.spec.state_kinds import StateKind
from ds_sparkling.spec.strategy import INIT_PAIRS, Init, NewIndex, OptimizerState, Scaling, Split, Strategy
from unit_maps import Entry, Unit, entries, grown_units

Shape = tuple[int, ...]
COPY_COPY = (Init.COPY, Init.COPY)
ZERO_COPY = (Init.ZERO, Init.COPY)


@dataclass(frozen=True)
class Case:
    """One parameter, ``w``, of a model whose axes are ``h``, ``i`` (whose units may be in groups), and groups ``g``."""

    axes: ParamAxes
    widths: dict[str, int]
    wide: dict[str, int]  # of the axes that grow
    normed: frozenset[str]
    strategy: Strategy
    seed: int
    groups: int | str = 1

    @property
    def plan(self) -> GrowthPlan:
        axes = {"w": self.axes}
        shapes = {"w": self.shape(self.widths)}
        for axis in self.widths:  # an axis needs a parameter to grow, and a gain to be normed
            groups = self.groups if axis == "i" else 1
            normed = axis in self.normed
            dim = Dim(axis, Role.GAIN if normed else Role.FAN_IN, groups=groups)
            axes[f"{axis}.weight"] = ParamAxes((dim,), norm=Norm.RMS if normed else None)
            shapes[f"{axis}.weight"] = (self.widths[axis],)
        return make_plan(shapes, axes, self.widths, self.wide, self.strategy, number=1)

    def shape(self, widths: dict[str, int]) -> Shape:
        """The fixed dimensions are 3 and 2 long (experts: 3)."""
        sizes = itertools.cycle((3, 2))
        fixed = [next(sizes) for _ in self.axes.dims]
        return tuple(
            size if dim.axis is None else dim.segments * widths[dim.axis] * dim.block
            for dim, size in zip(self.axes.dims, fixed, strict=True)
        )

    def old(self, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.shape(self.widths), generator=generator, dtype=torch.float64).to(dtype)

    def units(self, axis: str) -> list[Unit]:
        """The units of an axis that grows."""
        return grown_units(self.widths[axis], self.wide[axis], self.groups_of(axis))

    def groups_of(self, axis: str) -> tuple[int, int]:
        """How many groups the units of an axis are in before and after."""
        if axis != "i":
            return 1, 1
        if self.groups == "g":
            return self.widths["g"], self.wide.get("g", self.widths["g"])
        return int(self.groups), int(self.groups)


@st.composite
def dims(draw: st.DrawFn, roles: tuple[Role, ...], groups: int | str) -> Dim:
    if draw(st.integers(0, 3)) == 0:
        return FIXED
    role, segments = draw(st.sampled_from(roles)), draw(st.integers(1, 2))
    alive = draw(st.sampled_from([(), (0,), (segments - 1,)]))
    axis = draw(st.sampled_from(["h", "i"]))
    power = draw(st.sampled_from([0.0, 0.0, 0.5, -1.0]))
    return Dim(
        axis,
        role,
        block=draw(st.integers(1, 2)),
        segments=segments,
        alive=alive,
        interleaved=draw(st.booleans()),
        groups=groups if axis == "i" else 1,
        power=power,
    )


MAPS = (Role.FAN_OUT, Role.FAN_IN)
KINDS = ("scalar", "gain", "vector", "per unit", "index", "matrix", "matrix", "experts", "experts")


@st.composite
def parameters(draw: st.DrawFn, groups: int | str, kinds: tuple[str, ...] = KINDS) -> ParamAxes:
    kind = draw(st.sampled_from(kinds))
    if kind == "scalar":
        return ParamAxes(())
    if kind == "gain":
        gain = draw(dims((Role.GAIN,), groups))
        offset = draw(st.sampled_from([0.0, 0.0, 1.0]))
        return ParamAxes((gain,), head_gain=draw(st.booleans()), norm=Norm.RMS, offset=offset)
    if kind == "vector":
        return ParamAxes((draw(dims(MAPS, groups)),))
    if kind == "per unit":
        return ParamAxes((draw(dims((Role.PER_UNIT,), groups)),))
    if kind == "index":  # an embedding, a head, or a head's bias
        index = draw(st.sampled_from(["h", "i"]))
        first = Dim(index, Role.INDEX, groups=groups if index == "i" else 1)
        both = first, draw(dims(MAPS, groups))
        return ParamAxes(draw(st.sampled_from([both, both[:1], both[::-1]])))
    matrix = draw(dims(MAPS, groups)), draw(dims(MAPS, groups))
    return ParamAxes((FIXED, *matrix), stacked_experts=True) if kind == "experts" else ParamAxes(matrix)


@st.composite
def growths(draw: st.DrawFn) -> tuple[int | str, dict[str, int], dict[str, int]]:
    """What groups the units of ``i``, and the widths of the axes before and after."""
    count, per_group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    options: list[int | str] = [1, count, "g"]
    groups = draw(st.sampled_from(options))
    more_groups = draw(st.integers(0, 2)) if groups == "g" else 0
    more_units = draw(st.integers(0 if more_groups else 1, 4))
    widths = {"h": draw(st.integers(1, 4)), "i": count * per_group, "g": count}
    wide = {"h": draw(st.integers(widths["h"] + 1, 3 * widths["h"] + 2))}
    wide["i"] = (count + more_groups) * (per_group + more_units)
    if more_groups:
        wide["g"] = count + more_groups
    only = draw(st.sampled_from([("h",), ("i", "g"), ("h", "i", "g")]))
    return groups, widths, {axis: width for axis, width in wide.items() if axis in only}


@st.composite
def cases(
    draw: st.DrawFn,
    pairs: tuple[tuple[Init, Init], ...] = INIT_PAIRS,
    norms: tuple[Init, ...] = (Init.COPY,),
    states: tuple[OptimizerState, ...] = tuple(OptimizerState),
    kinds: tuple[str, ...] = KINDS,
    new_indices: tuple[NewIndex, ...] = tuple(NewIndex),
    perturbations: tuple[float, ...] = (0.0,),
) -> Case:
    groups, widths, wide = draw(growths())
    axes = draw(parameters(groups, kinds))
    normed = frozenset(draw(st.sampled_from([(), ("h",), ("h", "i")])))
    normed |= {dim.axis for dim in axes.dims if dim.axis is not None and dim.role is Role.GAIN}
    pair = draw(st.sampled_from(pairs))
    scaling = draw(st.sampled_from(Scaling))
    rigid = any(dim.axis in normed and dim.block * dim.segments > 1 for dim in axes.dims)
    if scaling is Scaling.FUNCTION and (rigid or pair not in (COPY_COPY, ZERO_COPY)):
        scaling = Scaling.RMS
    norm = draw(st.sampled_from(norms)) if scaling is not Scaling.FUNCTION else Init.COPY
    copied = pair == COPY_COPY and norm is Init.COPY
    strategy = Strategy(
        fan_out=pair[0],
        fan_in=pair[1],
        norm=norm,
        scaling=scaling,
        optimizer_state=draw(st.sampled_from(states)),
        seed=draw(st.integers(0, 3)),
        vocabulary=draw(st.sampled_from(new_indices)),
        split=Split.parse(draw(st.sampled_from(["1:1", "1:2", "1:0", "0:3"]))) if copied else Split(),
        perturbation=draw(st.sampled_from(perturbations)) if copied else 0.0,
    )
    return Case(axes, widths, wide, normed, strategy, draw(st.integers(0, 99)), groups)


def whole(case: Case, dtype: torch.dtype = torch.float32) -> Tensor:
    widener = Widener(case.plan, "w")
    out = torch.full((widener.numel,), math.nan, dtype=dtype)
    widener.weight(case.old(dtype), out)
    return out


def whole_state(case: Case, key: str, old: Tensor) -> Tensor:
    widener = Widener(case.plan, "w")
    out = torch.full((widener.numel,), math.nan, dtype=old.dtype)
    widener.state(key, old, out)
    return out


# -- the reference -------------------------------------------------------------------------------------------------


def listed(dim: Dim, width: int) -> list[Entry]:
    return entries(width, dim.segments, dim.block, interleaved=dim.interleaved)


def locate(case: Case, dim: Dim, index: int) -> tuple[int, Unit, int]:
    """(segment, unit, source index) of an index of a dimension that grows."""
    assert dim.axis is not None
    entry = listed(dim, case.wide[dim.axis])[index]
    units = case.units(dim.axis)
    unit = units[entry.unit]
    if case.strategy.cancels:
        counts = case.groups_of(dim.axis)
        unit = replace(unit, source=units[first_of_pair(units, entry.unit, counts)].source)
    source = listed(dim, case.widths[dim.axis]).index(replace(entry, unit=unit.source))
    return entry.segment, unit, source


def first_of_pair(units: list[Unit], unit: int, groups: tuple[int, int]) -> int:
    """The first unit of a new one's pair; itself for any other.

    New units of an old group are paired within it, those of new groups with those of another new group.

    Args:
        groups: how many there are before and after.
    """
    size = len(units) // groups[1]
    group, place = divmod(unit, size)
    if group < groups[0]:
        new = [position for position in range(group * size, (group + 1) * size) if not units[position].old]
        pairs = dict(zip(new[len(new) // 2 : len(new) // 2 * 2], new, strict=False))
        return pairs.get(unit, unit)
    new_groups = list(range(groups[0], groups[1]))
    half = len(new_groups) // 2
    if group in new_groups[: 2 * half]:
        return (group if group in new_groups[:half] else group - half) * size + place
    return group * size + place % (size // 2) if place < size // 2 * 2 else unit


def shares(case: Case, axis: str) -> list[float]:
    """What every unit keeps of the columns that consume its twins, over its even share."""
    units = case.units(axis)
    assert case.strategy.split.shares is not None
    parts = [case.strategy.split.shares[0 if unit.old else 1] for unit in units]
    found = []
    for unit, part in zip(units, parts, strict=True):
        twins = [other for other, candidate in zip(parts, units, strict=True) if candidate.source == unit.source]
        found.append(part * len(twins) / sum(twins) if len(twins) > 1 else 1.0)
    return found


def first_copy(case: Case, dim: Dim, index: int) -> int:
    """The first index of a grown dimension that comes from the same old one."""
    assert dim.axis is not None
    source = locate(case, dim, index)[2]
    return next(i for i in range(case.wide[dim.axis] * dim.block * dim.segments) if locate(case, dim, i)[2] == source)


def multiplicities(case: Case, axis: str) -> list[int]:
    """How many units every unit's source has."""
    sources = [unit.source for unit in case.units(axis)]
    counts = Counter(sources)
    return [counts[source] for source in sources]


def weight_factors(case: Case, dim: Dim) -> list[float]:
    """The method's factor of every unit of a dimension (Sec. 3.2), with the model's own scaling taken out of it."""
    assert dim.axis is not None
    d, d_new = case.widths[dim.axis], case.wide[dim.axis]
    return [factor * (d_new / d) ** -dim.power for factor in role_factors(case, dim)]


def role_factors(case: Case, dim: Dim) -> list[float]:
    """The method's factor of every unit by the dimension's role, from its definition."""
    consumes = dim.role is Role.FAN_IN or (dim.role is Role.GAIN and case.axes.head_gain)
    factors = even_factors(case, dim, consumes)
    assert dim.axis is not None
    return [a * b for a, b in zip(factors, shares(case, dim.axis), strict=True)] if consumes else factors


def even_factors(case: Case, dim: Dim, consumes: bool) -> list[float]:
    """The same where twins are consumed alike."""
    assert dim.axis is not None
    d, d_new = case.widths[dim.axis], case.wide[dim.axis]
    normed, strategy = dim.axis in case.normed, case.strategy
    if strategy.scaling is Scaling.NONE or dim.role in (Role.INDEX, Role.PER_UNIT):
        return [1.0] * d_new
    if strategy.scaling is Scaling.RMS:
        c = d_new / d - 1
        factor = math.sqrt(d / d_new)
        if (strategy.fan_out, strategy.fan_in) == COPY_COPY:
            factor = 1 / math.sqrt(1 + 3 * c) if c <= 1 else d / d_new
        return [factor if consumes else 1.0] * d_new
    if strategy.fan_out is Init.ZERO:
        return [math.sqrt(d / d_new) if consumes and normed else 1.0] * d_new
    m = multiplicities(case, dim.axis)
    a = [math.sqrt(d_new / d / k) if normed else 1.0 for k in m]
    if dim.role is Role.FAN_OUT:
        return a
    if dim.role is Role.FAN_IN:
        return [1 / (k * x) for k, x in zip(m, a, strict=True)]
    return [d / d_new if consumes else 1.0] * d_new


def gradient_factors(case: Case, dim: Dim) -> list[float]:
    """What an old element's gradient is multiplied by, with copies on both sides."""
    assert dim.axis is not None
    d, d_new = case.widths[dim.axis], case.wide[dim.axis]
    return [factor * (d_new / d) ** dim.power for factor in role_gradient_factors(case, dim)]


def role_gradient_factors(case: Case, dim: Dim) -> list[float]:
    assert dim.axis is not None
    plain = replace(case, axes=replace(case.axes, head_gain=False))
    consumed = role_factors(plain, replace(dim, role=Role.FAN_IN))
    produced = role_factors(plain, replace(dim, role=Role.FAN_OUT))
    if dim.role is Role.INDEX:
        return [1.0] * len(consumed)
    if dim.role is Role.FAN_OUT:
        return consumed
    if dim.role is Role.FAN_IN:
        return produced
    if case.axes.head_gain:
        return [x * x for x in produced]
    if case.strategy.scaling is Scaling.FUNCTION:
        counts = multiplicities(case, dim.axis)
        return [share / count for share, count in zip(shares(case, dim.axis), counts, strict=True)]
    return consumed


def element(value: float, factors: list[tuple[float, bool]], dtype: type[np.floating], offset: float = 0.0) -> float:
    """``value`` times its dimensions' factors: those that all units share are multiplied first and rounded once.

    An ``offset`` that the model adds to the value is in what is multiplied.
    """
    shared = math.prod(factor for factor, uniform in factors if uniform)
    scaled = shared != 1.0 or not all(uniform for _, uniform in factors)
    result = dtype(value)
    if scaled:
        result = result + dtype(offset)
    result = result * dtype(shared)
    for factor, uniform in factors:
        if not uniform:
            result = result * dtype(factor)
    return float(result - dtype(offset) if scaled else result)


def mean_over_index(case: Case, old: Tensor, source: Shape) -> float:
    """Mean over the old indices of entries rounded to 2^-24 of a power of two above the largest of all."""
    unit = 2.0 ** (math.frexp(float(old.abs().max()))[1] - 24)
    index = next(position for position, dim in enumerate(case.axes.dims) if dim.role is Role.INDEX)
    others = [position if at != index else slice(None) for at, position in enumerate(source)]
    values = old.double()[tuple(others)].tolist()
    return sum(round(value / unit) for value in values) / len(values) * unit


def new_entries(case: Case, dim: Dim, segment: int) -> str:
    """What the entries of a new unit are: copy, random, zero, or the mean."""
    strategy = case.strategy
    if dim.role is Role.PER_UNIT:
        return "copy"
    if dim.role is Role.INDEX:
        return strategy.vocabulary.value
    sides = {Role.GAIN: strategy.norm, Role.FAN_OUT: strategy.fan_out, Role.FAN_IN: strategy.fan_in}
    assert dim.role is not None
    chosen = sides[dim.role]
    if chosen is Init.CANCEL:
        return "random"
    return "copy" if chosen is Init.ZERO and segment in dim.alive else chosen.value


#: Of an index: the source index, what its entries are if it is new, and its factor and whether all others share that.
Index = tuple[int, str | None, tuple[float, bool]]


def reference(case: Case, old: Tensor, *, state: str | None = None) -> Tensor:
    """The grown weight, or optimizer state ``state``, one element at a time; NaN where an entry is drawn."""
    mode = case.strategy.optimizer_state
    dtype = np.float64 if old.dtype is torch.float64 else np.float32
    factors_of = weight_factors if state is None else gradient_factors
    scaled = state is None or mode in (OptimizerState.ASYMMETRIC_RESET_SCALED, OptimizerState.COPY_SCALED)
    copied = mode in (OptimizerState.COPY, OptimizerState.COPY_SCALED)
    power = {None: 1, "exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}[state]
    after = {**case.widths, **case.wide}
    out = torch.empty(case.shape(after), dtype=torch.float64)
    per_dim: list[list[Index]] = []
    for dim, size in zip(case.axes.dims, out.shape, strict=True):
        if dim.axis not in case.wide:
            per_dim.append([(i, None, (1.0, True)) for i in range(size)])
            continue
        assert dim.axis is not None
        factors = [factor**power for factor in factors_of(case, dim)] if scaled else [1.0] * case.wide[dim.axis]
        uniform = len(set(factors)) == 1
        found: list[Index] = []
        for i, entry in enumerate(listed(dim, case.wide[dim.axis])):
            segment, unit, source = locate(case, dim, i)
            kind = None if unit.old else new_entries(case, dim, segment)
            found.append((source, kind, (factors[entry.unit], uniform)))
        per_dim.append(found)
    for index in itertools.product(*map(range, out.shape)):
        parts = [found[i] for found, i in zip(per_dim, index, strict=True)]
        place = tuple(part[0] for part in parts)
        kinds = {part[1] for part in parts} - {None}
        value = float(old[place])
        if state is None:
            if "mean" in kinds:
                value = mean_over_index(case, old, place)
            value = element(value, [part[2] for part in parts], dtype, case.axes.offset)
            drawn = "random" in kinds and all(factor for _, _, (factor, _) in parts)  # a share of 0 leaves nothing
            value = 0.0 if "zero" in kinds else math.nan if drawn else value
        elif mode is OptimizerState.DROP or (kinds and not (copied and kinds == {"copy"})):
            value = 0.0
        else:
            value = element(value, [part[2] for part in parts], dtype)
        out[index] = value
    return out.to(old.dtype)


# -- weights -------------------------------------------------------------------------------------------------------


every_kind = pytest.mark.parametrize("kind", sorted(set(KINDS)))


@every_kind
@given(st.data())
@settings(max_examples=40)
def test_copies_means_and_zeros_are_the_references_bit_for_bit(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(pairs=(COPY_COPY, ZERO_COPY), new_indices=(NewIndex.MEAN,), kinds=(kind,)))
    expected = reference(case, case.old())
    assert torch.equal(whole(case).view(expected.shape), expected)
    # In fp64 the factors' own last bit shows, which depends on how their formula is written.
    expected = reference(case, case.old(torch.float64))
    torch.testing.assert_close(whole(case, torch.float64).view(expected.shape), expected, rtol=4e-15, atol=1e-15)


@every_kind
@given(st.data())
@settings(max_examples=30)
def test_random_entries_are_where_they_belong_and_the_rest_is_the_references(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(pairs=INIT_PAIRS[:5], norms=(Init.COPY, Init.RANDOM), kinds=(kind,)))
    expected = reference(case, case.old())
    found = whole(case).view(expected.shape)
    drawn = expected.isnan()
    assert torch.equal(found[~drawn], expected[~drawn])
    assert bool(found.isfinite().all())
    # Hardly two alike, so they aren't copies; of thousands a few may meet on one fp32 number. Gains are drawn around
    # their mean, and one gain alone has no spread.
    if case.old().numel() > 1:
        count = int(drawn.sum())
        assert len(set(found[drawn].tolist())) >= 0.99 * count - 2


@given(st.integers(1, 7), st.integers(2, 9), st.booleans(), st.booleans())
def test_units_that_cancel_come_in_pairs(before: int, more: int, joint: bool, experts: bool) -> None:
    """Alike in the rows that produce them, opposite in the columns that consume them; one left over is not consumed."""
    after = before + more
    producer, consumer = Dim("i", Role.FAN_OUT, block=2), Dim("i", Role.FAN_IN, block=2)
    hidden_in, hidden_out = (Dim("h", Role.FAN_IN), Dim("h", Role.FAN_OUT)) if joint else (FIXED, FIXED)
    stack = (FIXED,) if experts else ()
    axes = {
        "up": ParamAxes((*stack, producer, hidden_in), stacked_experts=experts),
        "down": ParamAxes((*stack, hidden_out, consumer), stacked_experts=experts),
    }
    lead = (3,) if experts else ()
    shapes: dict[str, Shape] = {"up": (*lead, 2 * before, 4), "down": (*lead, 4, 2 * before)}
    strategy = Strategy(fan_out=Init.RANDOM, fan_in=Init.CANCEL, scaling=Scaling.NONE)
    wide = {"i": after, "h": 8} if joint else {"i": after}
    plan = make_plan(shapes, axes, {"i": before, "h": 4}, wide, strategy, number=1)
    old = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    up = drawn(plan, "up", old["up"]).unflatten(-2, (after, 2))
    down = drawn(plan, "down", old["down"]).unflatten(-1, (after, 2))
    first, second = slice(before, before + more // 2), slice(before + more // 2, before + more // 2 * 2)
    assert torch.equal(up[..., first, :, :], up[..., second, :, :])
    assert torch.equal(down[..., first, :], -down[..., second, :])
    assert not down[..., before + more // 2 * 2 :, :].any()
    assert bool((up[..., before:, :, :] != 0).all())
    assert bool((down[..., first, :] != 0).all())


@given(cases(pairs=(COPY_COPY,), kinds=("matrix", "experts"), perturbations=(1.0,)))
@settings(max_examples=60)
def test_a_perturbation_is_not_seen_by_what_consumes_twins(case: Case) -> None:
    """It sums to zero over the twins of a unit, is the same for copies on other dimensions, and spares single units."""
    plain = replace(case, strategy=replace(case.strategy, perturbation=0.0))
    noise = (whole(case, torch.float64) - whole(plain, torch.float64)).view(case.plan.param("w").after)
    grown = [place for place, dim in enumerate(case.axes.dims) if dim.axis in case.wide and dim.role is Role.FAN_IN]
    if not grown:
        assert not noise.any()
        return
    place = grown[-1]
    dim = case.axes.dims[place]
    sources = [locate(case, dim, index)[2] for index in range(noise.shape[place])]
    along = noise.movedim(place, 0)
    for source in set(sources):
        twins = [index for index, found in enumerate(sources) if found == source]
        assert float(along[twins].sum(0).abs().max()) < 1e-12
        assert bool((along[twins] != 0).all()) == (len(twins) > 1)
    for other, dim in enumerate(case.axes.dims):
        if other != place and dim.axis in case.wide:
            across = noise.movedim(other, 0)
            for index in range(len(across)):
                assert torch.allclose(across[index], across[first_copy(case, dim, index)], rtol=0, atol=1e-12)


def test_a_perturbation_of_many_twins_is_the_same_in_any_piece() -> None:
    """Sums over five twins, whose rounding must not depend on how many elements are asked for at a time."""
    axes = {"w": ParamAxes((FIXED, Dim("i", Role.FAN_IN)))}
    plan = make_plan({"w": (9, 7)}, axes, {"i": 7}, {"i": 35}, Strategy(perturbation=0.5, seed=1), number=1)
    old = torch.randn(9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.empty(9 * 35, dtype=torch.float64)
    Widener(plan, "w").weight(old, expected)
    for size in (1, 2, 5, 16, 33):
        for start in range(0, 9 * 35, size):
            piece = torch.empty(min(size, 9 * 35 - start), dtype=torch.float64)
            Widener(plan, "w").weight(old, piece, start)
            assert torch.equal(piece, expected[start : start + len(piece)])


def test_a_perturbation_has_the_size_that_was_asked_for() -> None:
    axes = {"w": ParamAxes((FIXED, Dim("i", Role.FAN_IN)))}
    old = 0.3 * torch.randn(400, 50, generator=torch.Generator().manual_seed(0))
    for wide, share in ((100, 0.5), (150, 1 / 3)):
        plans = [
            make_plan({"w": (400, 50)}, axes, {"i": 50}, {"i": wide}, Strategy(perturbation=strength), number=1)
            for strength in (0.2, 0.0)
        ]
        noise = drawn(plans[0], "w", old) - drawn(plans[1], "w", old)
        expected = 0.2 * share * float(old.square().mean().sqrt())
        assert float(noise.square().mean().sqrt()) == pytest.approx(expected, rel=0.02)


@given(st.integers(1, 6), st.integers(1, 14), st.integers(0, 5), st.sampled_from(Scaling))
def test_a_random_split_shares_what_an_even_one_gives(before: int, more: int, seed: int, scaling: Scaling) -> None:
    """Over the twins of a unit the columns add up to the even ones', and twins differ."""
    after = before + more
    axes = {"w": ParamAxes((FIXED, Dim("i", Role.FAN_IN))), "v": ParamAxes((FIXED, Dim("i", Role.FAN_IN)))}
    shapes: dict[str, Shape] = {"w": (3, before), "v": (3, before)}
    old = torch.ones(3, before, dtype=torch.float64)
    even, split = (
        make_plan(shapes, axes, {"i": before}, {"i": after}, Strategy(scaling=scaling, split=how, seed=seed), number=2)
        for how in (Split(), Split.parse("random"))
    )
    found, expected = drawn(split, "w", old), drawn(even, "w", old)
    for source in range(before):
        twins = slice(source, None, before)
        torch.testing.assert_close(found[:, twins].sum(1), expected[:, twins].sum(1))
        assert len(set(found[0, twins].tolist())) == len(range(source, after, before))
    assert torch.equal(found, drawn(split, "v", old))


def test_a_doubled_matrix_by_hand() -> None:
    """Rows and columns double: the copied rows below, the columns to the right, everything halved for the fan-in."""
    axes = ParamAxes((Dim("h", Role.FAN_OUT), Dim("i", Role.FAN_IN)))
    case = Case(axes, {"h": 1, "i": 2}, {"h": 2, "i": 4}, frozenset(), Strategy(), seed=0)
    out = torch.empty(8)
    Widener(case.plan, "w").weight(torch.tensor([[2.0, 6.0]]), out)
    assert out.view(2, 4).tolist() == [[1.0, 3.0, 1.0, 3.0], [1.0, 3.0, 1.0, 3.0]]


def test_fused_gate_and_up_grow_each_for_itself_and_zeros_spare_the_gate() -> None:
    axes = ParamAxes((Dim("i", Role.FAN_OUT, segments=2, alive=(0,)), FIXED))
    old = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])  # two gate rows, two up rows
    for pair, up in ((COPY_COPY, [[5.0, 6.0]]), (ZERO_COPY, [[0.0, 0.0]])):
        case = Case(axes, {"i": 2}, {"i": 3}, frozenset(), Strategy(fan_out=pair[0], fan_in=pair[1]), seed=0)
        out = torch.empty(12)
        plan = make_plan({"w": (4, 2)}, {"w": axes}, case.widths, case.wide, case.strategy, number=1)
        Widener(plan, "w").weight(old, out)
        assert out.view(6, 2).tolist() == [[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [5.0, 6.0], [7.0, 8.0], *up]


@pytest.mark.parametrize("pair", [COPY_COPY, ZERO_COPY])
def test_gate_and_up_in_turns_grow_unit_by_unit(pair: tuple[Init, Init]) -> None:
    """GPT-OSS lays experts out so: the new unit's two rows come last, and the gate's stays alive."""
    axes = ParamAxes((Dim("i", Role.FAN_OUT, segments=2, alive=(0,), interleaved=True), FIXED))
    plan = make_plan(
        {"w": (4, 1)}, {"w": axes}, {"i": 2}, {"i": 3}, Strategy(fan_out=pair[0], fan_in=pair[1]), number=1
    )
    out = torch.empty(6)
    Widener(plan, "w").weight(torch.tensor([1.0, 2.0, 3.0, 4.0]), out)
    assert out.tolist() == [1.0, 2.0, 3.0, 4.0, 1.0, 2.0 if pair == COPY_COPY else 0.0]


def test_new_query_heads_stand_with_the_copy_of_their_key_value_head() -> None:
    axes = {
        "q": ParamAxes((Dim("heads", Role.FAN_OUT, block=2, groups="shared"),)),
        "out": ParamAxes((Dim("heads", Role.FAN_IN, block=2, groups="shared"),)),
        "k": ParamAxes((Dim("shared", Role.FAN_OUT),)),
    }
    shapes: dict[str, Shape] = {"q": (8,), "out": (8,), "k": (2,)}
    old = torch.arange(8.0)
    for wide, heads in (
        ({"heads": 8}, [0, 1, 0, 1, 2, 3, 2, 3]),
        ({"heads": 8, "shared": 4}, [0, 1, 2, 3, 0, 1, 2, 3]),
        ({"heads": 6}, [0, 1, 0, 2, 3, 2]),
    ):
        plan = make_plan(shapes, axes, {"heads": 4, "shared": 2}, wide, Strategy(scaling=Scaling.FUNCTION), number=1)
        expected = torch.tensor([2.0 * head + row for head in heads for row in range(2)])
        times = torch.tensor([heads.count(head) for head in heads for _ in range(2)])
        assert torch.equal(drawn(plan, "q", old).flatten(), expected)
        torch.testing.assert_close(drawn(plan, "out", old).flatten(), expected / times)


# -- tokens --------------------------------------------------------------------------------------------------------

TOKENS = {
    "embed": ParamAxes((Dim("v", Role.INDEX), Dim("h", Role.FAN_OUT))),
    "head": ParamAxes((Dim("v", Role.INDEX), Dim("h", Role.FAN_IN))),
    "unembed": ParamAxes((Dim("h", Role.FAN_IN), Dim("v", Role.INDEX))),
    "bias": ParamAxes((Dim("v", Role.INDEX),)),
}


def token_plan(strategy: Strategy, tokens: int, width: int, wide: dict[str, int]) -> GrowthPlan:
    shapes: dict[str, Shape] = {
        "embed": (tokens, width),
        "head": (tokens, width),
        "unembed": (width, tokens),
        "bias": (tokens,),
    }
    return make_plan(shapes, TOKENS, {"v": tokens, "h": width}, wide, strategy, number=1)


def test_a_new_token_is_the_mean_of_the_old_ones_by_hand() -> None:
    """Alone, and together with a doubled width: the head's half is in the new tokens' entries as well."""
    old = torch.tensor([[1.0, -3.0], [2.0, 5.0], [6.0, 1.0]])
    alone = token_plan(Strategy(), 3, 2, {"v": 5})
    for name in ("embed", "head"):
        assert drawn(alone, name, old).tolist() == [*old.tolist(), [3.0, 1.0], [3.0, 1.0]]
    assert drawn(alone, "unembed", old.T.contiguous()).T.tolist() == [*old.tolist(), [3.0, 1.0], [3.0, 1.0]]
    assert drawn(alone, "bias", old[:, 1].contiguous()).tolist() == [-3.0, 5.0, 1.0, 1.0, 1.0]
    joint = token_plan(Strategy(), 3, 2, {"v": 4, "h": 4})
    wide = torch.cat([old, old.mean(0, keepdim=True)]).repeat(1, 2)
    assert torch.equal(drawn(joint, "embed", old), wide)
    assert torch.equal(drawn(joint, "head", old), wide / 2)
    assert torch.equal(drawn(joint, "unembed", old.T.contiguous()), wide.T / 2)


@pytest.mark.parametrize("name", ["embed", "head", "unembed"])
def test_a_random_token_has_the_old_ones_rms(name: str) -> None:
    plan = token_plan(Strategy(vocabulary=NewIndex.RANDOM), 200, 50, {"v": 400})
    old = 0.3 + torch.randn(plan.param(name).before, generator=torch.Generator().manual_seed(0))
    grown = drawn(plan, name, old)
    new = grown[:, 200:] if name == "unembed" else grown[200:]
    assert float(new.square().mean().sqrt()) == pytest.approx(float(old.square().mean().sqrt()), rel=0.03)
    assert abs(float(new.mean())) < 5 * float(new.std()) / math.sqrt(new.numel())
    rest = grown[:, :200] if name == "unembed" else grown[:200]
    assert torch.equal(rest, old)


@pytest.mark.parametrize("name", list(TOKENS))
@pytest.mark.parametrize("vocabulary", NewIndex)
def test_statistics_once_do_for_all_pieces(name: str, vocabulary: NewIndex) -> None:
    """And the old tensor needn't be one: what gives its elements does."""
    plan = token_plan(Strategy(vocabulary=vocabulary), 7, 5, {"v": 9, "h": 8})
    old = torch.randn(plan.param(name).before, generator=torch.Generator().manual_seed(0))
    expected = drawn(plan, name, old).flatten()
    widener = Widener(plan, name)
    statistics = widener.statistics(lambda start, stop: old.flatten()[start:stop])
    found = torch.full_like(expected, math.nan)
    for start in range(0, found.numel(), 4):
        widener.weight(lambda start, stop: old.flatten()[start:stop], found[start : start + 4], start, statistics)
    assert torch.equal(found, expected)


# -- gains and what else a unit has --------------------------------------------------------------------------------


def test_a_gain_that_is_stored_without_its_one_is_scaled_with_it() -> None:
    """A tied head's factor of a half on gains of 1 + w; other gains, and all that is per unit, are just copied."""
    axes = {
        "norm": ParamAxes((Dim("h", Role.GAIN),), norm=Norm.RMS, head_gain=True, offset=1.0),
        "other": ParamAxes((Dim("h", Role.GAIN),), norm=Norm.RMS, offset=1.0),
        "per_unit": ParamAxes((Dim("h", Role.PER_UNIT),)),
    }
    old = torch.tensor([0.0, 0.5])
    shapes: dict[str, Shape] = dict.fromkeys(axes, (2,))
    plan = make_plan(shapes, axes, {"h": 2}, {"h": 4}, Strategy(fan_out=Init.RANDOM, fan_in=Init.ZERO), number=1)
    assert drawn(plan, "per_unit", old).tolist() == [0.0, 0.5, 0.0, 0.5]
    plan = make_plan(shapes, axes, {"h": 2}, {"h": 4}, Strategy(), number=1)
    assert drawn(plan, "norm", old).tolist() == [-0.5, -0.25, -0.5, -0.25]
    assert drawn(plan, "other", old).tolist() == [0.0, 0.5, 0.0, 0.5]
    half = torch.empty(4, dtype=torch.bfloat16)
    Widener(plan, "norm").weight(old.bfloat16(), half)
    assert half.tolist() == [-0.5, -0.25, -0.5, -0.25]


@pytest.mark.parametrize(("power", "factor"), [(0.0, 1.0), (0.5, 0.5), (1.0, 0.25), (-1.0, 4.0)])
def test_a_growth_takes_the_models_own_multiplier_out(power: float, factor: float) -> None:
    axes = {"w": ParamAxes((FIXED, Dim("h", Role.FAN_OUT, power=power)))}
    plan = make_plan({"w": (1, 1)}, axes, {"h": 1}, {"h": 4}, Strategy(), number=1)
    assert drawn(plan, "w", torch.ones(1)).tolist() == [[factor] * 4]


@pytest.mark.parametrize("joint", [True, False])
def test_a_multiplier_by_a_width_that_no_dimension_carries_is_taken_out_too(joint: bool) -> None:
    """The bias of a map whose output the model scales by the root of its input's width, whether or not it grows."""
    axes = {
        "bias": ParamAxes((Dim("i", Role.FAN_OUT),), powers=(("h", 0.5),)),
        "weight": ParamAxes((Dim("i", Role.FAN_OUT), Dim("h", Role.FAN_IN, power=0.5))),
    }
    strategy = Strategy(optimizer_state=OptimizerState.COPY_SCALED)
    wide = {"h": 4, "i": 6} if joint else {"h": 4}
    plan = make_plan({"bias": (3,), "weight": (3, 1)}, axes, {"h": 1, "i": 3}, wide, strategy, number=1)
    times = 2 if joint else 1
    assert drawn(plan, "bias", torch.tensor([2.0, 4.0, 6.0])).tolist() == [1.0, 2.0, 3.0] * times
    out = torch.empty(3 * times, dtype=torch.float64)
    Widener(plan, "bias").state("exp_avg", torch.ones(3, dtype=torch.float64), out)
    assert out.tolist() == [1.0 if joint else 2.0] * (3 * times)  # twins share what their source's gradient was
    # A parameter that keeps its shape is in the table, too, as it is rescaled.
    rows = [line.split()[:3] for line in plan_in_words(plan).splitlines()]
    assert ["1", "3", str(3 * times)] in rows
    alone = make_plan({"bias": (3,), "weight": (3, 1)}, axes, {"h": 1, "i": 3}, {"i": 6}, strategy, number=1)
    assert drawn(alone, "bias", torch.ones(3)).tolist() == [1.0] * 6


# -- any piece, in any order, of any experts -----------------------------------------------------------------------

dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
all_cases = cases(norms=(Init.COPY, Init.RANDOM), perturbations=(0.0, 0.5))


@given(all_cases, dtypes, st.data())
@settings(max_examples=150)
def test_any_pieces_in_any_order_make_the_whole(case: Case, dtype: torch.dtype, data: st.DataObject) -> None:
    expected = whole(case, dtype)
    numel = expected.numel()
    cuts = data.draw(st.lists(st.integers(0, numel), max_size=6), label="cuts")
    pieces = list(itertools.pairwise([0, *sorted(cuts), numel]))
    widener, plan = None, case.plan
    found = torch.full_like(expected, math.nan)
    for start, stop in data.draw(st.permutations(pieces), label="order"):
        if widener is None or data.draw(st.booleans(), label="a rank of its own"):
            widener = Widener(plan, "w")
        widener.weight(case.old(dtype), found[start:stop], start)
    assert torch.equal(found, expected)


@given(cases(norms=(Init.COPY, Init.RANDOM), kinds=("experts",), perturbations=(0.0, 0.5)), dtypes, st.data())
@settings(max_examples=100)
def test_a_slice_of_the_experts_is_that_slice_of_the_whole(case: Case, dtype: torch.dtype, data: st.DataObject) -> None:
    old, experts = case.old(dtype), case.shape(case.widths)[0]
    expected = whole(case, dtype).view(experts, -1)
    first = data.draw(st.integers(0, experts - 1))
    last = data.draw(st.integers(first + 1, experts))
    widener = Widener(case.plan, "w", (first, last))
    assert widener.numel == expected[first:last].numel()
    cut = data.draw(st.integers(0, widener.numel))
    found = torch.full((widener.numel,), math.nan, dtype=dtype)
    widener.weight(old[first:last], found[cut:], cut)
    widener.weight(old[first:last], found[:cut])
    assert torch.equal(found.view(last - first, -1), expected[first:last])


@given(cases(), st.sampled_from(["exp_avg", "exp_avg_sq"]), st.data())
@settings(max_examples=100)
def test_pieces_of_states_make_the_whole(case: Case, key: str, data: st.DataObject) -> None:
    old = case.old().abs()
    expected = whole_state(case, key, old)
    cut = data.draw(st.integers(0, expected.numel()))
    found = torch.full_like(expected, math.nan)
    widener = Widener(case.plan, "w")
    widener.state(key, old, found[cut:], cut)
    widener.state(key, old, found[:cut])
    assert torch.equal(found, expected)


@given(all_cases, st.sampled_from([None, "exp_avg"]), st.data())
@settings(max_examples=150)
def test_a_piece_needs_its_sources_alone_at_most_one_per_element(
    case: Case, key: str | None, data: st.DataObject
) -> None:
    old = case.old()
    expected = whole(case) if key is None else whole_state(case, key, old)
    start = data.draw(st.integers(0, expected.numel()))
    stop = data.draw(st.integers(start, expected.numel()))
    widener = Widener(case.plan, "w")
    sources = widener.sources(start, stop, key)
    assert sources.numel <= stop - start
    values = torch.empty(sources.numel)
    sources.packed(old.flatten(), 0, values)
    found = torch.full((stop - start,), math.nan)
    if key is None:
        widener.weight(Packed(sources, values), found, start, widener.statistics(old))
    else:
        widener.state(key, Packed(sources, values), found, start)
    assert torch.equal(found, expected[start:stop])


@given(all_cases, st.sampled_from([None, "exp_avg"]), st.data())
@settings(max_examples=100)
def test_an_element_is_among_those_that_its_sources_feed(case: Case, key: str | None, data: st.DataObject) -> None:
    widener, numel = Widener(case.plan, "w"), case.old().numel()
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    fed = {element for first, last in widener.fed_by(start, stop, key) for element in range(first, last)}
    needing = {
        element
        for element in range(widener.numel)
        if len(widener.sources(element, element + 1, key).within(start, stop))
    }
    assert needing <= fed
    width = widener.after[-1] if len(widener.after) > 1 and math.prod(widener.after[:-1]) > 1 else 1
    assert len({element // width for element in fed}) == len({element // width for element in needing})


def test_draws_longer_than_a_chunk_fit_together() -> None:
    """65536 elements are drawn at a time; neither the chunks' borders nor a cut inside one may show."""
    axes = ParamAxes((FIXED, Dim("i", Role.FAN_OUT), Dim("h", Role.FAN_IN)), stacked_experts=True)
    strategy = Strategy(fan_out=Init.RANDOM, fan_in=Init.RANDOM)
    old = torch.randn(3, 300, 300, generator=torch.Generator().manual_seed(0))
    old *= torch.tensor([0.1, 1.0, 10.0]).view(3, 1, 1)
    widths, wide = {"i": 300, "h": 300}, {"i": 600, "h": 303}
    plan = make_plan({"w": tuple(old.shape)}, {"w": axes}, widths, wide, strategy, number=1)
    expected = torch.full((3 * 600 * 303,), math.nan)
    Widener(plan, "w").weight(old, expected)
    found = torch.empty_like(expected)
    short = range(250_000, found.numel(), 20_000)  # within one chunk each, which shows what a long draw left out
    cuts = [0, 70_000, 70_001, *short, found.numel()]
    for start, stop in itertools.pairwise(cuts):
        Widener(plan, "w").weight(old, found[start:stop], start)
    assert torch.equal(found, expected)
    rms = expected.view(3, 600, 303)[:, 300:].square().mean((1, 2)).sqrt()
    torch.testing.assert_close(rms, math.sqrt(300 / 303) * torch.tensor([0.1, 1.0, 10.0]), rtol=0.03, atol=0)


# -- random entries ------------------------------------------------------------------------------------------------


def random_plan(name: str = "w", seed: int = 0, stage: int = 1, before: int = 64, after: int = 192) -> GrowthPlan:
    axes = ParamAxes(
        (FIXED, Dim("i", Role.FAN_OUT, segments=2, alive=(0,)), Dim("h", Role.FAN_IN)), stacked_experts=True
    )
    strategy = Strategy(fan_out=Init.RANDOM, fan_in=Init.RANDOM, seed=seed)
    shapes = {name: (2, 2 * before, 64)}
    return make_plan(shapes, {name: axes}, {"i": before, "h": 64}, {"i": after, "h": 128}, strategy, number=stage)


def random_old() -> Tensor:
    """Two experts' gate and up, four matrices of different sizes and means."""
    matrix = torch.randn(2, 2, 64 * 64, generator=torch.Generator().manual_seed(0))
    size = torch.tensor([[0.1, 0.5], [2.0, 10.0]])[..., None]
    return (size * (matrix + torch.tensor([[0.0, 1.0], [-1.0, 2.0]])[..., None])).view(2, 128, 64)


def drawn(plan: GrowthPlan, name: str = "w", old: Tensor | None = None) -> Tensor:
    out = torch.empty(math.prod(plan.param(name).after))
    Widener(plan, name).weight(random_old() if old is None else old, out)
    return out.view(plan.param(name).after)


def test_random_entries_have_zero_mean_and_their_own_matrixs_rms() -> None:
    """Per expert and per segment, and scaled with the tensor; rms is the std about zero, which entries are drawn at."""
    grown = drawn(random_plan()).view(2, 2, 192, 128) / math.sqrt(0.5)
    old = random_old().view(2, 2, 64, 64)
    for expert, half in itertools.product(range(2), range(2)):
        new = torch.cat([grown[expert, half, 64:].flatten(), grown[expert, half, :64, 64:].flatten()])
        rms = float(old[expert, half].square().mean().sqrt())
        assert float(new.square().mean().sqrt()) == pytest.approx(rms, rel=0.02)
        assert abs(float(new.mean())) < 5 * rms / math.sqrt(new.numel())
        assert torch.equal(grown[expert, half, :64, :64], (old[expert, half] * math.sqrt(0.5)) / math.sqrt(0.5))


def test_segments_that_take_turns_are_one_matrix_to_draw_after() -> None:
    """Gate and up rows are mixed, so their halves mean nothing: here the later rows are a hundred times larger."""
    axes = ParamAxes((Dim("i", Role.FAN_OUT, segments=2, alive=(0,), interleaved=True), FIXED))
    strategy = Strategy(fan_out=Init.RANDOM, fan_in=Init.RANDOM)
    plan = make_plan({"w": (64, 64)}, {"w": axes}, {"i": 32}, {"i": 64}, strategy, number=1)
    old = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    old[32:] *= 100
    new = drawn(plan, old=old)[64:]
    for rows in (new[:32], new[32:]):
        assert float(rows.square().mean().sqrt()) == pytest.approx(float(old.square().mean().sqrt()), rel=0.05)


def test_random_gains_have_the_old_gains_mean_and_std() -> None:
    axes = {"norm.weight": ParamAxes((Dim("h", Role.GAIN),), norm=Norm.RMS)}
    old = 1.5 + 0.2 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    plan = make_plan({"norm.weight": (1000,)}, axes, {"h": 1000}, {"h": 9000}, Strategy(norm=Init.RANDOM), number=1)
    grown = drawn(plan, "norm.weight", old)
    assert torch.equal(grown[:1000], old)
    new = grown[1000:]
    assert float(new.mean()) == pytest.approx(float(old.mean()), abs=5 * 0.2 / math.sqrt(8000))
    assert float(new.std()) == pytest.approx(float(old.std(correction=0)), rel=0.05)


def test_gains_are_random_only_when_norm_says_so() -> None:
    axes = {
        "norm.weight": ParamAxes((Dim("h", Role.GAIN),), norm=Norm.RMS),
        "w": ParamAxes((Dim("h", Role.FAN_OUT), FIXED)),
    }
    shapes: dict[str, Shape] = {"norm.weight": (4,), "w": (4, 2)}
    gain, weight = torch.arange(1.0, 5), torch.arange(8.0).view(4, 2)
    for strategy, gains_copied, rows_copied in (
        (Strategy(fan_out=Init.RANDOM, fan_in=Init.COPY), True, False),
        (Strategy(norm=Init.RANDOM), False, True),
    ):
        plan = make_plan(shapes, axes, {"h": 4}, {"h": 8}, strategy, number=1)
        assert torch.equal(drawn(plan, "norm.weight", gain)[4:], gain) is gains_copied
        assert torch.equal(drawn(plan, "w", weight)[4:], weight) is rows_copied


@pytest.mark.parametrize("change", [{"seed": 1}, {"stage": 2}, {"name": "v"}], ids=["seed", "stage", "name"])
def test_other_seeds_stages_and_names_draw_other_numbers(change: dict[str, int | str]) -> None:
    first = drawn(random_plan())
    other = drawn(random_plan(**change), str(change.get("name", "w")))  # type: ignore[arg-type]
    old = torch.zeros_like(first, dtype=torch.bool).view(2, 2, 192, 128)
    old[:, :, :64, :64] = True
    same = (first == other).view_as(old)
    assert bool(same[old].all())
    assert float(same[~old].float().mean()) < 1e-3


def test_a_draw_depends_on_nothing_but_its_index_and_its_matrixs_rms() -> None:
    """The order of the old entries doesn't matter, nor do other experts' values."""
    old = random_old()
    first = drawn(random_plan())
    shuffled = old.clone()
    shuffled[0] = old[0].view(2, -1).flip(1).view(128, 64)
    shuffled[1] *= 3
    second = drawn(random_plan(), old=shuffled)
    new_rows = torch.arange(384) % 192 >= 64
    assert torch.equal(second[0, new_rows], first[0, new_rows])
    torch.testing.assert_close(second[1, new_rows], 3 * first[1, new_rows])


# -- precisions ----------------------------------------------------------------------------------------------------


@given(all_cases, st.sampled_from([torch.bfloat16, torch.float16]))
@settings(max_examples=150)
def test_half_precisions_are_computed_in_fp32_and_rounded_once(case: Case, half: torch.dtype) -> None:
    """From a half-precision weight to any dtype, and from a master weight to the compute copy."""
    old = case.old(half)
    widener = Widener(case.plan, "w")
    exact, rounded, master = torch.empty(widener.numel), torch.empty(widener.numel, dtype=half), case.old()
    widener.weight(old.float(), exact)
    widener.weight(old, rounded)
    assert torch.equal(rounded, exact.to(half))
    upcast = torch.empty(widener.numel)
    widener.weight(old, upcast)
    assert torch.equal(upcast, exact)
    widener.weight(master, exact)
    widener.weight(master, rounded)
    assert torch.equal(rounded, exact.to(half))


def test_rounding_once_differs_from_rounding_every_factor() -> None:
    """Shows that the property above has something to find: with two factors per element, three roundings differ."""
    axes = ParamAxes((Dim("h", Role.FAN_OUT), Dim("i", Role.FAN_IN)))
    strategy = Strategy(scaling=Scaling.FUNCTION)
    case = Case(axes, {"h": 20, "i": 20}, {"h": 30, "i": 30}, frozenset({"h"}), strategy, seed=0)
    row = torch.tensor(weight_factors(case, axes.dims[0]))
    column = torch.tensor(weight_factors(case, axes.dims[1]))
    unit = torch.arange(30) % 20
    copied = case.old(torch.bfloat16)[unit][:, unit]
    stepwise = copied * row.bfloat16()[:, None] * column.bfloat16()
    assert not torch.equal(whole(case, torch.bfloat16).view(30, 30), stepwise)


# -- gradients reach zeroed units ----------------------------------------------------------------------------------


def test_zeroed_units_of_an_expert_are_not_dead() -> None:
    """With gate and up both zero neither would ever get a gradient; with the gate alive all get one by step two."""
    axes = {
        "gate_up": ParamAxes((Dim("i", Role.FAN_OUT, segments=2, alive=(0,)), FIXED)),
        "down": ParamAxes((FIXED, Dim("i", Role.FAN_IN))),
    }
    generator = torch.Generator().manual_seed(0)
    old = {"gate_up": torch.randn(8, 5, generator=generator), "down": torch.randn(5, 4, generator=generator)}
    shapes = {name: tuple(weight.shape) for name, weight in old.items()}
    plan = make_plan(shapes, axes, {"i": 4}, {"i": 8}, Strategy(fan_out=ZERO_COPY[0], fan_in=ZERO_COPY[1]), number=1)
    wide = {name: drawn(plan, name, weight).requires_grad_() for name, weight in old.items()}
    gate, up = wide["gate_up"].detach().chunk(2)
    assert torch.equal(gate[4:], gate[:4])
    assert not up[4:].any()

    x, target = torch.randn(16, 5, generator=generator), torch.randn(16, 5, generator=generator)
    touched = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in wide.items()}
    optimizer = torch.optim.SGD(wide.values(), lr=0.1)
    for _ in range(2):
        g, u = F.linear(x, wide["gate_up"]).chunk(2, dim=-1)
        loss = (F.linear(F.silu(g) * u, wide["down"]) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        for name, weight in wide.items():
            assert weight.grad is not None
            touched[name] |= weight.grad != 0
        optimizer.step()
    assert all(bool(mask.all()) for mask in touched.values())


# -- optimizer states ----------------------------------------------------------------------------------------------

STATE_KEYS = ["exp_avg", "exp_avg_sq", "momentum_buffer", "max_exp_avg_sq"]


@every_kind
@given(st.data(), st.sampled_from(STATE_KEYS))
@settings(max_examples=30)
def test_states_are_the_references_bit_for_bit(kind: str, data: st.DataObject, key: str) -> None:
    case = data.draw(cases(pairs=(COPY_COPY,), kinds=(kind,)))
    old = case.old()
    expected = reference(case, old, state=key)
    assert torch.equal(whole_state(case, key, old).view(expected.shape), expected)


PAIRS_IN_GROUPS = Case(
    axes=ParamAxes((Dim("i", Role.PER_UNIT, groups="g"),)),
    widths={"h": 1, "i": 2, "g": 2},
    wide={"i": 4},
    normed=frozenset(),
    strategy=Strategy(fan_out=Init.RANDOM, fan_in=Init.CANCEL, optimizer_state=OptimizerState.COPY),
    seed=0,
    groups="g",
)


@example(PAIRS_IN_GROUPS, "exp_avg")
@given(
    cases(
        norms=(Init.COPY, Init.RANDOM),
        states=(OptimizerState.ASYMMETRIC_RESET, OptimizerState.COPY, OptimizerState.DROP),
    ),
    st.sampled_from([*STATE_KEYS[:3], "acc_delta", "my_own_state"]),
)
@settings(max_examples=100)
def test_states_of_units_that_are_not_copies_start_at_zero(case: Case, key: str) -> None:
    """Under every init; and a state of unknown degree is fine wherever nothing is rescaled."""
    case = declaring(case, my_own_state=StateKind.MOMENT)
    old = case.old()
    expected = reference(case, old, state="exp_avg")
    assert torch.equal(whole_state(case, key, old).view(expected.shape), expected)


def test_all_modes_by_hand() -> None:
    """Doubled rows with a doubled consumer: old rows' gradients halve, so their second moment quarters."""
    axes = {"w": ParamAxes((Dim("h", Role.FAN_OUT),))}
    old = torch.tensor([4.0, 8.0])
    expected = {
        OptimizerState.ASYMMETRIC_RESET: ([4.0, 8.0, 0.0, 0.0], [4.0, 8.0, 0.0, 0.0]),
        OptimizerState.ASYMMETRIC_RESET_SCALED: ([2.0, 4.0, 0.0, 0.0], [1.0, 2.0, 0.0, 0.0]),
        OptimizerState.COPY: ([4.0, 8.0, 4.0, 8.0], [4.0, 8.0, 4.0, 8.0]),
        OptimizerState.COPY_SCALED: ([2.0, 4.0, 2.0, 4.0], [1.0, 2.0, 1.0, 2.0]),
        OptimizerState.DROP: ([0.0] * 4, [0.0] * 4),
    }
    assert expected.keys() == set(OptimizerState)
    for mode, states in expected.items():
        plan = make_plan({"w": (2,)}, axes, {"h": 2}, {"h": 4}, Strategy(optimizer_state=mode), number=1)
        for key, values in zip(("exp_avg", "exp_avg_sq"), states, strict=True):
            out = torch.full((4,), math.nan)
            Widener(plan, "w").state(key, old, out)
            assert out.tolist() == values, (mode, key)


@pytest.mark.parametrize(
    ("mode", "instead"),
    [(OptimizerState.ASYMMETRIC_RESET_SCALED, "asymmetric_reset"), (OptimizerState.COPY_SCALED, "copy")],
)
def test_a_state_of_unknown_degree_can_not_be_rescaled(mode: OptimizerState, instead: str) -> None:
    axes = {"w": ParamAxes((Dim("h", Role.FAN_OUT),))}
    strategy = Strategy(optimizer_state=mode, state_kinds={"prodigy_s": StateKind.MOMENT})
    plan = make_plan({"w": (2,)}, axes, {"h": 2}, {"h": 4}, strategy, number=1)
    with pytest.raises(PlanError, match=rf"'prodigy_s'.*{mode.value}.*exp_avg.*use '{instead}'"):
        Widener(plan, "w").state("prodigy_s", torch.ones(2), torch.empty(4))


def declaring(case: Case, **kinds: StateKind) -> Case:
    return replace(case, strategy=replace(case.strategy, state_kinds=kinds))


@pytest.mark.parametrize("mode", OptimizerState)
def test_a_state_of_unknown_kind_is_refused_with_the_way_to_say_it(mode: OptimizerState) -> None:
    axes = {"w": ParamAxes((Dim("h", Role.FAN_OUT),))}
    plan = make_plan({"w": (2,)}, axes, {"h": 2}, {"h": 4}, Strategy(optimizer_state=mode), number=1)
    with pytest.raises(PlanError, match=r'\'slow\'.*"state_kinds": \{"slow": "moment"\}.*"weights"'):
        Widener(plan, "w").state("slow", torch.ones(2), torch.empty(4))


WEIGHTS_CASES = cases(norms=(Init.COPY, Init.RANDOM), perturbations=(0.0, 0.5))


@given(WEIGHTS_CASES, st.sampled_from(["z", "my_own_state"]), st.integers(0, 10))
@settings(max_examples=150)
def test_state_that_is_weights_grows_as_the_weights_do(case: Case, key: str, cut: int) -> None:
    """Copies and factors of its own, draws and noise of the weight's: a mean of both grows like its parts."""
    case = declaring(case, my_own_state=StateKind.WEIGHTS)
    old = case.old(torch.float64)
    widener = Widener(case.plan, "w")
    of_weight = widener.statistics(old)
    same = torch.full((widener.numel,), math.nan, dtype=torch.float64)
    cut = min(cut, widener.numel)
    statistics = widener.statistics(old, of_weight)
    widener.state(key, old, same[cut:], cut, statistics)
    widener.state(key, old, same[:cut], 0, statistics)
    grown = whole(case, torch.float64)
    assert torch.equal(same, grown)

    apart = torch.randn(old.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(cut))
    second = torch.empty_like(grown)
    widener.state(key, old + apart, second, 0, widener.statistics(old + apart, of_weight))
    # What is not drawn is affine in the old entries: without anything random it tells what the difference becomes.
    silent = replace(of_weight, spreads=tuple(Spread(0.0, 0.0) for _ in of_weight.spreads))
    origin, difference = torch.empty_like(grown), torch.empty_like(grown)
    widener.weight(torch.zeros_like(old), origin, 0, widener.statistics(torch.zeros_like(old), silent))
    widener.weight(apart, difference, 0, widener.statistics(apart, silent))
    assert torch.allclose(second - grown, difference - origin, rtol=1e-6, atol=1e-6)  # means are rounded


def test_draws_of_state_that_is_weights_need_the_weights_statistics() -> None:
    axes = {"w": ParamAxes((Dim("h", Role.FAN_OUT),))}
    plan = make_plan({"w": (2,)}, axes, {"h": 2}, {"h": 4}, Strategy(fan_out=Init.RANDOM, fan_in=Init.ZERO), number=1)
    with pytest.raises(PlanError, match="w: z is drawn as the weight is"):
        Widener(plan, "w").state("z", torch.ones(2), torch.empty(4))


# -- misuse --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "out", "start"),
    [
        pytest.param(torch.ones(5), torch.empty(8), 0, id="old too large"),
        pytest.param(torch.ones(3), torch.empty(8), 0, id="old too small"),
        pytest.param(torch.ones(4), torch.empty(9), 0, id="out too large"),
        pytest.param(torch.ones(4), torch.empty(4), 5, id="piece past the end"),
        pytest.param(torch.ones(4), torch.empty(4), -1, id="negative start"),
        pytest.param(torch.ones(4), torch.empty(4, 2), 0, id="out not flat"),
    ],
)
def test_sizes_that_contradict_the_plan_are_refused_by_name(old: Tensor, out: Tensor, start: int) -> None:
    axes = {"layer.w": ParamAxes((Dim("h", Role.FAN_OUT), FIXED)), "q": ParamAxes((FIXED, FIXED))}
    plan = make_plan({"layer.w": (2, 2), "q": (2, 2)}, axes, {"h": 2}, {"h": 4}, Strategy(), number=1)
    with pytest.raises(PlanError, match=r"layer\.w"):
        Widener(plan, "layer.w").weight(old, out, start)
    with pytest.raises(PlanError, match=r"layer\.w"):
        Widener(plan, "layer.w").state("exp_avg", old, out, start)


def test_only_stacked_experts_have_slices() -> None:
    axes = {"w": ParamAxes((Dim("h", Role.FAN_OUT), FIXED))}
    plan = make_plan({"w": (2, 2)}, axes, {"h": 2}, {"h": 4}, Strategy(), number=1)
    with pytest.raises(PlanError, match="w isn't a tensor of stacked experts"):
        Widener(plan, "w", (0, 1))
    with pytest.raises(PlanError, match="'v'"):
        Widener(plan, "v")


@pytest.mark.parametrize("experts", [(-1, 1), (1, 1), (0, 4), (3, 4)])
def test_a_slice_outside_the_experts_is_refused(experts: tuple[int, int]) -> None:
    axes = {"w": ParamAxes((FIXED, Dim("h", Role.FAN_OUT), FIXED), stacked_experts=True)}
    plan = make_plan({"w": (3, 2, 2)}, axes, {"h": 2}, {"h": 4}, Strategy(), number=1)
    with pytest.raises(PlanError, match="w stacks 3 experts"):
        Widener(plan, "w", experts)


def test_the_old_tensor_is_left_as_it_was() -> None:
    rng = random.Random(0)
    for pair in INIT_PAIRS:
        axes = ParamAxes((Dim("h", Role.FAN_OUT), Dim("i", Role.FAN_IN)))
        case = Case(
            axes,
            {"h": 3, "i": 2},
            {"h": 5, "i": 4},
            frozenset(),
            Strategy(fan_out=pair[0], fan_in=pair[1]),
            seed=rng.randint(0, 9),
        )
        old = case.old()
        out = torch.empty(20)
        Widener(case.plan, "w").weight(old, out)
        assert torch.equal(old, case.old())


def test_drawing_after_weights_that_are_not_finite_is_refused() -> None:
    old = random_old()
    old[1, 3, 3] = math.nan
    with pytest.raises(ValueError, match="NaN or Inf"):
        drawn(random_plan(), old=old)
    survey = Survey(numel=old[0].numel(), matrices=1)
    assert math.isfinite(survey.of(lambda start, stop: old[0].flatten()[start:stop]).spreads[0].rms)


@pytest.mark.parametrize("strategy", [Strategy(), Strategy(perturbation=0.1), Strategy(split=Split.parse("1:2"))])
def test_tables_take_no_more_memory_for_1500_parameters_than_for_three(strategy: Strategy) -> None:
    """Whatever wideners that share tables hold on to: the tensors that can be reached from them, once all are used."""
    kinds = {
        "up": ParamAxes((Dim("i", Role.FAN_OUT), Dim("h", Role.FAN_IN))),
        "down": ParamAxes((Dim("h", Role.FAN_OUT), Dim("i", Role.FAN_IN))),
        "norm": ParamAxes((Dim("h", Role.GAIN),), norm=Norm.RMS),
    }
    before, after = {"h": 6, "i": 4}, {"h": 10, "i": 12}

    def held(layers: int) -> int:
        axes = {f"{layer}.{kind}": axes for layer in range(layers) for kind, axes in kinds.items()}
        shapes = {name: tuple(before[dim.axis or ""] for dim in axes[name].dims) for name in axes}
        plan = make_plan(shapes, axes, before, after, strategy, number=1)
        tables = GrowthTables(plan)
        wideners = [Widener(plan, name, tables=tables) for name in axes]
        for widener, shape in zip(wideners, shapes.values(), strict=True):
            out = torch.empty(widener.numel)
            widener.weight(torch.ones(shape), out)
            widener.state("exp_avg", torch.ones(shape), out)
        return sum(storages(wideners).values())

    assert held(1) == held(500) > 0


def storages(root: object) -> dict[int, int]:
    """The memory of every tensor that can be reached from ``root``: address and bytes."""
    found, seen, todo = {}, {id(root)}, [root]
    while todo:
        value = todo.pop()
        if isinstance(value, Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif not isinstance(value, (type, ModuleType, FunctionType)):
            new = [item for item in gc.get_referents(value) if id(item) not in seen]
            seen |= set(map(id, new))
            todo += new
    return found


def test_tables_go_with_what_was_widened_and_not_with_the_plan() -> None:
    axes = {"w": ParamAxes((Dim("h", Role.GAIN),), norm=Norm.RMS)}
    plan = make_plan({"w": (2,)}, axes, {"h": 2}, {"h": 4}, Strategy(), number=1)
    widener = Widener(plan, "w")
    widener.weight(torch.ones(2), torch.empty(4))
    assert storages(widener)
    assert not storages(plan)
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_tables_are_made_once_for_all_parameters_of_one_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    axes = ParamAxes((Dim("h", Role.FAN_OUT), Dim("i", Role.FAN_IN)))
    names = [f"{layer}.w" for layer in range(5)]
    plan = make_plan(
        dict.fromkeys(names, (2, 3)),
        dict.fromkeys(names, axes),
        {"h": 2, "i": 3},
        {"h": 4, "i": 6},
        Strategy(),
        number=1,
    )
    made: Counter[str] = Counter()
    for function in ("source_units", "unit_scales"):
        monkeypatch.setattr(tables_module, function, counted(getattr(tables_module, function), made))
    tables = GrowthTables(plan)
    for name in names:
        Widener(plan, name, tables=tables).weight(torch.ones(2, 3), torch.empty(24))
    assert made == {"source_units": 2, "unit_scales": 2}  # once per axis


def counted(function: Callable[..., Any], calls: Counter[str]) -> Callable[..., Any]:
    """A function whose calls are counted under its name."""

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls[function.__name__] += 1
        return function(*args, **kwargs)

    return counting
