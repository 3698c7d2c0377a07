"""Readings that shapes and names leave open are settled by what keeps the function."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_sparkling.discovery.factory import HuggingFaceFactory
from ds_sparkling.discovery.find_axes import axes_to_grow, find_axes
from ds_sparkling.errors import PlanError
from ds_sparkling.spec.axes import FIXED, Dim, Norm, ParamAxes, Role
from ds_sparkling.spec.axes_by_pattern import parse_hints
from ds_sparkling.spec.strategy import Scaling, Strategy
from families import FAMILIES

VOCABULARY, TOKENS = 40, 16


class Mlp(nn.Module):
    """A gated MLP with gate and up in one, of a layout that its name doesn't tell."""

    def __init__(self, width: int, inner: int, layout: str) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 2 * inner, bias=False)
        self.outer = nn.Linear(inner, width, bias=False)
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        both = self.inner(x)
        gate, up = both.chunk(2, -1) if self.layout == "halves" else (both[..., ::2], both[..., 1::2])
        return self.outer(nn.functional.silu(gate) * up)


class Model(nn.Module):
    """Token and learned position embeddings, one MLP, a head; it may scale by its own width."""

    def __init__(self, width: int, inner: int, layout: str, scaled: str, tied: bool) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(TOKENS, width)
        self.norm, self.mlp, self.last = nn.LayerNorm(width), Mlp(width, inner, layout), nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        self.width, self.scaled = width, scaled

    def forward(self, input_ids: Tensor) -> Tensor:
        tokens, positions = self.tokens(input_ids), self.positions(torch.arange(input_ids.shape[-1]))
        if self.scaled == "tokens":
            tokens = tokens * self.width**0.5
        x = tokens + positions
        if self.scaled == "sum":
            x = x * self.width**0.5
        x = x + self.mlp(self.norm(x))
        logits: Tensor = self.head(self.last(x))
        if self.scaled == "squares":  # of a power that nothing is ever multiplied by
            logits = logits * torch.log(torch.tensor(float(self.width)))
        return logits / self.width if self.scaled == "logits" else logits


def factory(**settings: Any) -> Any:
    chosen: dict[str, Any] = {"layout": "halves", "scaled": "", "tied": False, **settings}

    def build_model(width: int, inner: int) -> nn.Module:
        return Model(width, inner, **chosen)

    return build_model


WIDTHS = {"width": 8, "inner": 12}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scaled", ["", "tokens", "sum", "logits"])
@pytest.mark.parametrize("layout", ["halves", "turns"])
def test_layouts_and_multipliers_are_found_by_trying(layout: str, scaled: str, tied: bool) -> None:
    found = find_axes(
        factory(layout=layout, scaled=scaled, tied=tied), WIDTHS, [("width",), ("inner",), ("width", "inner")]
    )
    assert found.proof
    inner = found.axes["mlp.inner.weight"].dims[0]
    assert (inner.segments, inner.block) == ((2, 1) if layout == "halves" else (1, 2))
    powers = [found.axes[f"{name}.weight"].dims[1].power for name in ("tokens", "positions")]
    assert powers == {"tokens": [0.5, 0.0], "sum": [0.5, 0.5]}.get(scaled, [0.0, 0.0])
    if not tied:
        assert found.axes["head.weight"].dims[1].power == (-1.0 if scaled == "logits" else 0.0)
    assert found.axes["last.weight"].head_gain is tied


def test_what_no_reading_keeps_is_refused_by_name() -> None:
    with pytest.raises(PlanError, match=r"growing width would change the model's function.*Model"):
        find_axes(factory(scaled="squares"), WIDTHS, [("width",)])
    assert find_axes(factory(scaled="squares"), WIDTHS, [("inner",)]).proof


