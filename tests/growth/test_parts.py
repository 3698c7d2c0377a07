"""Dimensions that are made of parts, against growing every part as a tensor of its own."""

from __future__ import annotations

import itertools
import math
import pickle
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_sparkling.errors import PlanError
from ds_sparkling.growth import Block, GrowthPlan, Widener, birth_blocks, make_plan
from ds_sparkling.growth.plan_in_words import plan_in_words
from ds_sparkling.spec.axes import FIXED, Dim, Norm, ParamAxes, Role
from ds_sparkling.spec.strategy import INIT_PAIRS, Init, OptimizerState, Scaling, Split, Strategy

Shape = tuple[int, ...]
COPY_COPY, ZERO_COPY = (Init.COPY, Init.COPY), (Init.ZERO, Init.COPY)


@dataclass(frozen=True)
class Case:
    """One parameter, ``w``, with a dimension of parts at ``place``, of a model with the axes ``h`` and ``i``."""

    axes: ParamAxes
    place: int
    widths: dict[str, int]
    wide: dict[str, int]
    strategy: Strategy
    normed: bool

    @property
    def dim(self) -> Dim:
        return self.axes.dims[self.place]

    def shape(self, axes: ParamAxes, widths: dict[str, int]) -> Shape:
        return axes.shape((3,) * len(axes.dims), widths)

    def plan(self, axes: ParamAxes | None = None, shape: Shape | None = None) -> GrowthPlan:
        """Of a parameter, by default this one, beside a norm or a bias per axis."""
        role, norm = (Role.GAIN, Norm.RMS) if self.normed else (Role.FAN_OUT, None)
        own = {f"{axis}.own": ParamAxes((Dim(axis, role),), norm=norm) for axis in self.widths}
        shapes = {f"{axis}.own": (width,) for axis, width in self.widths.items()}
        known, size = axes or self.axes, shape or self.shape(self.axes, self.widths)
        return make_plan({"w": size, **shapes}, {"w": known, **own}, self.widths, self.wide, self.strategy, number=1)

    @property
    def old(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.shape(self.axes, self.widths), generator=generator, dtype=torch.float64)

    def leaves(self, tensor: Tensor, widths: dict[str, int]) -> list[Tensor]:
        """The pieces of a tensor along the dimension of parts: all leaves of the first segment, of the second ..."""
        return list(tensor.split(self.dim.sizes(widths) * self.dim.segments, self.place))

    @property
    def of_leaves(self) -> list[ParamAxes]:
        """The axes that the pieces have as tensors of their own."""
        plain = [leaf if leaf.axis else FIXED for leaf in self.dim.leaves]
        dims = [tuple(leaf if at == self.place else dim for at, dim in enumerate(self.axes.dims)) for leaf in plain]
        return [replace(self.axes, dims=each) for each in dims] * self.dim.segments


def leaves(axes: tuple[str, ...]) -> st.SearchStrategy[Dim]:
    return st.builds(
        Dim,
        st.sampled_from(axes),
        st.sampled_from([Role.FAN_OUT, Role.FAN_IN, Role.PER_UNIT]),
        block=st.integers(1, 2),
        segments=st.integers(1, 2),
        alive=st.sampled_from([(), (0,)]),
        interleaved=st.booleans(),
        power=st.sampled_from([0.0, 0.0, -0.5]),
    )


