"""Widening of one parameter, and of its optimizer state, any contiguous piece at a time.

Every element of a grown tensor is a function of the old tensor and of its own index alone. So a rank, or a tool that
streams through files, can make just the piece it owns, and all pieces fit together bit for bit.

Shape suffixes: R rows (all dimensions but the last, flattened), C columns (the last dimension), ``_old`` before the
growth.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from ds_sparkling.errors import PlanError
from ds_sparkling.growth.noise import ZeroSumNoise, consumed_twins
from ds_sparkling.growth.plan import GrowthPlan, ParamPlan
from ds_sparkling.growth.random import standard_normal, stream_key
from ds_sparkling.growth.scaling import AxisGrowth, Factors, Scale
from ds_sparkling.growth.spread import Spread, column_mean, row_mean, spread
from ds_sparkling.growth.units import old_units, paired_units, source_units
from ds_sparkling.spec.axes import FIXED, Dim, Role
from ds_sparkling.spec.state_kinds import StateKind, gradient_degree
from ds_sparkling.spec.strategy import Init, NewIndex, OptimizerState, Strategy

#: Elements drawn at a time; bounds the temporaries of random initialisation.
_DRAW_CHUNK = 1 << 16

#: Elements of a perturbed weight that are made at a time.
_NOISE_CHUNK = 1 << 20

#: What gives the elements start..stop of a flattened tensor, 1-D: of one that is never held as a whole.
Elements = Callable[[int, int], Tensor]

# What the entries of an index of a dimension are. Of two dimensions, the larger value decides for the element.
_OLD, _COPY, _MEAN, _RANDOM, _ZERO = range(5)
_KIND = {Init.COPY: _COPY, Init.RANDOM: _RANDOM, Init.ZERO: _ZERO, Init.CANCEL: _RANDOM}
_INDEX_KIND = {NewIndex.MEAN: _MEAN, NewIndex.RANDOM: _RANDOM}


@dataclass(frozen=True)
class Statistics:
    """What new entries of one parameter need to know of all its old ones.

    Attributes:
        spreads: of every weight matrix (per expert, per segment of the fan-out), if any entry is drawn.
        mean: mean over the old indices, float64, one number per entry of one of them (per old column, where rows are
            indices), if new indices get it.
    """

    spreads: tuple[Spread, ...] = ()
    mean: Tensor | None = None


@dataclass(frozen=True)
class _DimMap:
    """What every index of a dimension is, by tensors of shape [size after].

    Attributes:
        source: the old index that it is or comes from, int64.
        kind: one of the kinds above, uint8.
        drawn_as: the index whose random entries it has, int64: its own, or that of the first of its pair.
        sign: what random entries are multiplied with, float64; None for 1.
    """

    source: Tensor
    kind: Tensor
    drawn_as: Tensor
    sign: Tensor | None = None

    @property
    def signs(self) -> Tensor:
        """The signs, one per index."""
        return torch.ones(len(self.source), dtype=torch.float64) if self.sign is None else self.sign


def _unmoved(size: int) -> _DimMap:
    """What the indices of a dimension that doesn't grow are."""
    own = torch.arange(size)
    return _DimMap(own, torch.full((size,), _OLD, dtype=torch.uint8), own)


@dataclass(frozen=True)
class _IndexRun:
    """Indices start..stop of a flattened dimension: one kind, consecutive sources from ``source`` on."""

    start: int
    stop: int
    source: int
    kind: int