def test_a_model_that_cannot_be_run_is_read_if_it_leaves_no_doubt() -> None:
    class Bilinear(nn.Module):
        def __init__(self, width: int, factor: int) -> None:
            super().__init__()
            self.map = nn.Linear(width, factor * width)

    doubtless = find_axes(lambda width: Bilinear(width, 1), {"width": 4}, [("width",)])
    assert not doubtless.proof
    assert doubtless.axes["map.weight"].dims[1].role is Role.FAN_IN
    with pytest.raises(PlanError, match=r"map\.weight.*3 times width.*Trying it out is not provable"):
        find_axes(lambda width: Bilinear(width, 3), {"width": 4}, [("width",)])


def test_without_a_growth_nothing_is_tried() -> None:
    found = find_axes(factory(layout="turns"), WIDTHS, [])
    assert not found.proof
    assert found.axes.keys() == dict(Model(8, 12, "turns", "", False).named_parameters()).keys()


def test_only_axes_that_were_tried_count_as_known() -> None:
    """Growing the width alone doesn't tell how gate and up lie; a later growth of the inner width has to find out."""
    assert find_axes(factory(layout="turns"), WIDTHS, [("width",)]).tried == ("width",)
    assert find_axes(factory(layout="turns"), WIDTHS, [("width",), ("inner",)]).tried == ("inner", "width")
    assert find_axes(factory(layout="turns"), WIDTHS, []).tried == ()


def test_a_growth_with_scaling_function_is_tried_at_its_own_ratio() -> None:
    """The norm divides by the RMS of what isn't the width alone, which no rule sees: the MLP is as wide as it."""

    class Square(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.tokens, self.norm, self.last = nn.Embedding(VOCABULARY, width), nn.RMSNorm(width), nn.RMSNorm(width)
            self.up, self.down = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
            self.head = nn.Linear(width, VOCABULARY, bias=False)

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.tokens(input_ids)
            x = x + self.down(nn.functional.silu(self.up(self.norm(x))))
            logits: Tensor = self.head(self.last(x))
            return logits

    function = Strategy(scaling=Scaling.FUNCTION)
    assert axes_to_grow(Square, {"width": 32}, [{"width": 64}], [], function).proof
    with pytest.raises(PlanError, match="growing width would change the model's function: with scaling 'function'"):
        axes_to_grow(Square, {"width": 32}, [{"width": 48}], [], function)


# -- dimensions of parts -------------------------------------------------------------------------------------------

HEADS, SHARED = "num_attention_heads", "num_key_value_heads"
VALUES, KEYS, RANK = "v_head_dim", "qk_nope_head_dim", "kv_lora_rank"
ATTENTION = "model.layers.0.self_attn."
#: Families and axes that grow, with what trying finds of one of their weights' rows.
PARTS: tuple[tuple[str, tuple[str, ...], str, Dim], ...] = (
    ("deepseek_v3", (VALUES,), "kv_b_proj", Dim(parts=(Dim(fixed=8), Dim(VALUES, Role.FAN_OUT)), segments=4)),
    ("deepseek_v2", (RANK,), "kv_a_proj_with_mqa", Dim(parts=(Dim(RANK, Role.FAN_OUT), Dim(fixed=4)))),
    ("deepseek_v3", (KEYS,), "kv_b_proj", Dim(parts=(Dim(KEYS, Role.FAN_OUT), Dim(fixed=6)), segments=4)),
    (
        "deepseek_v3",
        (KEYS, RANK),
        "q_b_proj",  # summed over, and attention divides by the root of all that a head has
        Dim(parts=(Dim(KEYS, Role.FAN_IN), Dim(fixed=4)), segments=4, power=-0.5),
    ),
    (
        "phi3",
        (HEADS,),
        "qkv_proj",
        Dim(parts=(Dim(HEADS, Role.FAN_OUT, block=8, alive=(0,), groups=2), Dim(fixed=32))),
    ),
    (
        "phi3",
        (HEADS, SHARED),
        "qkv_proj",
        Dim(
            parts=(
                Dim(HEADS, Role.FAN_OUT, block=8, alive=(0,), groups=SHARED),
                Dim(SHARED, Role.FAN_OUT, block=8, segments=2),
            )
        ),
    ),
)


@pytest.mark.parametrize(("family", "axes", "name", "rows"), PARTS, ids=lambda value: str(value)[:40])
def test_parts_of_a_dimension_are_found_by_trying(family: str, axes: tuple[str, ...], name: str, rows: Dim) -> None:
    widths = {axis: FAMILIES[family][axis] for axis in axes}
    found = find_axes(HuggingFaceFactory(FAMILIES[family]), widths, [axes])
    assert found.proof
    assert found.axes[f"{ATTENTION}{name}.weight"].dims[0] == rows


def test_parts_fit_a_small_instance_whose_heads_are_fewer_and_ranks_smaller() -> None:
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 4}  # all else as in the 671B model
    widths = {VALUES: 128, RANK: 512}
    found = find_axes(HuggingFaceFactory(config), widths, [(VALUES,), (RANK,)])
    assert found.proof
    assert found.axes[f"{ATTENTION}kv_b_proj.weight"].dims == (
        Dim(parts=(Dim(fixed=128), Dim(VALUES, Role.FAN_OUT)), segments=128),
        Dim(RANK, Role.FAN_IN),
    )