@st.composite
def cases(draw: st.DrawFn, pairs: tuple[tuple[Init, Init], ...] = INIT_PAIRS) -> Case:
    parts = draw(st.lists(leaves(("h", "i")) | st.builds(Dim, fixed=st.integers(1, 3)), max_size=2))
    parts.insert(draw(st.integers(0, len(parts))), draw(leaves(("h", "i"))))
    dim = Dim(parts=tuple(parts), segments=draw(st.integers(1, 3)))
    other = draw(st.sampled_from([FIXED, Dim("h", Role.FAN_IN), Dim("i", Role.FAN_OUT, segments=2)]))
    place, experts = draw(st.integers(0, 1)), draw(st.booleans())
    matrix = (dim, other) if place == 0 else (other, dim)
    axes = ParamAxes((FIXED, *matrix) if experts else matrix, stacked_experts=experts)
    widths = {"h": draw(st.integers(1, 3)), "i": draw(st.integers(1, 3))}
    grown = draw(st.sampled_from([("h",), ("i",), ("h", "i")]))
    pair, scaling = draw(st.sampled_from(pairs)), draw(st.sampled_from(Scaling))
    if scaling is Scaling.FUNCTION and pair not in (COPY_COPY, ZERO_COPY):
        scaling = Scaling.RMS
    strategy = Strategy(
        fan_out=pair[0],
        fan_in=pair[1],
        scaling=scaling,
        optimizer_state=draw(st.sampled_from(OptimizerState)),
        split=Split.parse(draw(st.sampled_from(["1:1", "1:2"]))) if pair == COPY_COPY else Split(),
        perturbation=draw(st.sampled_from([0.0, 0.5])) if pair == COPY_COPY else 0.0,
    )
    normed = draw(st.booleans()) and scaling is not Scaling.FUNCTION
    wide = {axis: widths[axis] + draw(st.integers(1, 4)) for axis in grown}
    return Case(axes, place + experts, widths, wide, strategy, normed)


def grown(plan: GrowthPlan, name: str, old: Tensor, state: str | None = None) -> Tensor:
    widener = Widener(plan, name)
    out = torch.full((widener.numel,), math.nan, dtype=old.dtype)
    if state is None:
        widener.weight(old, out)
    else:
        widener.state(state, old, out)
    return out.view(widener.after)


@given(cases((COPY_COPY, ZERO_COPY)), st.sampled_from([None, "exp_avg", "exp_avg_sq"]))
@settings(max_examples=150)
def test_parts_grow_as_tensors_of_their_own(case: Case, state: str | None) -> None:
    case = replace(case, strategy=replace(case.strategy, perturbation=0.0))  # which goes with the whole weight's RMS
    found = grown(case.plan(), "w", case.old, state)
    assert found.shape == case.shape(case.axes, case.widths | case.wide)
    pieces = case.leaves(case.old, case.widths)
    for piece, axes, part in zip(pieces, case.of_leaves, case.leaves(found, case.widths | case.wide), strict=True):
        own = case.plan(axes, tuple(piece.shape))
        torch.testing.assert_close(part, grown(own, "w", piece.contiguous(), state), rtol=1e-14, atol=0)


