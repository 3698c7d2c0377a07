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
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from ds_sparkling.errors import PlanError
from ds_sparkling.growth.noise import ZeroSumNoise
from ds_sparkling.growth.plan import GrowthPlan, ParamPlan
from ds_sparkling.growth.random import add_normal, stream_key
from ds_sparkling.growth.scaling import Scale
from ds_sparkling.growth.stretches import Stretches
from ds_sparkling.growth.survey import Elements, Statistics, Survey
from ds_sparkling.growth.tables import OF_INIT, GrowthTables, IndexRun, IndexTable, Kind, index_runs
from ds_sparkling.spec.axes import FIXED, Dim, Role
from ds_sparkling.spec.state_kinds import StateKind, gradient_degree
from ds_sparkling.spec.strategy import OptimizerState, Strategy

#: Elements that are drawn or perturbed at a time by each thread of the CPU, and on another device; bounds temporaries.
_CHUNK, _DEVICE_CHUNK = 1 << 20, 1 << 22


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
    statistics: Statistics = field(default_factory=Statistics)
    offset: float = 0.0


@dataclass(frozen=True)
class _Rectangle:
    """Rows ``first_row .. last_row``, columns ``first_column .. last_column``: whole rows, or a part of one."""

    first_row: int
    last_row: int
    first_column: int
    last_column: int
    width: int

    @property
    def rows(self) -> int:
        return self.last_row - self.first_row

    @property
    def columns(self) -> int:
        return self.last_column - self.first_column

    @property
    def start(self) -> int:
        """Its first element's index in the flattened tensor."""
        return self.first_row * self.width + self.first_column

    @property
    def stop(self) -> int:
        """The index after its last element's: they lie end to end."""
        return (self.last_row - 1) * self.width + self.last_column


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
        self._first_row = first * math.prod(self.param.after[1:-1])
        self._dims = self.param.axes.dims

    @property
    def numel(self) -> int:
        return math.prod(self.after)

    @property
    def _least(self) -> Kind:
        """What every element is at least: of a parameter in a new layer none is old."""
        return Kind.OLD if self.param.made is None else OF_INIT[self.param.made]

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
        chunk = _chunk(out.device)
        for first in range(0, out.numel(), chunk):
            piece = out[first : first + chunk]
            with _exact(piece) as exact:
                self._fill(elements, exact, start + first, recipe)
                for place in self._rectangles(start + first, start + first + len(exact)):
                    block = exact[place.start - start - first : place.stop - start - first]
                    block_RC = block.view(place.rows, place.columns)
                    self._noise.add(block_RC, place.first_row, place.first_column, statistics.spreads)

    def statistics(self, old: Tensor | Elements, weights: Statistics | None = None) -> Statistics:
        """What the new entries need to know of all of ``old``.

        Args:
            old: the weight, or a state that is weights, too.
            weights: those of the weight, for such a state: what is drawn is the same in both.

        Raises:
            ValueError: if an entry isn't finite.
        """
        found = self.survey(of_weight=weights is None).of(self._elements(old))
        return found if weights is None else replace(found, spreads=weights.spreads)

    def survey(self, *, of_weight: bool = True) -> Survey:
        """How the :meth:`statistics` come about; for callers that hold pieces of the old tensor.

        Args:
            of_weight: False for a state that is weights, too, whose spreads are those of the weight.
        """
        mean_of = None if not self._has(Kind.MEAN) else "columns" if self._index_is_last else "rows"
        return Survey(
            numel=math.prod(self.before),
            matrices=self._matrices if of_weight and self._draws else 0,
            columns=self.before[-1] if len(self.before) > 1 else 1,
            mean_of=mean_of,
        )

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
        read = self._read(key)
        kept = frozenset() if read is None else frozenset(kind for kind in Kind if kind <= read)
        scales: list[Scale] = [1.0] * len(self._dims)
        if self.strategy.optimizer_state.rescales:
            degree = gradient_degree(key)
            assert degree is not None
            scales = [scale**degree for scale in self._scales(self._tables.gradient_scale, self._multiplier)]
        self._fill(self._elements(old), out, start, _Recipe(scales, frozenset(Kind) - kept))

    # -- which elements others need ---------------------------------------------------------------------------------

    def sources(self, start: int, stop: int, key: str | None = None) -> Stretches:
        """The old elements that the elements ``start .. stop`` of the grown tensor are made of.

        Args:
            start, stop: indices into the flattened grown tensor.
            key: of the optimizer's state; the weight by default.

        Raises:
            PlanError: as :meth:`Strategy.state_kind`.
        """
        read = self._read(key)
        if start >= stop or read is None or self._least > read:
            return Stretches.none()
        if self._unmoved:
            return Stretches.one(start, stop)
        width = self._width_before
        starts, stops = [], []
        for place in self._rectangles(start, stop):
            source, kind = self._row_sources(place.first_row, place.last_row)
            rows = source[kind <= read] * width
            if place.columns == place.width:
                starts.append(rows)
                stops.append(rows + width)
            elif len(rows):
                for run in self._columns_of(place):
                    if run.kind <= read:
                        starts.append(rows + run.source)
                        stops.append(rows + run.source + len(run))
        return Stretches.union(torch.cat(starts), torch.cat(stops)) if starts else Stretches.none()

    def fed_by(self, start: int, stop: int, key: str | None = None) -> Stretches:
        """Where the elements of the grown tensor lie that any of the old elements ``start .. stop`` goes into.

        Told by whole rows, or by elements where there is only one row: among the elements there may be others, too.

        Args:
            start, stop: indices into the flattened old tensor.
            key: as for :meth:`sources`.
        """
        read = self._read(key)
        if start >= stop or read is None or self._least > read:
            return Stretches.none()
        if self._unmoved:
            return Stretches.one(start, stop)
        if self._rows_after == 1:
            table = self._indices[-1] if self._dims else None
            source, kind = (torch.zeros(1, dtype=torch.int64),) * 2 if table is None else (table.source, table.kind)
            before, after = 1, 1
        else:
            source, kind = self._row_sources(0, self._rows_after)
            before, after = self._width_before, self._width_after
        fed = ((source >= start // before) & (source <= (stop - 1) // before) & (kind <= read)).nonzero().flatten()
        return Stretches.union(fed * after, (fed + 1) * after)

    def _read(self, key: str | None) -> Kind | None:
        """Up to which kind elements are made of old ones; None if none is."""
        if key is None or self.is_weights(key):
            return Kind.COPY
        mode = self.strategy.optimizer_state
        return Kind.COPY if mode.copies else None if mode is OptimizerState.DROP else Kind.OLD

    @property
    def _rows_after(self) -> int:
        return math.prod(self.after[:-1])

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
        return self._least is kind or any(bool((table.kind == kind).any()) for table in self._indices)

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
        if not grown or not self.strategy.perturbation or self._least > Kind.COPY:
            return None
        place = grown[-1]
        return ZeroSumNoise(
            key=stream_key(*self._seed, f"perturbation/{self.param.name}"),
            place=place,
            terms=self._tables.noise(self._dims[place]),
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

    def _columns_of(self, place: _Rectangle) -> list[IndexRun]:
        """The runs of its columns alone."""
        return [
            IndexRun(start, stop, run.source + start - run.start, run.kind)
            for run in self._columns
            if (start := max(run.start, place.first_column)) < (stop := min(run.stop, place.last_column))
        ]

    def _rectangles(self, start: int, stop: int) -> Iterator[_Rectangle]:
        """The elements ``start .. stop`` of the grown tensor as a part of a row, whole rows, and a part of a row."""
        width = self._width_after
        first_whole, last_whole = -(-start // width), stop // width
        if first_whole > last_whole:  # inside one row
            yield _Rectangle(last_whole, last_whole + 1, start % width, stop % width, width)
            return
        if start < first_whole * width:
            yield _Rectangle(first_whole - 1, first_whole, start % width, width, width)
        if first_whole < last_whole:
            yield _Rectangle(first_whole, last_whole, 0, width, width)
        if last_whole * width < stop:
            yield _Rectangle(last_whole, last_whole + 1, 0, stop % width, width)

    @property
    def _width_before(self) -> int:
        return self.before[-1] if self.before else 1

    @property
    def _width_after(self) -> int:
        return self.after[-1] if self.after else 1

    def _row_runs(self, first: int, last: int) -> list[IndexRun]:
        """Rows ``first .. last`` of the grown tensor as runs of consecutive old rows."""
        return index_runs(*self._row_sources(first, last), first)

    def _row_sources(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """The old row and the kind of each of the rows ``first .. last`` of the grown tensor."""
        rest = torch.arange(first, last)
        source = torch.zeros_like(rest)
        kind = torch.full((last - first,), int(self._least), dtype=torch.uint8)
        stride_old = 1
        leading = list(zip(self._indices, self.before, self.after, strict=True))[:-1]
        for table, before, after in reversed(leading):
            index = rest % after
            rest = rest // after
            source += table.source[index] * stride_old
            kind = torch.maximum(kind, table.kind[index])
            stride_old *= before
        return source, kind

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
        if self._unmoved and self._least <= Kind.COPY and self._least not in recipe.zeroed:
            out.copy_(old(start, stop))
            return
        for place in self._rectangles(start, stop):
            piece = out[place.start - start : place.stop - start]
            self._fill_rectangle(old, piece.view(place.rows, place.columns), place, recipe)

    def _fill_rectangle(self, old: Elements, out_RC: Tensor, place: _Rectangle, recipe: _Recipe) -> None:
        """Fill a rectangle of the grown tensor."""
        top, left = place.first_row, place.first_column
        row_scale = self._row_scale(recipe.scales, top, place.last_row)
        column_scale = recipe.scales[-1] if recipe.scales else 1.0
        for rows, columns in itertools.product(self._row_runs(top, place.last_row), self._columns_of(place)):
            block = out_RC[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
            kind = max(rows.kind, columns.kind)
            if kind in recipe.zeroed:
                block.zero_()
                continue
            row = row_scale[rows.start - top : rows.stop - top] if isinstance(row_scale, Tensor) else row_scale
            column = column_scale[columns.start : columns.stop] if isinstance(column_scale, Tensor) else column_scale
            if kind is Kind.RANDOM:
                self._draw(block, rows, columns, row, column, recipe)
                continue
            if kind is Kind.MEAN:
                source = self._mean(rows, columns, recipe.statistics).to(block.device)
                source = source.to(torch.float32 if block.itemsize < 4 else block.dtype).expand(block.shape)
            else:
                source = self._old(old, rows, columns)
            _scaled_copy(block, source, row, column, recipe.offset)

    def _old(self, old: Elements, rows: IndexRun, columns: IndexRun) -> Tensor:
        """The old entries of a rectangle."""
        width = self._width_before
        if len(rows) == 1:
            start = rows.source * width + columns.source
            return old(start, start + len(columns)).view(1, -1)
        rows_RC = old(rows.source * width, (rows.source + len(rows)) * width).view(-1, width)
        return rows_RC[:, columns.source : columns.source + len(columns)]

    def _mean(self, rows: IndexRun, columns: IndexRun, statistics: Statistics) -> Tensor:
        """The mean entries of a rectangle: one column, one row, or one entry."""
        mean = statistics.mean
        assert mean is not None
        if self._index_is_last:
            return mean[rows.source : rows.source + len(rows), None]
        return mean if len(mean) == 1 else mean[columns.source : columns.source + len(columns)]

    def _draw(
        self, out_RC: Tensor, rows: IndexRun, columns: IndexRun, row: Scale, column: Scale, recipe: _Recipe
    ) -> None:
        """Fill a rectangle with random entries: gains around their mean, others around zero.

        The mean is scaled as an old entry would be. The deviate is added to it, times a factor per row and one per
        column, which have everything else in them.
        """
        index, table = torch.arange(rows.start, rows.stop), self._indices[-1]
        key, spreads = stream_key(*self._seed, self.param.name), recipe.statistics.spreads
        gain = any(leaf.role is Role.GAIN for leaf in self.param.axes.leaves)
        matrix = index // max(math.prod(self.after[:-1]) // len(spreads), 1)
        mean = torch.tensor([s.mean if gain else 0.0 for s in spreads], dtype=torch.float64, device=out_RC.device)
        std = torch.tensor([s.std if gain else s.rms for s in spreads], dtype=torch.float64)
        drawn_as, sign = self._drawn_as(index)
        row_factor = std[matrix] * sign * row
        column_drawn_as, column_sign = (t[columns.start : columns.stop] for t in (table.drawn_as, table.signs))
        column_factor = column_sign * column
        per_chunk = max(_chunk(out_RC.device) // len(columns), 1)
        for start in range(0, len(rows), per_chunk):
            some = slice(start, start + per_chunk)
            with _exact(out_RC[some]) as exact:
                if gain:
                    own = row[some] if isinstance(row, Tensor) else row
                    source = mean[matrix[some], None].to(exact.dtype).expand(exact.shape)
                    _scaled_copy(exact, source, own, column, recipe.offset)
                else:
                    exact.zero_()
                add_normal(
                    exact, key, self._first_row + drawn_as[some], column_drawn_as, row_factor[some], column_factor
                )


@torch.no_grad()
def grown_buffer(plan: GrowthPlan, name: str, old: Tensor) -> Tensor:
    """A buffer after a growth: itself if the plan doesn't grow it."""
    if not any(buffer.name == name and buffer.grows for buffer in plan.buffers):
        return old
    widener = Widener(plan, name)
    out = torch.empty(widener.numel, dtype=old.dtype, device=old.device)
    widener.weight(old, out)
    return out.view(widener.after)


def _chunk(device: torch.device) -> int:
    """Elements to draw at a time."""
    return _CHUNK * torch.get_num_threads() if device.type == "cpu" else _DEVICE_CHUNK


@contextmanager
def _exact(out: Tensor) -> Iterator[Tensor]:
    """Where what goes into ``out`` is computed: itself, or for a half precision fp32, which is rounded at the end."""
    if out.itemsize >= 4:
        yield out
        return
    exact = torch.empty_like(out, dtype=torch.float32)
    yield exact
    out.copy_(exact)


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