class Attention(nn.Module):
    """Attention without positions, with a head's size of its own."""

    def __init__(self, width: int, head_dim: int, scaled: bool) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCABULARY, width), nn.Linear(width, VOCABULARY)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, 4 * head_dim) for _ in range(3))
        self.o_proj = nn.Linear(4 * head_dim, width)
        self.scale = head_dim**-0.5 if scaled else 0.3

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        q, k, v = (part(x).unflatten(-1, (4, -1)).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, scale=self.scale)
        logits: Tensor = self.head(x + self.o_proj(mixed.transpose(1, 2).flatten(2)))
        return logits


@pytest.mark.parametrize("scaled", [True, False])
def test_the_size_of_heads_grows_where_nothing_but_a_product_hangs_on_it(scaled: bool) -> None:
    found = find_axes(lambda width=8, head_dim=3: Attention(width, head_dim, scaled), {"head_dim": 3}, [("head_dim",)])
    assert found.proof
    power = -0.5 if scaled else 0.0
    assert found.axes["q_proj.weight"].dims[0] == Dim("head_dim", Role.FAN_IN, segments=4, power=power)
    assert found.axes["k_proj.bias"].dims[0].role is Role.FAN_OUT


# -- heads, heads that are embeddings, experts in lists ------------------------------------------------------------


class Body(nn.Module):
    """An embedding, one mixer on what a norm gives, a norm, and a head: a linear map, or the embedding itself."""

    def __init__(self, width: int, mixer: nn.Module, functional: bool = False) -> None:
        super().__init__()
        self.tokens, self.layers = nn.Embedding(VOCABULARY, width), nn.ModuleList([mixer])
        self.first, self.last = nn.RMSNorm(width), nn.RMSNorm(width)
        self.head = None if functional else nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        x = self.last(x + self.layers[0](self.first(x)))
        logits: Tensor = nn.functional.linear(x, self.tokens.weight) if self.head is None else self.head(x)
        return logits


class Fused(nn.Module):
    """Attention with queries, keys and values in one map."""

    def __init__(self, width: int, n_head: int) -> None:
        super().__init__()
        self.qkv, self.out, self.n_head = nn.Linear(width, 3 * width), nn.Linear(width, width), n_head

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed: Tensor = self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return mixed


