"""Widen one parameter, and its optimizer state, any contiguous piece at a time.

Every element of a grown tensor is a function of the old tensor and of its own index alone. So a rank, or a tool that
streams through files, can make just the piece it owns, and all pieces fit together bit for bit.

Shape suffixes: R rows (all dimensions but the last, flattened), C columns (the last dimension), ``_old`` before the
growth.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ds_sparkling.errors import PlanError
from ds_sparkling.growth.noise import ZeroSumNoise
from ds_sparkling.growth.plan import GrowthPlan, ParamPlan
from ds_sparkling.growth.random import standard_normal, stream_key
from ds_sparkling.growth.scaling import Scale
from ds_sparkling.growth.spread import Spread, column_mean, row_mean, spread
from ds_sparkling.growth.tables import GrowthTables, IndexRun, IndexTable, Kind, index_runs
from ds_sparkling.spec.axes import FIXED, Dim, Role
from ds_sparkling.spec.state_kinds import StateKind, gradient_degree
from ds_sparkling.spec.strategy import OptimizerState, Strategy

#: Elements drawn at a time; bounds the temporaries of random initialisation.
_DRAW_CHUNK = 1 << 16

#: Elements of a perturbed weight that are made at a time.
_NOISE_CHUNK = 1 << 20

#: What gives the elements start..stop of a flattened tensor, 1-D: of one that is never held as a whole.
Elements = Callable[[int, int], Tensor]


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
class _Recipe:
    """How the elements of a grown tensor are made.

    Attributes:
        scales: the factor of each dimension's entries.
        zeroed: the kinds of elements that are zero.
        statistics: of the old tensor.
        offset: what is added before elements are scaled, and taken off after.
    """

    scales: Sequence[Scale]
    zeroed: frozenset[Kind]
    statistics: Statistics = Statistics()
    offset: float = 0.0


class Widener:
    """Widens one parameter as a plan says.

    A rank of an expert-parallel group passes its slice of the experts as ``experts``; the results are those of the
    whole tensor at these experts.

    Args:
        plan: the growth.
        name: the parameter's name in the plan.
        experts: the half-open range of dimension 0 that this caller holds, for stacked experts; all by default.
        tables: the plan's, shared by all parameters that are widened; tables of its own by default.

    Raises:
        PlanError: if the plan has no such parameter, or the parameter no such experts.
    """

    def __init__(
        self,
        plan: GrowthPlan,
        name: str,
        experts: tuple[int, int] | None = None,
        *,
        tables: GrowthTables | None = None,
    ) -> None:
        self.param: ParamPlan = plan.param(name)
        self.strategy: Strategy = plan.strategy
        self._tables = GrowthTables(plan) if tables is None else tables
        self._seed = plan.strategy.seed, plan.number
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

    @property
    def numel(self) -> int:
        return math.prod(self.after)

    @property
    def _unmoved(self) -> bool:
        return self._multiplier == 1.0 and not any(dim.axes & self._tables.growths.keys() for dim in self._dims)

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
        recipe = _Recipe(
            self._scales(self._tables.weight_scale, 1 / self._multiplier),
            frozenset({Kind.ZERO}),
            statistics,
            self.param.axes.offset,
        )
        if self._noise is None:
            self._fill(elements, out, start, recipe)
            return
        wide = torch.float32 if out.itemsize < 4 else out.dtype
        for first in range(0, out.numel(), _NOISE_CHUNK):
            piece = out[first : first + _NOISE_CHUNK]
            exact = torch.empty_like(piece, dtype=wide)
            self._fill(elements, exact, start + first, recipe)
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
        if not self._has(Kind.MEAN):
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
        kept = set() if mode is OptimizerState.DROP else {Kind.OLD}
        if mode.copies:
            kept.add(Kind.COPY)
        scales: list[Scale] = [1.0] * len(self._dims)
        if mode.rescales:
            degree = gradient_degree(key)
            assert degree is not None
            scales = [scale**degree for scale in self._scales(self._tables.gradient_scale, self._multiplier)]
        self._fill(self._elements(old), out, start, _Recipe(scales, frozenset(Kind) - kept))

    # -- what the plan says, made concrete ----------------------------------------------------------------------

    @cached_property
    def _multiplier(self) -> float:
        return self._tables.multiplier(self.param.axes)

    def _scales(self, of_dim: Callable[[Dim, bool], Scale], multiplier: float) -> list[Scale]:
        """The factor of every dimension, the first one's with what the whole parameter is multiplied by."""
        scales = [of_dim(dim, self.param.axes.head_gain) for dim in self._dims]
        return scales if multiplier == 1.0 else [scales[0] * multiplier, *scales[1:]]

    @cached_property
    def _indices(self) -> list[IndexTable]:
        """The table of every dimension."""
        return [self._tables.indices(dim, size) for dim, size in zip(self._dims, self.after, strict=True)]

    def _has(self, kind: Kind) -> bool:
        """Whether some element may be of a kind."""
        return any(bool((table.kind == kind).any()) for table in self._indices)

    @property
    def _draws(self) -> bool:
        """Whether anything random may be in a new entry."""
        return self._has(Kind.RANDOM) or self._noise is not None

    @property
    def _index_is_last(self) -> bool:
        """Whether the columns of a matrix are indices, as of an unembedding that is stored as [width, tokens]."""
        return len(self._dims) > 1 and any(leaf.role is Role.INDEX for leaf in self._dims[-1].leaves)

    @cached_property
    def _noise(self) -> ZeroSumNoise | None:
        """What perturbs the columns that consume twins, if anything does."""
        grown = [place for place, dim in enumerate(self._dims) if any(map(self._tables.consumes_grown, dim.leaves))]
        if not grown or not self.strategy.perturbation:
            return None
        place = grown[-1]
        return ZeroSumNoise(
            key=stream_key(*self._seed, f"perturbation/{self.param.name}"),
            place=place,
            twins=self._tables.twins(self._dims[place]),
            strength=self._tables.noise_strength(self._dims[place]),
            sources=tuple(table.source for table in self._indices),
            first=self._first_expert,
            matrices=self._matrices,
        )

    @cached_property
    def _matrices(self) -> int:
        stacked = self.param.axes.stacked_experts
        matrix_dims = self._dims[1:] if stacked else self._dims
        first = matrix_dims[0] if len(matrix_dims) == 2 else FIXED
        segments = 1 if first.interleaved else first.segments
        return (self.before[0] if stacked else 1) * segments

    # -- runs: a grown tensor as a few rectangles ---------------------------------------------------------------

    @property
    def _columns(self) -> list[IndexRun]:
        return self._tables.runs(self._dims[-1], self.after[-1]) if self._dims else [IndexRun(0, 1, 0, Kind.OLD)]

    def _row_runs(self, first: int, last: int) -> list[IndexRun]:
        """Rows ``first .. last`` of the grown tensor as runs of consecutive old rows."""
        rest = torch.arange(first, last)
        source = torch.zeros_like(rest)
        kind = torch.zeros(last - first, dtype=torch.uint8)
        stride_old = 1
        leading = list(zip(self._indices, self.before, self.after, strict=True))[:-1]
        for table, before, after in reversed(leading):
            index = rest % after
            rest = rest // after
            source += table.source[index] * stride_old
            kind = torch.maximum(kind, table.kind[index])
            stride_old *= before
        return index_runs(source, kind, first)

    def _row_scale(self, scales: Sequence[Scale], first: int, last: int) -> Scale:
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
        for table, after in reversed(list(zip(self._indices, self.after, strict=True))[:-1]):
            index = rest % after
            rest = rest // after
            drawn_as += table.drawn_as[index] * stride
            if table.sign is not None:
                sign *= table.sign[index]
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

    def _fill(self, old: Elements, out: Tensor, start: int, recipe: _Recipe) -> None:
        """Fill ``out`` with the elements ``start ..`` of the grown tensor, as a recipe says."""
        stop = start + out.numel()
        if not 0 <= start <= stop <= self.numel or out.dim() != 1:
            raise PlanError(f"{self.param.name}: got a piece {start}..{stop}; the plan has {self.after}")
        if start == stop:
            return
        if self._unmoved and Kind.OLD not in recipe.zeroed:
            out.copy_(old(start, stop))
            return
        columns = self.after[-1] if self.after else 1
        for first, last, piece_start, piece_stop in _whole_and_partial_rows(start, stop, columns):
            piece = out[piece_start - start : piece_stop - start]
            whole = piece_stop - piece_start == (last - first) * columns
            rows_RC = piece.view(-1, columns) if whole else out.new_empty(last - first, columns)
            self._fill_rows(old, rows_RC, first, recipe)
            if not whole:
                skipped = piece_start - first * columns
                piece.copy_(rows_RC.view(-1)[skipped : skipped + piece.numel()])

    def _fill_rows(self, old: Elements, out_RC: Tensor, first: int, recipe: _Recipe) -> None:
        """Fill whole rows ``first ..`` of the grown tensor."""
        last = first + len(out_RC)
        row_scale = self._row_scale(recipe.scales, first, last)
        column_scale = recipe.scales[-1] if recipe.scales else 1.0
        for rows, columns in itertools.product(self._row_runs(first, last), self._columns):
            block = out_RC[rows.start - first : rows.stop - first, columns.start : columns.stop]
            kind = max(rows.kind, columns.kind)
            if kind in recipe.zeroed:
                block.zero_()
                continue
            if kind is Kind.MEAN:
                source = self._mean(rows, columns, recipe.statistics).to(block.device)
                source = source.to(torch.float32 if block.itemsize < 4 else block.dtype).expand(block.shape)
            elif kind is Kind.RANDOM:
                source = self._draw(rows, columns, recipe.statistics.spreads).to(block.device)
            else:
                source = self._old(old, rows, columns)
            row = row_scale[rows.start - first : rows.stop - first] if isinstance(row_scale, Tensor) else row_scale
            column = column_scale[columns.start : columns.stop] if isinstance(column_scale, Tensor) else column_scale
            _scaled_copy(block, source, row, column, recipe.offset)

    def _old(self, old: Elements, rows: IndexRun, columns: IndexRun) -> Tensor:
        """The old entries of a rectangle."""
        width = self.before[-1] if self.before else 1
        rows_RC = old(rows.source * width, (rows.source + len(rows)) * width).view(-1, width)
        return rows_RC[:, columns.source : columns.source + len(columns)]

    def _mean(self, rows: IndexRun, columns: IndexRun, statistics: Statistics) -> Tensor:
        """The mean entries of a rectangle: one column, one row, or one entry."""
        mean = statistics.mean
        assert mean is not None
        if self._index_is_last:
            return mean[rows.source : rows.source + len(rows), None]
        return mean if len(mean) == 1 else mean[columns.source : columns.source + len(columns)]

    def _draw(self, rows: IndexRun, columns: IndexRun, spreads: Sequence[Spread]) -> Tensor:
        """Random entries of a rectangle, fp32 on the CPU: gains around their mean, other weights around zero."""
        width, table = self.after[-1], self._indices[-1]
        key = stream_key(*self._seed, self.param.name)
        drawn = torch.empty(len(rows), len(columns))
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
            place = drawn_as[:, None] * width + table.drawn_as[column_index]
            normal = standard_normal(key, self._first_element + place) * sign[:, None]
            if table.sign is not None:
                normal *= table.sign[column_index]
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