@given(cases())
@settings(max_examples=150)
def test_any_pieces_make_the_whole(case: Case) -> None:
    plan = case.plan()
    for old in (case.old, case.old.bfloat16()):
        expected = grown(plan, "w", old).flatten()
        assert bool(expected.isfinite().all())
        cuts = sorted(
            {0, 1, len(expected) // 3, len(expected) * 2 // 3 + 1, len(expected)} & {*range(len(expected) + 1)}
        )
        for start, stop in itertools.pairwise(cuts):
            piece = torch.full((stop - start,), math.nan, dtype=old.dtype)
            Widener(plan, "w").weight(old, piece, start)
            assert torch.equal(piece, expected[start:stop])


@given(cases((COPY_COPY,)))
@settings(max_examples=100)
def test_a_perturbation_sums_to_zero_over_the_twins_of_the_consumed_parts(case: Case) -> None:
    loud, plain = (replace(case, strategy=replace(case.strategy, perturbation=p)) for p in (0.5, 0.0))
    noise = grown(loud.plan(), "w", case.old) - grown(plain.plan(), "w", case.old)
    consumed = [
        at
        for at, dim in enumerate(case.axes.dims)
        if any(leaf.role is Role.FAN_IN and leaf.axis in case.wide for leaf in dim.leaves)
    ]
    if not consumed or consumed[-1] != case.place:
        assert bool(noise.any()) <= bool(consumed)
        return
    for part, leaf in zip(
        case.leaves(noise, case.widths | case.wide), case.dim.leaves * case.dim.segments, strict=True
    ):
        if leaf.role is not Role.FAN_IN or leaf.axis not in case.wide:
            assert not part.any()
            continue
        width, wide = case.widths[leaf.axis], case.wide[leaf.axis]
        sources = leaf.sources(torch.arange(wide) % width, width)
        sums = torch.zeros(leaf.size(width), *part.movedim(case.place, 0).shape[1:], dtype=torch.float64)
        sums.index_add_(0, sources, part.movedim(case.place, 0))
        assert float(sums.abs().max()) < 1e-12
        assert bool(part.any())


def expanded(block: Block) -> Tensor:
    """The birth of every element of a block."""
    row: list[int] = []
    for run in block.runs:
        row += [run.birth] * (run.stop - len(row))
    return torch.tensor(row).repeat(block.rows)


@given(cases())
@settings(max_examples=100)
def test_births_are_those_of_the_parts(case: Case) -> None:
    """After two growths, of which the second doubles what the first has grown."""
    history = {
        axis: (width, case.wide.get(axis, width), case.wide.get(axis, width) * (2 if axis in case.wide else 1))
        for axis, width in case.widths.items()
    }
    now = {axis: widths[-1] for axis, widths in history.items()}

    def births(axes: ParamAxes, shape: Shape) -> Tensor:
        blocks = birth_blocks(axes, shape, history, 0, math.prod(shape))
        return torch.cat([expanded(block) for block in blocks]).view(shape)

    found = births(case.axes, case.shape(case.axes, now))
    for part, axes in zip(case.leaves(found, now), case.of_leaves, strict=True):
        assert torch.equal(part, births(axes, tuple(part.shape)))


@given(cases())
@settings(max_examples=50)
def test_a_plan_counts_and_describes_parts(case: Case) -> None:
    plan = case.plan()
    param = plan.param("w")
    assert param.after == case.shape(case.axes, case.widths | case.wide)
    assert param.new_elements == grown(plan, "w", case.old).numel() - case.old.numel()
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert not param.grows or "x".join(map(str, param.after)) in plan_in_words(plan)


def test_latent_attention_by_hand() -> None:
    """Two heads of one key entry, which stays, and two value entries, which become three."""
    dim = Dim(parts=(Dim(fixed=1), Dim("v", Role.FAN_OUT)), segments=2)
    plan = make_plan({"w": (6,)}, {"w": ParamAxes((dim,))}, {"v": 2}, {"v": 3}, Strategy(), number=1)
    assert grown(plan, "w", torch.arange(6.0)).tolist() == [0, 1, 2, 1, 3, 4, 5, 4]
    assert "2 of (- + v (fan_out))" in plan_in_words(plan)


def test_the_power_of_a_dimension_of_parts_is_of_its_segments() -> None:
    """Attention divides by the root of all entries of a head, of which two of three double."""
    dim = Dim(parts=(Dim("n", Role.FAN_IN), Dim(fixed=1)), segments=2, power=-0.5)
    plan = make_plan({"w": (6,)}, {"w": ParamAxes((dim,))}, {"n": 2}, {"n": 4}, Strategy(), number=1)
    root = math.sqrt(5 / 3)
    expected = torch.tensor([root / 2] * 4 + [root]).repeat(2)
    torch.testing.assert_close(grown(plan, "w", torch.ones(6)), expected)
    assert "per part" in plan_in_words(plan)


def test_a_part_of_an_axis_that_does_not_grow_is_fixed_by_its_width() -> None:
    dim = Dim(parts=(Dim("q", Role.FAN_OUT, block=2), Dim("k", Role.FAN_OUT)))
    axes = {"w": ParamAxes((dim,))}
    plan = make_plan({"w": (7,)}, axes, {"q": 2, "k": 3}, {"q": 3}, Strategy(), number=1)
    assert plan.param("w").axes.dims[0].parts == (Dim("q", Role.FAN_OUT, block=2), Dim(fixed=3))
    assert grown(plan, "w", torch.arange(7.0)).tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6]
    with pytest.raises(PlanError, match=r"q \(fan_out\) \+ k \(fan_out\).*width of 'k' must be known"):
        make_plan({"w": (7,)}, axes, {"q": 2}, {"q": 3}, Strategy(), number=1)
    with pytest.raises(PlanError, match="contradicts"):
        make_plan({"w": (8,)}, axes, {"q": 2, "k": 3}, {"q": 3}, Strategy(), number=1)