def test_heads_whose_number_stays_are_refused_with_the_number_that_would_do() -> None:
    def fixed(width: int = 32, n_head: int = 4) -> nn.Module:
        return Body(width, Fused(width, n_head))

    with pytest.raises(PlanError, match=r"layers\.0\.qkv\.weight makes queries as wide as width.*n_head 4 to 8"):
        find_axes(fixed, {"width": 32}, [("width",)])
    assert find_axes(fixed, {"width": 32, "n_head": 4}, [("width", "n_head")]).proof
    assert find_axes(lambda width: Body(width, Fused(width, width // 8)), {"width": 32}, [("width",)]).proof


def test_an_embedding_that_is_called_as_the_head_has_its_factor_in_the_last_norm() -> None:
    def build_model(width: int = 32) -> nn.Module:
        return Body(width, nn.Linear(width, width), functional=True)

    found = find_axes(build_model, {"width": 32}, [("width",)])
    assert found.proof
    assert found.axes["last.weight"].head_gain
    assert not found.axes["first.weight"].head_gain


class Convolved(nn.Module):
    """A causal convolution between two maps, of each channel for itself, of groups of 8, or of all."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.conv = nn.Conv1d(width, width, 3, padding=2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.into(x).transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        mixed: Tensor = self.out(nn.functional.silu(y))
        return mixed


@pytest.mark.parametrize("share", [1, 8, 0])
def test_convolutions_that_follow_the_width_grow(share: int) -> None:
    def build_model(width: int) -> nn.Module:
        return Body(width, Convolved(width, width // share if share else 1))

    assert find_axes(build_model, {"width": 32}, [("width",)]).proof


class Experts(nn.Module):
    """Experts in lists of parameters, stored the other way round, each of a share of its own."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, 4, bias=False)
        self.up, self.down = (
            nn.ParameterList([nn.Parameter(torch.randn(shape)) for _ in range(4)])
            for shape in ((width, inner), (inner, width))
        )

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x).softmax(-1)
        experts = [nn.functional.silu(x @ up) @ down for up, down in zip(self.up, self.down, strict=True)]
        return torch.stack([share[..., None] * y for share, y in zip(shares.unbind(-1), experts, strict=True)]).sum(0)


def test_experts_in_lists_of_parameters_are_read_alike() -> None:
    def build_model(width: int = 16, inner: int = 12) -> nn.Module:
        return Body(width, Experts(width, inner))

    found = find_axes(build_model, {"width": 16, "inner": 12}, [("width",), ("inner",), ("width", "inner")])
    assert found.proof
    assert {found.axes[f"layers.0.up.{expert}"].dims for expert in range(4)} == {
        (Dim("width", Role.FAN_IN), Dim("inner", Role.FAN_OUT))
    }


# -- buffers -------------------------------------------------------------------------------------------------------


class Shifted(nn.Module):
    """An MLP with what a checkpoint holds beside its parameters: a shift of units, a choice of them, a projection."""

    shift: Tensor
    taken: Tensor
    projection: Tensor | None

    def __init__(self, width: int, inner: int, projected: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("taken", torch.arange(inner) % 2 == 0)
        self.register_buffer("fixed", torch.ones(3))
        self.register_buffer("projection", torch.randn(width, 4) if projected else None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x + self.shift)
        y = torch.where(self.taken, nn.functional.silu(y), y)
        gate: Any = 1.0 if self.projection is None else (x @ self.projection).sum(-1, keepdim=True).sigmoid()
        mixed: Tensor = self.down(y) * gate
        return mixed


def test_buffers_that_follow_a_width_hold_numbers_per_unit() -> None:
    def build_model(width: int = 16, inner: int = 12, projected: bool = False) -> nn.Module:
        return Body(width, Shifted(width, inner, projected))

    widths = {"width": 16, "inner": 12}
    found = find_axes(build_model, widths, [("width",), ("inner",)])
    assert found.proof
    assert found.axes["layers.0.shift"].dims == (Dim("width", Role.PER_UNIT),)
    assert found.axes["layers.0.taken"].dims == (Dim("inner", Role.PER_UNIT),)
    assert "layers.0.fixed" not in found.axes
    with pytest.raises(PlanError, match="growing width would change"):
        find_axes(lambda width: build_model(width, projected=True), {"width": 16}, [("width",)])
    hint = {r"layers\.\d+\.projection": ParamAxes((Dim("width", Role.FAN_IN), FIXED))}
    assert find_axes(lambda width: build_model(width, projected=True), {"width": 16}, [("width",)], hint).proof


# -- families whose widths are tied, or held against each other ----------------------------------------------------


def test_a_hidden_size_that_its_config_holds_against_state_space_heads_grows_with_them() -> None:
    config = {
        "model_type": "bamba",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attn_layer_indices": [1],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    hidden, heads = "hidden_size", "mamba_n_heads"
    found = find_axes(HuggingFaceFactory(config), {hidden: 32, heads: 8}, [(hidden, heads)])
    assert found.proof
    mamba = "model.layers.0.mamba."
    both = Dim(heads, Role.FAN_OUT, block=8, segments=2)
    assert found.axes[f"{mamba}in_proj.weight"].dims[0].parts == (both, Dim(fixed=16), Dim(heads, Role.FAN_OUT))
    assert found.axes[f"{mamba}conv1d.weight"].dims[0].parts == (Dim(heads, Role.PER_UNIT, block=8), Dim(fixed=16))
    with pytest.raises(PlanError, match=r"build_model.*failed"):
        find_axes(HuggingFaceFactory(config), {hidden: 32}, [(hidden,)])


@pytest.mark.parametrize("axis", ["hidden_size", "vocab_size"])
def test_a_bias_that_a_head_and_the_module_around_it_share_needs_no_hint(axis: str) -> None:
    transformers = pytest.importorskip("transformers")

    def build_model(hidden_size: int = 32, vocab_size: int = 64) -> nn.Module:
        config = transformers.BertConfig(
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=hidden_size // 8,
            max_position_embeddings=32,
        )
        model: nn.Module = transformers.BertForMaskedLM(config)
        return model

    assert find_axes(build_model, {axis: 32 if axis == "hidden_size" else 64}, [(axis,)]).proof


def test_embeddings_of_an_encoder_and_a_decoder_that_are_one_need_no_hint() -> None:
    transformers = pytest.importorskip("transformers")

    def build_model(d_model: int = 32, vocab_size: int = 64) -> nn.Module:
        config = transformers.T5Config(
            d_model=d_model, d_ff=48, vocab_size=vocab_size, num_layers=1, num_heads=4, d_kv=8, decoder_start_token_id=0
        )
        model: nn.Module = transformers.T5ForConditionalGeneration(config)
        return model

    ids = torch.arange(3, 19).view(2, 8)
    inputs = {"input_ids": ids, "decoder_input_ids": ids.flip(1), "use_cache": False}
    assert find_axes(
        build_model, {"d_model": 32, "vocab_size": 64}, [("d_model",), ("vocab_size",)], inputs=inputs
    ).proof


class Scaled(nn.Module):
    """An MLP that multiplies what its first map gives by the root of the width that this consumes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down, self.width = nn.Linear(width, 24), nn.Linear(24, width), width

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.down(nn.functional.silu(self.up(x) * self.width**0.5))
        return mixed


def test_multipliers_of_any_parameter_are_said_in_hints() -> None:
    def build_model(width: int = 32) -> nn.Module:
        return Body(width, Scaled(width))

    with pytest.raises(PlanError, match="growing width would change"):
        find_axes(build_model, {"width": 32}, [("width",)])
    hints = {
        ".*up.weight": {"dims": [{}, {"axis": "width", "role": "fan_in", "power": 0.5}]},
        ".*up.bias": {"dims": [{}], "powers": {"width": 0.5}},
    }
    assert find_axes(build_model, {"width": 32}, [("width",)], parse_hints(hints, "axes")).proof


def test_hints_of_what_heads_may_change_are_kept() -> None:
    """A head's multiplier and the gain before a tied one are the hint's, whatever is tried of others."""

    def build_model(width: int = 32) -> nn.Module:
        return Body(width, nn.Linear(width, width), functional=True)

    hint = {"last.weight": ParamAxes((Dim("width", Role.GAIN),), norm=Norm.RMS)}  # which lacks the head's factor
    with pytest.raises(PlanError, match="growing width would change"):
        find_axes(build_model, {"width": 32}, [("width",)], hint)
    hint = {"last.weight": ParamAxes((Dim("width", Role.GAIN),), norm=Norm.RMS, head_gain=True)}
    assert find_axes(build_model, {"width": 32}, [("width",)], hint).axes["last.weight"] == hint["last.weight"]


# -- refusals name what is in the way ------------------------------------------------------------------------------


class Layered(nn.Module):
    """A fused qkv, transposed experts and a head; something changes its function wherever it is told to."""

    def __init__(self, hidden: int = 8, inner: int = 12, wrong: str = "") -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(VOCABULARY, hidden), nn.Linear(hidden, VOCABULARY, bias=False)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.norm, self.last = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.mlp, self.wrong, self.width = Square(hidden, inner), wrong, hidden

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        q, k, v = self.qkv(x).unflatten(-1, (3, 1, -1)).permute(2, 0, 3, 1, 4)
        scale = (q.shape[-1] if self.wrong == "attention" else 1) / self.width
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2))
        x = self.last(x + self.mlp(self.norm(x)))
        if self.wrong == "tied":
            return nn.functional.linear(x, self.table.weight)
        logits: Tensor = self.head(x)
        return logits * math.log(self.width) if self.wrong == "logits" else logits


class Square(nn.Module):
    """Its parameters can be read in several ways, of which trying finds the right one."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.empty(hidden, inner)), nn.Parameter(torch.empty(inner, hidden))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.first).relu() @ self.second


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("attention", r"growing hidden would .*the input of out \(Linear\), computed since the output of qkv"),
        ("logits", r"growing hidden would .*it is in what Layered does after the output of head"),
        (
            "tied",
            r"growing hidden would .*what Layered does after the output of last.*"
            r"Layered also multiplies by table\.weight itself \(linear\).*head\.weight = table\.weight",
        ),
    ],
)
def test_a_refusal_is_that_of_the_reading_that_got_furthest(wrong: str, said: str) -> None:
    """The likeliest reading already fails in the MLP, which is laid out otherwise."""
    with pytest.raises(PlanError, match=said) as refused:
        find_axes(
            lambda hidden, inner: Layered(hidden, inner, wrong), {"hidden": 8, "inner": 12}, [("hidden", "inner")]
        )
    assert ("makes queries as wide as hidden" in str(refused.value)) is (wrong == "attention")
    assert find_axes(Layered, {"hidden": 8, "inner": 12}, [("inner",)]).proof


def test_an_axis_that_counts_experts_is_refused_as_such() -> None:
    for kind, shown in ((Stacked, "up stacks them"), (Listed, r"makes experts\.4")):
        with pytest.raises(PlanError, match=rf"experts counts experts .*{shown}.*the number of experts stays"):
            find_axes(kind, {"experts": 4}, [("experts",)])


class Stacked(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.table, self.router = nn.Embedding(VOCABULARY, 8), nn.Linear(8, experts)
        self.up = nn.Parameter(torch.empty(experts, 8, 8))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return torch.einsum("bth,eoh,bte->bto", x, self.up, self.router(x).softmax(-1))


class Listed(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.table, self.router = nn.Embedding(VOCABULARY, 8), nn.Linear(8, experts)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(experts))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        weights = self.router(x).softmax(-1).unbind(-1)
        total: Tensor = sum(w[..., None] * expert(x) for w, expert in zip(weights, self.experts, strict=True))
        return total