class Widener:
    """Widens one parameter as a plan says.

    Tables of the dimensions are the plan's, so that those of a thousand parameters take no more memory than one's.
    A rank of an expert-parallel group passes its slice of the experts as ``experts``; the results are those of the
    whole tensor at these experts.

    Args:
        plan: the growth.
        name: the parameter's name in the plan.
        experts: the half-open range of dimension 0 that this caller holds, for stacked experts; all by default.
    """

    def __init__(self, plan: GrowthPlan, name: str, experts: tuple[int, int] | None = None) -> None:
        self.param: ParamPlan = plan.param(name)
        self.strategy: Strategy = plan.strategy
        self._plan = plan
        self._key = stream_key(plan.strategy.seed, plan.number, name)
        if experts is not None and not self.param.axes.stacked_experts:
            raise PlanError(f"{name} isn't a tensor of stacked experts, so it has no slice {experts}")
        if experts is not None and not 0 <= experts[0] < experts[1] <= self.param.before[0]:
            raise PlanError(f"{name} stacks {self.param.before[0]} experts, which {experts} isn't a range of")
        first, last = experts if experts is not None else (0, self.param.before[0] if self.param.before else 0)
        if experts is not None:
            self.before = (last - first, *self.param.before[1:])
            self.after = (last - first, *self.param.after[1:])
        else:
            self.before, self.after = self.param.before, self.param.after
        self._first_expert = first
        self._first_element = first * math.prod(self.param.after[1:])
        self._dims = self.param.axes.dims
        self._growths: Mapping[str, AxisGrowth] = plan.factors().growths

    @property
    def numel(self) -> int:
        return math.prod(self.after)

    @property
    def _unmoved(self) -> bool:
        return self._multiplier == 1.0 and not any(dim.axes & self._growths.keys() for dim in self._dims)

    # -- the two public operations ------------------------------------------------------------------------------

    def weight(self, old: Tensor | Elements, out: Tensor, start: int = 0, statistics: Statistics | None = None) -> None:
        """Fill ``out`` with elements ``start .. start + out.numel()`` of the grown weight, flattened.

        Args:
            old: the old weight (this caller's experts), any shape with ``prod(before)`` elements; or what gives its
                elements.
            out: 1-D, contiguous; half precisions are computed in fp32 and rounded once.
            statistics: what :meth:`statistics` gives, for a caller that makes a weight in many pieces.

        Raises:
            PlanError: if the sizes contradict the plan.
        """
        elements = self._elements(old)
        if statistics is None:
            statistics = self.statistics(elements)
        actions = {_OLD: "copy", _COPY: "copy", _MEAN: "mean", _RANDOM: "draw", _ZERO: "zero"}
        offset = self.param.axes.offset
        if self._noise is None:
            self._fill(elements, out, start, actions, self._weight_scales, statistics, offset)
            return
        wide = torch.float32 if out.itemsize < 4 else out.dtype
        for first in range(0, out.numel(), _NOISE_CHUNK):
            piece = out[first : first + _NOISE_CHUNK]
            exact = torch.empty_like(piece, dtype=wide)
            self._fill(elements, exact, start + first, actions, self._weight_scales, statistics, offset)
            self._noise.add(exact, start + first, statistics.spreads)
            piece.copy_(exact)

    def statistics(self, old: Tensor | Elements, weights: Statistics | None = None) -> Statistics:
        """What the new entries need to know of all of ``old``.

        Args:
            old: the weight, or a state that is weights, too.
            weights: those of the weight, for such a state: what is drawn is the same in both.

        Raises:
            ValueError: if an entry isn't finite.
        """
        elements, numel = self._elements(old), math.prod(self.before)
        spreads = () if weights is None else weights.spreads
        if weights is None and self._draws:
            size = numel // self._matrices
            spreads = tuple(spread(elements, matrix * size, (matrix + 1) * size) for matrix in range(self._matrices))
        if not self._has(_MEAN):
            return Statistics(spreads)
        columns = self.before[-1] if len(self.before) > 1 else 1
        mean = column_mean if self._index_is_last else row_mean
        return Statistics(spreads, mean(elements, 0, numel, columns))

    def is_weights(self, key: str) -> bool:
        """Whether the optimizer's state ``key`` is a second set of weights.

        Raises:
            PlanError: as :meth:`Strategy.state_kind`.
        """
        return self.strategy.state_kind(key) is StateKind.WEIGHTS

    def state(
        self, key: str, old: Tensor | Elements, out: Tensor, start: int = 0, statistics: Statistics | None = None
    ) -> None:
        """Fill ``out`` like :meth:`weight`, from the optimizer's per-element state ``key`` (``exp_avg`` ...).

        Args:
            key, old, out, start: which state, and as for :meth:`weight`.
            statistics: of a state that is weights, with those of the weight (:meth:`statistics`); may be left out where
                nothing is drawn.

        Raises:
            PlanError: if the sizes contradict the plan, the state's kind isn't known, or a state of unknown degree
                would have to be rescaled.
        """
        if self.is_weights(key):
            if statistics is None and self._draws:
                raise PlanError(f"{self.param.name}: {key} is drawn as the weight is, whose statistics are missing")
            self.weight(old, out, start, statistics)
            return
        mode = self.strategy.optimizer_state
        actions = dict.fromkeys((_OLD, _COPY, _MEAN, _RANDOM, _ZERO), "zero")
        if mode is not OptimizerState.DROP:
            actions[_OLD] = "copy"
        if mode.copies:
            actions[_COPY] = "copy"
        scales: list[Scale] = [1.0] * len(self._dims)
        if mode.rescales:
            degree = gradient_degree(key)
            assert degree is not None
            scales = [scale**degree for scale in self._gradient_scales]
        self._fill(self._elements(old), out, start, actions, scales, Statistics(), 0.0)

    # -- what the plan says, made concrete ----------------------------------------------------------------------

    @property
    def _weight_scales(self) -> list[Scale]:
        return self._with_multiplier([self._scale(dim, Factors.weight) for dim in self._dims], 1 / self._multiplier)

    @property
    def _gradient_scales(self) -> list[Scale]:
        return self._with_multiplier([self._scale(dim, Factors.gradient) for dim in self._dims], self._multiplier)

    @cached_property
    def _multiplier(self) -> float:
        return self._plan.factors().multiplier(self.param.axes)

    @staticmethod
    def _with_multiplier(scales: list[Scale], factor: float) -> list[Scale]:
        return scales if factor == 1.0 else [scales[0] * factor, *scales[1:]]

    def _scale(self, dim: Dim, choose: Callable[[Factors, Dim, bool], Scale]) -> Scale:
        """A dimension's factor: a float where it is the same for all its indices, whatever piece is asked for."""
        head_gain = self.param.axes.head_gain
        return self._plan.once((choose, dim, head_gain), lambda: choose(self._plan.factors(), dim, head_gain))

    @property
    def _maps(self) -> list[_DimMap]:
        return [
            self._plan.once(("map", dim, size), partial(self._dim_map, dim, size))
            for dim, size in zip(self._dims, self.after, strict=True)
        ]

    def _dim_map(self, dim: Dim, size: int) -> _DimMap:
        if not dim.axes & self._growths.keys():
            return _unmoved(size)
        before = {axis: growth.before for axis, growth in self._growths.items()}
        after = {axis: growth.after for axis, growth in self._growths.items()}
        maps = {leaf: self._leaf_map(leaf) for leaf in dim.leaves}
        signed = any(leaf_map.sign is not None for leaf_map in maps.values())
        return _DimMap(
            source=dim.laid_indices(lambda leaf: maps[leaf].source, before),
            kind=dim.laid(lambda leaf: maps[leaf].kind),
            drawn_as=dim.laid_indices(lambda leaf: maps[leaf].drawn_as, after),
            sign=dim.laid(lambda leaf: maps[leaf].signs) if signed else None,
        )

    def _leaf_map(self, leaf: Dim) -> _DimMap:
        if leaf.axis is None:
            return _unmoved(leaf.fixed)
        growth = self._growths[leaf.axis]
        sizes = growth.before, growth.after, growth.groups
        new = torch.tensor([self._new_kind(leaf, segment) for segment in range(leaf.segments)], dtype=torch.uint8)
        old = old_units(*sizes)[leaf.units(growth.after)]
        kind = torch.where(old, _OLD, new[leaf.segment(growth.after)])
        if not self.strategy.cancels:
            own = torch.arange(leaf.size(growth.after))
            return _DimMap(leaf.sources(source_units(*sizes), growth.before), kind, own)
        # Copies that belong to a pair of units (biases of a convolution, say) must be the same for both.
        first, sign = paired_units(*sizes)
        source = leaf.sources(source_units(*sizes)[first], growth.before)
        drawn_as = leaf.sources(first, growth.after)
        return _DimMap(source, kind, drawn_as, sign[leaf.units(growth.after)] if leaf.role is Role.FAN_IN else None)

    def _new_kind(self, dim: Dim, segment: int) -> int:
        if dim.role is Role.GAIN:
            return _KIND[self.strategy.norm]
        if dim.role is Role.INDEX:
            return _INDEX_KIND[self.strategy.vocabulary]
        if dim.role is Role.PER_UNIT:
            return _COPY
        init = self.strategy.fan_out if dim.role is Role.FAN_OUT else self.strategy.fan_in
        if init is Init.ZERO and segment in dim.alive:
            return _COPY
        return _KIND[init]

    def _has(self, kind: int) -> bool:
        """Whether some element may be of a kind."""
        return any(bool((dim_map.kind == kind).any()) for dim_map in self._maps)

    @property
    def _draws(self) -> bool:
        """Whether anything random may be in a new entry."""
        return self._has(_RANDOM) or self._noise is not None

    @property
    def _index_is_last(self) -> bool:
        """Whether the columns of a matrix are indices, as of an unembedding that is stored as [width, tokens]."""
        return len(self._dims) > 1 and any(leaf.role is Role.INDEX for leaf in self._dims[-1].leaves)

    @cached_property
    def _noise(self) -> ZeroSumNoise | None:
        """What perturbs the columns that consume twins, if anything does."""
        grown = [place for place, dim in enumerate(self._dims) if any(map(self._is_consumed, dim.leaves))]
        if not grown or not self.strategy.perturbation:
            return None
        place = grown[-1]
        dim = self._dims[place]
        return ZeroSumNoise(
            key=stream_key(self.strategy.seed, self._plan.number, f"perturbation/{self.param.name}"),
            place=place,
            twins=self._plan.once(("consumed alike", dim), lambda: consumed_twins(dim, self._growths)),
            strength=self._plan.once(("noise", dim), lambda: dim.laid(self._noise_strength)),
            sources=tuple(dim_map.source for dim_map in self._maps),
            first=self._first_expert,
            matrices=self._matrices,
        )

    def _is_consumed(self, leaf: Dim) -> bool:
        return leaf.role is Role.FAN_IN and leaf.axis in self._growths

    def _noise_strength(self, leaf: Dim) -> Tensor:
        """The strength of the noise on each entry of a leaf, float64."""
        if leaf.axis is None:
            return torch.zeros(leaf.fixed, dtype=torch.float64)
        growth = self._growths[leaf.axis]
        strength = self.strategy.perturbation * growth.before / growth.after
        return torch.full((leaf.size(growth.after),), strength, dtype=torch.float64)

    @cached_property
    def _matrices(self) -> int:
        stacked = self.param.axes.stacked_experts
        matrix_dims = self._dims[1:] if stacked else self._dims
        first = matrix_dims[0] if len(matrix_dims) == 2 else FIXED
        segments = 1 if first.interleaved else first.segments
        return (self.before[0] if stacked else 1) * segments

    # -- runs: a grown tensor as a few rectangles ---------------------------------------------------------------

    @property
    def _columns(self) -> list[_IndexRun]:
        if not self._dims:
            return [_IndexRun(0, 1, 0, _OLD)]
        dim_map = self._maps[-1]
        return self._plan.once(("columns", self._dims[-1], self.after[-1]), lambda: _runs(dim_map.source, dim_map.kind))

    def _row_runs(self, first: int, last: int) -> list[_IndexRun]:
        """Rows ``first .. last`` of the grown tensor as runs of consecutive old rows."""
        rest = torch.arange(first, last)
        source = torch.zeros_like(rest)
        kind = torch.zeros(last - first, dtype=torch.uint8)
        stride_old = 1
        leading = list(zip(self._maps, self.before, self.after, strict=True))[:-1]
        for dim_map, before, after in reversed(leading):
            index = rest % after
            rest = rest // after
            source += dim_map.source[index] * stride_old
            kind = torch.maximum(kind, dim_map.kind[index])
            stride_old *= before
        return _runs(source, kind, first)

    def _row_scale(self, scales: list[Scale], first: int, last: int) -> Scale:
        """Product of the leading dimensions' factors for rows ``first .. last``."""
        product: Scale = 1.0
        rest = torch.arange(first, last)
        for scale, after in reversed(list(zip(scales, self.after, strict=True))[:-1]):
            product = product * (scale[rest % after] if isinstance(scale, Tensor) else scale)
            rest = rest // after
        return product

    def _drawn_as(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The rows whose random entries ``rows`` have, and the signs of those."""
        rest, stride = rows, 1
        drawn_as, sign = torch.zeros_like(rows), torch.ones(len(rows), dtype=torch.float64)
        for dim_map, after in reversed(list(zip(self._maps, self.after, strict=True))[:-1]):
            index = rest % after
            rest = rest // after
            drawn_as += dim_map.drawn_as[index] * stride
            if dim_map.sign is not None:
                sign *= dim_map.sign[index]
            stride *= after
        return drawn_as, sign

    # -- filling ------------------------------------------------------------------------------------------------

    def _elements(self, old: Tensor | Elements) -> Elements:
        if not isinstance(old, Tensor):
            return old
        if old.numel() != math.prod(self.before):
            raise PlanError(f"{self.param.name}: got {old.numel()} old elements; the plan has {self.before}")
        flat = old.reshape(-1)
        return lambda start, stop: flat[start:stop]

    def _fill(
        self,
        old: Elements,
        out: Tensor,
        start: int,
        actions: dict[int, str],
        scales: list[Scale],
        statistics: Statistics,
        offset: float,
    ) -> None:
        stop = start + out.numel()
        if not 0 <= start <= stop <= self.numel or out.dim() != 1:
            raise PlanError(f"{self.param.name}: got a piece {start}..{stop}; the plan has {self.after}")
        if start == stop:
            return
        if self._unmoved and actions[_OLD] == "copy":
            out.copy_(old(start, stop))
            return
        columns = self.after[-1] if self.after else 1
        for first, last, piece_start, piece_stop in _whole_and_partial_rows(start, stop, columns):
            piece = out[piece_start - start : piece_stop - start]
            whole = piece_stop - piece_start == (last - first) * columns
            rows_RC = piece.view(-1, columns) if whole else out.new_empty(last - first, columns)
            self._fill_rows(old, rows_RC, first, actions, scales, statistics, offset)
            if not whole:
                skipped = piece_start - first * columns
                piece.copy_(rows_RC.view(-1)[skipped : skipped + piece.numel()])

    def _fill_rows(
        self,
        old: Elements,
        out_RC: Tensor,
        first: int,
        actions: dict[int, str],
        scales: list[Scale],
        statistics: Statistics,
        offset: float,
    ) -> None:
        """Fill whole rows ``first ..`` of the grown tensor."""
        last = first + out_RC.shape[0]
        columns_old = self.before[-1] if self.before else 1
        row_scale = self._row_scale(scales, first, last)
        column_scale = scales[-1] if scales else 1.0
        for rows, columns in itertools.product(self._row_runs(first, last), self._columns):
            stop = rows.source + rows.stop - rows.start
            block = out_RC[rows.start - first : rows.stop - first, columns.start : columns.stop]
            action = actions[max(rows.kind, columns.kind)]
            if action == "zero":
                block.zero_()
                continue
            if action == "copy":
                rows_RC = old(rows.source * columns_old, stop * columns_old).view(-1, columns_old)
                source = rows_RC[:, columns.source : columns.source + columns.stop - columns.start]
            elif action == "mean":
                assert statistics.mean is not None
                if self._index_is_last:
                    mean = statistics.mean[rows.source : stop, None]
                elif len(statistics.mean) == 1:
                    mean = statistics.mean
                else:
                    mean = statistics.mean[columns.source :][: block.shape[1]]
                source = mean.to(block.device, torch.float32 if block.itemsize < 4 else block.dtype).expand(block.shape)
            else:
                source = self._draw(rows, columns, statistics.spreads).to(out_RC.device)
            row = row_scale[rows.start - first : rows.stop - first] if isinstance(row_scale, Tensor) else row_scale
            column = column_scale[columns.start : columns.stop] if isinstance(column_scale, Tensor) else column_scale
            _scaled_copy(block, source, row, column, offset)

    def _draw(self, rows: _IndexRun, columns: _IndexRun, spreads: Sequence[Spread]) -> Tensor:
        """Random entries of a rectangle, fp32 on the CPU: gains around their mean, other weights around zero."""
        width = self.after[-1]
        drawn = torch.empty(rows.stop - rows.start, columns.stop - columns.start)
        per_chunk = max(_DRAW_CHUNK // drawn.shape[1], 1)
        column_index = torch.arange(columns.start, columns.stop)
        gain = any(leaf.role is Role.GAIN for leaf in self.param.axes.leaves)
        mean = torch.tensor([s.mean if gain else 0.0 for s in spreads], dtype=torch.float64)
        std = torch.tensor([s.std if gain else s.rms for s in spreads], dtype=torch.float64)
        rows_per_matrix = max(math.prod(self.after[:-1]) // len(spreads), 1)
        for chunk_start in range(rows.start, rows.stop, per_chunk):
            chunk_stop = min(chunk_start + per_chunk, rows.stop)
            row_index = torch.arange(chunk_start, chunk_stop)
            drawn_as, sign = self._drawn_as(row_index)
            place = drawn_as[:, None] * width + self._maps[-1].drawn_as[column_index]
            normal = standard_normal(self._key, self._first_element + place) * sign[:, None]
            if self._maps[-1].sign is not None:
                normal *= self._maps[-1].sign[column_index]
            matrix = row_index // rows_per_matrix
            drawn[chunk_start - rows.start : chunk_stop - rows.start] = normal * std[matrix, None] + mean[matrix, None]
        return drawn


@torch.no_grad()
def grown_buffer(plan: GrowthPlan, name: str, old: Tensor) -> Tensor:
    """A buffer after a growth: itself if the plan doesn't grow it."""
    if not any(buffer.name == name and buffer.grows for buffer in plan.buffers):
        return old
    widener = Widener(plan, name)
    out = torch.empty(widener.numel, dtype=old.dtype, device=old.device)
    widener.weight(old, out)
    return out.view(widener.after)


def _runs(source: Tensor, kind: Tensor, first: int = 0) -> list[_IndexRun]:
    """Split indices ``first ..`` wherever the kind changes or the sources stop being consecutive."""
    breaks = (source[1:] != source[:-1] + 1) | (kind[1:] != kind[:-1])
    starts = [0, *(breaks.nonzero().flatten() + 1).tolist()]
    stops = [*starts[1:], source.numel()]
    heads = torch.tensor(starts)
    return [
        _IndexRun(first + start, first + stop, src, knd)
        for start, stop, src, knd in zip(starts, stops, source[heads].tolist(), kind[heads].tolist(), strict=True)
    ]


def _whole_and_partial_rows(start: int, stop: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut a flat piece into at most three: a partial first row, whole rows, a partial last row.

    Yields (first row, last row, start, stop) with flat start and stop.
    """
    first_whole, last_whole = -(-start // columns), stop // columns
    if first_whole > last_whole:  # inside one row
        yield last_whole, last_whole + 1, start, stop
        return
    if start < first_whole * columns:
        yield first_whole - 1, first_whole, start, first_whole * columns
    if first_whole < last_whole:
        yield first_whole, last_whole, first_whole * columns, last_whole * columns
    if last_whole * columns < stop:
        yield last_whole, last_whole + 1, last_whole * columns, stop


def _scaled_copy(out_RC: Tensor, source_RC: Tensor, row: Scale, column: Scale, offset: float) -> None:
    """``out + offset = (source + offset) * row * column``, in fp32 for the half precisions, rounded once to ``out``'s.

    Scalar factors are multiplied with each other first; a factor per row or column is a rounded product of its own.
    """
    half = {out_RC.dtype, source_RC.dtype} & {torch.float16, torch.bfloat16}
    target = torch.empty_like(out_RC, dtype=torch.float32) if half else out_RC
    if half:
        source_RC = source_RC.float()
    scalar = (1.0 if isinstance(row, Tensor) else row) * (1.0 if isinstance(column, Tensor) else column)
    scaled = scalar != 1.0 or isinstance(row, Tensor) or isinstance(column, Tensor)
    if offset and scaled:
        source_RC = source_RC + offset
    if scalar == 1.0:
        target.copy_(source_RC)
    else:
        torch.mul(source_RC, scalar, out=target)
    if isinstance(row, Tensor):
        target.mul_(row.to(target.device, target.dtype)[:, None])
    if isinstance(column, Tensor):
        target.mul_(column.to(target.device, target.dtype))
    if offset and scaled:
        target.sub_(offset)
    if half:
        out_RC.copy_(target)
