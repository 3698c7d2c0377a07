"""The function of small models of every make through a growth, and the gradients of what was there before.

Shape suffixes: B batch, T tokens, H hidden width, A query heads, G key/value heads, D entries of a head, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_sparkling.discovery.reading import read
from ds_sparkling.errors import PlanError
from ds_sparkling.growth import GrowthPlan, Widener, make_plan
from ds_sparkling.spec.axes import Dim, Norm, ParamAxes, Role
from ds_sparkling.spec.strategy import Init, NewIndex, OptimizerState, Scaling, Strategy
from unit_maps import entries, grown_units

HIDDEN, INNER, HEADS, SHARED, TOKENS = "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "vocab_size"
WIDTHS = {HIDDEN: 6, INNER: 5, HEADS: 4, SHARED: 2, TOKENS: 11}
HEAD_DIM = 4
IDS_BT = torch.randint(WIDTHS[TOKENS], (3, 7), generator=torch.Generator().manual_seed(0))
Axes = dict[str, ParamAxes]


# -- a model that can be many --------------------------------------------------------------------------------------


class ShiftedRMSNorm(nn.Module):
    """An RMSNorm whose gain is 1 + weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], 1 + self.weight, 1e-2)


class Attention(nn.Module):
    """Causal attention of query heads that share key/value heads, with biases; norms over all heads if asked."""

    def __init__(self, hidden: int, heads: int, shared: int, normed: bool) -> None:
        super().__init__()
        self.heads, self.shared = heads, shared
        self.q_proj = nn.Linear(hidden, heads * HEAD_DIM)
        self.k_proj = nn.Linear(hidden, shared * HEAD_DIM, bias=normed)  # which softmax takes out again without a norm
        self.v_proj = nn.Linear(hidden, shared * HEAD_DIM)
        self.o_proj = nn.Linear(heads * HEAD_DIM, hidden)
        self.q_norm = nn.RMSNorm(heads * HEAD_DIM, eps=1e-2) if normed else nn.Identity()
        self.k_norm = nn.RMSNorm(shared * HEAD_DIM, eps=1e-2) if normed else nn.Identity()

    def forward(self, x_BTH: Tensor) -> Tensor:
        q_BATD = self.q_norm(self.q_proj(x_BTH)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_BGTD = self.k_norm(self.k_proj(x_BTH)).unflatten(-1, (self.shared, -1)).transpose(1, 2)
        v_BGTD = self.v_proj(x_BTH).unflatten(-1, (self.shared, -1)).transpose(1, 2)
        k_BATD, v_BATD = (part.repeat_interleave(self.heads // self.shared, 1) for part in (k_BGTD, v_BGTD))
        y_BATD = F.scaled_dot_product_attention(q_BATD, k_BATD, v_BATD, is_causal=True)
        return self.o_proj(y_BATD.transpose(1, 2).flatten(2))


class Experts(nn.Module):
    """Gated experts with biases that all see every token, stored as inputs by outputs, gate and up in turns."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(3, hidden, 2 * inner))
        self.gate_up_proj_bias = nn.Parameter(torch.empty(3, 2 * inner))
        self.down_proj = nn.Parameter(torch.empty(3, inner, hidden))
        self.down_proj_bias = nn.Parameter(torch.empty(3, hidden))

    def forward(self, x_BTH: Tensor) -> Tensor:
        fused = torch.einsum("bth,ehi->beti", x_BTH, self.gate_up_proj) + self.gate_up_proj_bias[:, None]
        inner = F.silu(fused[..., ::2]) * fused[..., 1::2]
        return (torch.einsum("beti,eih->beth", inner, self.down_proj) + self.down_proj_bias[:, None]).sum(1)


class Layer(nn.Module):
    def __init__(self, widths: Mapping[str, int], norm: type[nn.Module], normed_heads: bool, experts: bool) -> None:
        super().__init__()
        hidden, inner = widths[HIDDEN], widths[INNER]
        self.before_attention, self.before_mlp = norm(hidden), norm(hidden)
        self.attention = Attention(hidden, widths[HEADS], widths[SHARED], normed_heads)
        self.louder = nn.Parameter(torch.empty(hidden))
        mlp = nn.Sequential(nn.Linear(hidden, inner), nn.GELU(), nn.Linear(inner, hidden))
        self.mlp = Experts(hidden, inner) if experts else mlp

    def forward(self, x_BTH: Tensor) -> Tensor:
        x_BTH = x_BTH + self.louder * self.attention(self.before_attention(x_BTH))
        return x_BTH + self.mlp(self.before_mlp(x_BTH))


@dataclass(frozen=True)
class Make:
    """What builds a model at any widths, in float64.

    Attributes:
        embedding, logits: powers of the hidden width that the model multiplies them by.
    """

    norm: type[nn.Module] = nn.RMSNorm
    tied: bool = False
    experts: bool = False
    normed_heads: bool = False
    embedding: float = 0.0
    logits: float = 0.0
    head_bias: bool = False

    def __call__(self, **widths: int) -> Model:
        return Model(self, {**WIDTHS, **widths}).double()


class Model(nn.Module):
    def __init__(self, make: Make, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_kv_heads=widths[SHARED])
        self.embed = nn.Embedding(widths[TOKENS], widths[HIDDEN])
        self.layers = nn.ModuleList(Layer(widths, make.norm, make.normed_heads, make.experts) for _ in range(2))
        self.norm = make.norm(widths[HIDDEN])
        self.head = nn.Linear(widths[HIDDEN], widths[TOKENS], bias=make.head_bias)
        if make.tied:
            self.head.weight = self.embed.weight
        self.times = widths[HIDDEN] ** make.embedding, widths[HIDDEN] ** make.logits

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTH = self.embed(ids_BT) * self.times[0]
        for layer in self.layers:
            x_BTH = layer(x_BTH)
        return self.head(self.norm(x_BTH)) * self.times[1]


@torch.no_grad()
def trained(make: Make) -> Model:
    """A model whose every parameter matters."""
    model, generator = make(), torch.Generator().manual_seed(1)
    for param in model.parameters():
        noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        param.copy_(0.5 * noise if param.dim() > 1 else (param.nan_to_num(0).clamp(0, 1) + 0.3 * noise))
    return model


def axes_of(make: Make, axes: tuple[str, ...]) -> Axes:
    """The first reading that says of multipliers, offsets and experts what the model does."""
    widths = {axis: WIDTHS[axis] for axis in axes}
    offset = float(make.norm is ShiftedRMSNorm)
    for found in read(make, widths).readings():
        embedding, heads = found["embed.weight"], [param for param in found.values() if param.head_gain]
        powers = {dim.power for dim in embedding.dims if dim.axis == HIDDEN} or {make.embedding}
        end = heads[0] if heads else found.get("head.weight", embedding)
        logits = {dim.power for dim in end.dims if dim.axis == HIDDEN} or {make.logits}
        expected = make.logits - make.embedding if heads else make.logits
        fused = found.get("layers.0.mlp.gate_up_proj")
        fits = fused is None or INNER not in fused.axes or (fused.dims[2].interleaved and fused.dims[2].block == 1)
        rows = found.get("layers.0.mlp.gate_up_proj_bias")
        fits &= rows is None or INNER not in rows.axes or rows.dims[1].interleaved
        turned = {name: param for name, param in found.items() if name.endswith(("up_proj", "down_proj"))}
        fits &= all(param.dims[1].role in (None, Role.FAN_IN) for param in turned.values())
        if fits and powers == {make.embedding} and logits == {expected} and {p.offset for p in heads[:1]} <= {offset}:
            return found
    raise AssertionError("no reading is right")


def planned(make: Make, after: dict[str, int], strategy: Strategy) -> GrowthPlan:
    axes = axes_of(make, tuple(after))
    shapes = {name: tuple(param.shape) for name, param in make().named_parameters()}
    return make_plan(shapes, axes, {axis: WIDTHS[axis] for axis in after}, after, strategy, number=1)


@torch.no_grad()
def grown(model: Model, make: Make, plan: GrowthPlan) -> Model:
    wide = make(**plan.grown_widths)
    old = dict(model.named_parameters())
    for name, param in wide.named_parameters():
        out = torch.full((param.numel(),), math.nan, dtype=torch.float64)
        Widener(plan, name).weight(old[name], out)
        param.copy_(out.view_as(param))
    return wide


def difference(model: Model, wide: Model) -> float:
    """Largest difference of the old tokens' logits, over the largest of them."""
    old = model(IDS_BT).detach()
    return float((wide(IDS_BT).detach()[..., : old.shape[-1]] - old).abs().max() / old.abs().max())


def keeps(make: Make, after: dict[str, int], strategy: Strategy) -> float:
    model = trained(make)
    return difference(model, grown(model, make, planned(make, after, strategy)))


# -- what keeps the function ---------------------------------------------------------------------------------------

FUNCTION = Strategy(scaling=Scaling.FUNCTION)
SAME = 1e-12


@dataclass(frozen=True)
class Growth:
    make: Make
    after: dict[str, int]
    strategy: Strategy = field(default_factory=Strategy)


LAYER, SHIFTED = Make(nn.LayerNorm), Make(ShiftedRMSNorm)
KEEPING = {
    "layer norm": Growth(LAYER, {HIDDEN: 12}),
    "layer norm 3x": Growth(LAYER, {HIDDEN: 18}, FUNCTION),
    "layer norm, tied": Growth(replace(LAYER, tied=True), {HIDDEN: 12, INNER: 10}),
    "layer norm, tied, with a head's bias": Growth(replace(LAYER, tied=True, head_bias=True), {HIDDEN: 12}),
    "inner beside layer norms": Growth(LAYER, {INNER: 7}, FUNCTION),
    "1 + w": Growth(SHIFTED, {HIDDEN: 12}),
    "1 + w, tied": Growth(replace(SHIFTED, tied=True), {HIDDEN: 12}),
    "1 + w, tied, uneven": Growth(replace(SHIFTED, tied=True), {HIDDEN: 10}, FUNCTION),
    "both heads": Growth(LAYER, {HEADS: 8, SHARED: 4}),
    "query heads": Growth(LAYER, {HEADS: 8}),
    "query heads, uneven": Growth(LAYER, {HEADS: 6}, FUNCTION),
    "both heads, uneven": Growth(LAYER, {HEADS: 9, SHARED: 3}, FUNCTION),
    "heads and width": Growth(LAYER, {HEADS: 8, SHARED: 4, HIDDEN: 12}),
    "both normed heads": Growth(Make(normed_heads=True), {HEADS: 8, SHARED: 4}),
    "normed query heads 3x": Growth(Make(normed_heads=True), {HEADS: 12}, FUNCTION),
    "experts in turns": Growth(Make(experts=True), {INNER: 10}),
    "experts in turns, uneven": Growth(Make(experts=True), {INNER: 7}, FUNCTION),
    "experts and width": Growth(Make(experts=True, tied=True), {INNER: 10, HIDDEN: 12}),
    "tokens": Growth(Make(), {TOKENS: 17}),
    "random tokens": Growth(Make(tied=True), {TOKENS: 17}, Strategy(vocabulary=NewIndex.RANDOM)),
    "tokens of a tied head with a bias": Growth(replace(LAYER, tied=True, head_bias=True), {TOKENS: 17}),
    "tokens and width": Growth(replace(LAYER, head_bias=True), {TOKENS: 17, HIDDEN: 12}),
    "tokens and width, tied": Growth(Make(tied=True), {TOKENS: 17, HIDDEN: 12}),
    "embeddings times the root": Growth(Make(embedding=0.5), {HIDDEN: 12}),
    "embeddings times the root, tied": Growth(replace(SHIFTED, tied=True, embedding=0.5), {HIDDEN: 12}),
    "logits over the width": Growth(Make(logits=-1.0), {HIDDEN: 9}, FUNCTION),
    "logits over the width, tied": Growth(replace(LAYER, tied=True, logits=-1.0), {HIDDEN: 12}),
    "both multipliers": Growth(Make(embedding=0.5, logits=-1.0), {HIDDEN: 12}),
    "both multipliers, tied": Growth(Make(tied=True, embedding=0.5, logits=-1.0), {HIDDEN: 9}, FUNCTION),
}
every_growth = pytest.mark.parametrize("growth", KEEPING.values(), ids=KEEPING)


@every_growth
def test_the_function_is_kept(growth: Growth) -> None:
    assert keeps(growth.make, growth.after, growth.strategy) < SAME


@pytest.mark.parametrize(
    ("make", "after"),
    [(LAYER, {HIDDEN: 9}), (LAYER, {INNER: 7}), (SHIFTED, {HIDDEN: 10}), (LAYER, {HEADS: 6})],
    ids=["layer norm", "inner", "1 + w", "query heads"],
)
def test_rms_scaling_at_uneven_ratios_does_not_pretend_to(make: Make, after: dict[str, int]) -> None:
    """Shows that the comparison can fail."""
    assert keeps(make, after, Strategy()) > 1e-3


@pytest.mark.parametrize(
    ("make", "after", "why"),
    [
        (LAYER, {HIDDEN: 9}, "LayerNorm takes off the mean"),
        (Make(normed_heads=True), {HEADS: 6}, "isn't only the width that a norm divides"),
        (Make(normed_heads=True), {HEADS: 9, SHARED: 3}, "isn't only the width that a norm divides"),
    ],
    ids=["layer norm", "normed query heads", "both normed heads"],
)
def test_what_can_be_kept_at_whole_ratios_alone_is_refused_at_others(
    make: Make, after: dict[str, int], why: str
) -> None:
    with pytest.raises(PlanError, match=f"'function'.*{why}.*whole ratio"):
        planned(make, after, FUNCTION)


def test_key_value_heads_alone_are_refused() -> None:
    """Query heads would have to change which of them they share."""
    axes = axes_of(LAYER, (HEADS, SHARED))
    shapes = {name: tuple(param.shape) for name, param in LAYER().named_parameters()}
    with pytest.raises(PlanError, match="num_kv_heads counts groups of num_heads"):
        make_plan(shapes, axes, {HEADS: 4, SHARED: 2}, {SHARED: 4}, Strategy(), number=1)


@pytest.mark.parametrize("name", ["1 + w, tied", "both multipliers", "query heads", "experts in turns"])
def test_every_part_of_a_reading_counts(name: str) -> None:
    """Without the offset, the powers, the groups or the turns, the same growth changes the function."""
    growth = KEEPING[name]
    model, plan = trained(growth.make), planned(growth.make, growth.after, growth.strategy)

    def plain(dim: Dim) -> Dim:
        return replace(dim, power=0.0, groups=1, interleaved=False)

    axes = {p.name: replace(p.axes, offset=0.0, dims=tuple(map(plain, p.axes.dims))) for p in plan.params}
    shapes = {param.name: param.before for param in plan.params}
    before = {axis: WIDTHS[axis] for axis in growth.after}
    naive = make_plan(shapes, axes, before, growth.after, growth.strategy, number=1)
    assert difference(model, grown(model, growth.make, naive)) > 1e-3


# -- new tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocabulary", NewIndex)
def test_more_tokens_leave_the_old_ones_logits_to_the_last_bit(tied: bool, vocabulary: NewIndex) -> None:
    make = replace(LAYER, tied=tied, head_bias=True)
    model = trained(make)
    wide = grown(model, make, planned(make, {TOKENS: 17}, Strategy(vocabulary=vocabulary)))
    old = dict(model.named_parameters())
    for name, param in wide.named_parameters():
        assert torch.equal(param[: len(old[name])], old[name])
    assert difference(model, wide) < SAME


def test_a_new_tokens_logit_is_the_mean_of_the_old_ones() -> None:
    make = replace(LAYER, head_bias=True)
    model = trained(make)
    for after in ({TOKENS: 13}, {TOKENS: 13, HIDDEN: 12}):
        wide = grown(model, make, planned(make, after, Strategy()))
        mean = model(IDS_BT).mean(-1, keepdim=True).expand(-1, -1, 2)
        torch.testing.assert_close(wide(IDS_BT)[..., 11:], mean, rtol=1e-6, atol=1e-6)


# -- zeroed units --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [{HEADS: 8, SHARED: 4}, {HEADS: 8}], ids=["both heads", "query heads"])
def test_zeroed_heads_are_not_dead(after: dict[str, int]) -> None:
    """With new queries and keys both zero neither would ever get a gradient; so new queries are copies."""
    model = trained(Make())
    plan = planned(Make(), after, Strategy(fan_out=Init.ZERO, fan_in=Init.COPY))
    wide = grown(model, Make(), plan)
    touched = {name: torch.zeros_like(param, dtype=torch.bool) for name, param in wide.named_parameters()}
    optimizer = torch.optim.SGD(wide.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        wide(IDS_BT).square().sum().backward()
        for name, param in wide.named_parameters():
            touched[name] |= param.grad != 0
        optimizer.step()
    alive = {name for name, mask in touched.items() if bool(mask.all())}
    assert {param.name for param in plan.params if param.grows} <= alive


# -- gradients of old elements -------------------------------------------------------------------------------------


def gradients(model: Model, tokens: int) -> dict[str, Tensor]:
    logits = model(IDS_BT)[..., :tokens]
    (logits * torch.arange(logits.numel(), dtype=logits.dtype).view_as(logits).cos()).sum().backward()
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def old_elements(axes: ParamAxes, shape: tuple[int, ...], after: Mapping[str, int]) -> Tensor:
    """Which elements have only old indices, by lists of units and entries."""
    mask, before = torch.ones(shape, dtype=torch.bool), WIDTHS
    for position, dim in enumerate(axes.dims):
        if dim.axis is not None and dim.axis in after:
            wide = {**before, **after}
            counts = (dim.groups, dim.groups) if isinstance(dim.groups, int) else (before[dim.groups], wide[dim.groups])
            units = grown_units(before[dim.axis], after[dim.axis], counts)
            layout = entries(after[dim.axis], dim.segments, dim.block, interleaved=dim.interleaved)
            old = torch.tensor([units[entry.unit].old for entry in layout])
            mask &= old.view(-1, *[1] * (len(shape) - position - 1))
    return mask


@every_growth
def test_rescaled_state_is_that_of_the_gradients_in_the_wide_model(growth: Growth) -> None:
    strategy = replace(growth.strategy, optimizer_state=OptimizerState.ASYMMETRIC_RESET_SCALED)
    model = trained(growth.make)
    plan = planned(growth.make, growth.after, strategy)
    tokens = WIDTHS[TOKENS]
    narrow, wide = gradients(model, tokens), gradients(grown(model, growth.make, plan), tokens)
    for param in plan.params:
        out = torch.empty(math.prod(param.after), dtype=torch.float64)
        Widener(plan, param.name).state("exp_avg", narrow[param.name], out)
        old = old_elements(param.axes, param.after, growth.after)
        error = (out.view(param.after)[old] - wide[param.name][old]).abs().max()
        assert float(error) < 1e-9 * float(wide[param.name].abs().max()), param.name


def test_a_layer_norm_is_told_from_an_rms_norm() -> None:
    assert axes_of(LAYER, (HIDDEN,))["norm.bias"].norm is Norm.LAYER
    assert axes_of(SHIFTED, (HIDDEN,))["norm.weight"].norm is Norm.RMS
