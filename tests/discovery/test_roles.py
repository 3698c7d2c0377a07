"""What a parameter that moves may be, for every type of module that is known, and the likeliest of these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ds_sparkling.discovery.moves import Move
from ds_sparkling.discovery.reading import read
from ds_sparkling.discovery.roles import Candidates, OwnedParameter, candidates
from ds_sparkling.errors import PlanError
from ds_sparkling.spec.axes import FIXED, Dim, Norm, ParamAxes, Role

W = "width"
OUT, IN = Dim(W, Role.FAN_OUT), Dim(W, Role.FAN_IN)
GAIN, PER_UNIT, INDEX = Dim(W, Role.GAIN), Dim(W, Role.PER_UNIT), Dim(W, Role.INDEX)
Make = Callable[[int], nn.Module]


class Holder(nn.Module):
    """A module of no known type with one parameter, or several of one shape."""

    def __init__(self, *shape: int, name: str = "weight", bias: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.empty(*shape)))
        if bias is not None:
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(*bias)))


class RMSNormOfOurOwn(Holder):
    pass


class LayerNormOfOurOwn(Holder):
    pass


class TopKRouter(Holder):
    pass


def found(make: Make, parameter: str = "weight", name: str = "part", width: int = 4, axis: str = W) -> Candidates:
    """The candidates of a parameter of one module beside a linear map, in a model whose axis is ``axis``."""

    def build_model(**widths: int) -> nn.Module:
        return nn.ModuleDict({"beside": nn.Linear(widths[axis], 3), name: make(widths[axis])})

    reading = read(build_model, {axis: width})
    return next(kind for kind in reading.kinds if f"{name}.{parameter}" in kind.names)


@pytest.mark.parametrize(
    ("make", "parameter", "expected"),
    [
        (lambda w: nn.Linear(w, 5), "weight", (FIXED, IN)),
        (lambda w: nn.Linear(w, 5), "bias", (FIXED,)),
        (lambda w: nn.Linear(5, w), "weight", (OUT, FIXED)),
        (lambda w: nn.Linear(5, w), "bias", (OUT,)),
        (lambda w: nn.Linear(w, w), "weight", (OUT, IN)),
        (lambda w: Conv1D(5, w), "weight", (IN, FIXED)),
        (lambda w: Conv1D(w, 5), "weight", (FIXED, OUT)),
        (lambda w: Conv1D(w, 5), "bias", (OUT,)),
        (lambda w: nn.Embedding(5, w), "weight", (FIXED, OUT)),
        (lambda w: nn.RMSNorm(w), "weight", (GAIN,)),
        (lambda w: nn.LayerNorm(w), "weight", (GAIN,)),
        (lambda w: nn.LayerNorm(w), "bias", (GAIN,)),
        (lambda w: RMSNormOfOurOwn(w), "weight", (GAIN,)),
        (lambda w: TopKRouter(5, w), "weight", (FIXED, IN)),
        (lambda w: Holder(w), "weight", (PER_UNIT,)),
        (lambda w: Holder(w, name="bias"), "bias", (OUT,)),
        (lambda w: Holder(7, 5), "weight", (FIXED, FIXED)),
        (lambda w: Holder(7, 5, w, bias=(7, w)), "weight_bias", (FIXED, OUT)),
    ],
)
def test_the_likeliest_roles_follow_the_modules_type(make: Make, parameter: str, expected: tuple[Dim, ...]) -> None:
    candidates = found(make, parameter)
    assert candidates.certain
    assert candidates.options[0].dims == expected


@pytest.mark.parametrize(
    ("make", "options"),
    [
        pytest.param(lambda w: Holder(5, w), [(FIXED, IN), (FIXED, OUT)], id="a matrix"),
        pytest.param(lambda w: Holder(w, 5), [(OUT, FIXED), (IN, FIXED)], id="a matrix's rows"),
        pytest.param(lambda w: Holder(w, w), [(OUT, IN), (IN, OUT)], id="a square matrix"),
        pytest.param(lambda w: Holder(7, w, 5), [(FIXED, OUT, FIXED), (FIXED, IN, FIXED)], id="experts"),
        pytest.param(lambda w: Holder(7, w, w), [(FIXED, OUT, IN), (FIXED, IN, OUT)], id="experts of squares"),
    ],
)
def test_parameters_of_unknown_modules_may_be_stored_either_way_round(
    make: Make, options: list[tuple[Dim, ...]]
) -> None:
    assert [option.dims for option in found(make).options] == options


def test_routers_are_trusted_to_be_outputs_by_inputs() -> None:
    assert not found(lambda w: Holder(5, w)).certain
    assert found(lambda w: TopKRouter(5, w)).certain


class Experts(nn.Module):
    """Gated experts with gate and up in one, which declare what they are told to."""

    def __init__(self, inner: int, transposed: bool, hidden: int = 6, **declared: bool) -> None:
        super().__init__()
        up, down = ((hidden, 2 * inner), (inner, hidden)) if transposed else ((2 * inner, hidden), (hidden, inner))
        self.gate_up_proj = nn.Parameter(torch.empty(3, *up))
        self.down_proj = nn.Parameter(torch.empty(3, *down))
        self.__dict__.update(declared)


class Grouped(Holder):
    """Experts [experts, in, out], which say how many inputs and outputs they have."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(3, inputs, outputs)
        self.in_features, self.out_features = inputs, outputs


@pytest.mark.parametrize("inner", [3, 4, 6, 12])
@pytest.mark.parametrize("transposed", [False, True])
def test_shapes_of_gated_experts_tell_which_way_round_they_are(transposed: bool, inner: int) -> None:
    """Without trying, too; whatever the widths are, as the inner one has twice as many entries."""
    halves = Dim(W, Role.FAN_OUT, segments=2, alive=(0,))
    up, down = (found(lambda w: Experts(w, transposed), f"{name}_proj", width=inner) for name in ("gate_up", "down"))
    assert up.certain
    assert up.options[0].dims == ((FIXED, FIXED, halves) if transposed else (FIXED, halves, FIXED))
    assert down.certain
    assert down.options[0].dims == ((FIXED, IN, FIXED) if transposed else (FIXED, FIXED, IN))


def test_experts_are_as_their_module_declares_and_uncertain_where_nothing_tells() -> None:
    declared = found(lambda w: Experts(w, True, is_transposed=True, is_concatenated=False), "gate_up_proj")
    assert declared.certain
    assert declared.options[0].dims[2].interleaved
    grouped = found(lambda w: Grouped(5, w))
    assert grouped.certain
    assert grouped.options[0].dims == (FIXED, FIXED, OUT)
    for untold in (lambda w: Holder(7, 5, w), lambda w: Holder(7, w, 5), lambda w: Grouped(w, w)):
        assert not found(untold).certain


@pytest.mark.parametrize(
    ("make", "parameter", "stacked"),
    [
        (lambda w: Holder(7, w, 5), "weight", True),
        (lambda w: Holder(7, w, 5, bias=(7, w)), "weight_bias", True),
        (lambda w: Holder(7, w, 5, bias=(8, w)), "weight_bias", False),
        (lambda w: Holder(7, w), "weight", False),
        (lambda w: Holder(w, name="bias"), "bias", False),
        (lambda w: nn.Linear(w, 5), "weight", False),
        (lambda w: nn.Embedding(7, w), "weight", False),
    ],
)
def test_three_dimensions_and_biases_beside_them_are_stacked_experts(make: Make, parameter: str, stacked: bool) -> None:
    assert {option.stacked_experts for option in found(make, parameter).options} == {stacked}


def test_experts_that_do_not_move_are_stacked_all_the_same() -> None:
    """Ranks of an expert-parallel group hold slices of them."""
    assert found(lambda w: Holder(7, 5, 3)).options == (ParamAxes((FIXED,) * 3, stacked_experts=True),)


@pytest.mark.parametrize(
    ("make", "parameter", "norm"),
    [
        (lambda w: nn.RMSNorm(w), "weight", Norm.RMS),
        (lambda w: RMSNormOfOurOwn(w), "weight", Norm.RMS),
        (lambda w: nn.LayerNorm(w), "weight", Norm.LAYER),
        (lambda w: nn.LayerNorm(w), "bias", Norm.LAYER),
        (lambda w: LayerNormOfOurOwn(w), "weight", Norm.LAYER),
        (lambda w: nn.Linear(5, w), "bias", None),
        (lambda w: Holder(w), "weight", None),
    ],
)
def test_a_gains_norm_is_told_by_its_type(make: Make, parameter: str, norm: Norm | None) -> None:
    assert [option.norm for option in found(make, parameter).options] == [norm]


def test_an_embeddings_rows_are_looked_up_and_so_are_what_else_has_that_axis() -> None:
    """The head's rows are linear outputs by their type, but nobody's copies; nor is its bias."""

    def build_model(tokens: int) -> nn.Module:
        return nn.ModuleDict({"head": nn.Linear(3, tokens), "embed": nn.Embedding(tokens, 3)})

    axes = next(read(build_model, {"tokens": 4}).readings())
    assert axes["embed.weight"].dims == (Dim("tokens", Role.INDEX), FIXED)
    assert axes["head.weight"].dims == (Dim("tokens", Role.INDEX), FIXED)
    assert axes["head.bias"].dims == (Dim("tokens", Role.INDEX),)


# -- layouts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gate_proj", "w1"])
def test_a_gate_of_its_own_is_kept_alive(name: str) -> None:
    """As a linear map of that name, and as a parameter of stacked experts, which AutoEP makes of them."""
    assert found(lambda w: nn.Linear(5, w), name=name).options[0].dims[0].alive == (0,)
    assert found(lambda w: nn.Linear(w, 5), name=name).options[0].dims[1].alive == ()
    assert found(lambda w: Holder(7, w, 5, name=name), name).options[0].dims[1].alive == (0,)
    for other in ("up_proj", "w3"):
        assert found(lambda w: nn.Linear(5, w), name=other).options[0].dims[0].alive == ()


@pytest.mark.parametrize("name", ["q_proj", "q_b_proj", "wq", "query"])
def test_queries_are_kept_alive_as_their_products_with_keys_would_be_zero_twice(name: str) -> None:
    for parameter in ("weight", "bias"):
        assert found(lambda w: nn.Linear(5, 6 * w), parameter, name, axis="n_head").options[0].dims[0].alive == (0,)
    for other in ("k_proj", "wk", "key", "v_proj"):
        assert found(lambda w: nn.Linear(5, 6 * w), name=other, axis="n_head").options[0].dims[0].alive == ()


HALVES = Dim(W, Role.FAN_OUT, segments=2, alive=(0,))
TURNS = Dim(W, Role.FAN_OUT, segments=2, alive=(0,), interleaved=True)


@pytest.mark.parametrize("name", ["gate_up_proj", "w13"])
def test_a_fused_gate_and_up_lies_in_halves_or_in_turns(name: str) -> None:
    linear = found(lambda w: nn.Linear(5, 2 * w), name=name)
    assert [option.dims for option in linear.options] == [(HALVES, FIXED), (TURNS, FIXED)]
    assert linear.certain
    bias = found(lambda w: nn.Linear(5, 2 * w), "bias", name)
    assert [option.dims for option in bias.options] == [(HALVES,), (TURNS,)]
    experts = found(lambda w: Holder(7, 2 * w, 5, name=name, bias=(7, 2 * w)), name)
    assert [option.dims[1] for option in experts.options[:2]] == [HALVES, TURNS]
    rows = found(lambda w: Holder(7, 2 * w, 5, name=name, bias=(7, 2 * w)), f"{name}_bias")
    assert [option.dims for option in rows.options] == [(FIXED, HALVES), (FIXED, TURNS)]


def test_experts_stored_inputs_by_outputs_have_their_halves_in_the_columns() -> None:
    """By their shape alone rows are likelier, so nobody is sure: a consumer has no gate and up."""
    experts = found(lambda w: Holder(7, 5, 2 * w, name="gate_up_proj"), "gate_up_proj")
    assert not experts.certain
    assert [
        (option.dims[2].role, option.dims[2].segments, option.dims[2].interleaved) for option in experts.options
    ] == [
        (Role.FAN_IN, 1, False),
        (Role.FAN_IN, 2, False),
        (Role.FAN_OUT, 2, False),
        (Role.FAN_OUT, 2, True),
    ]


def test_several_entries_per_unit_are_blocks_or_segments() -> None:
    blocks, segments = Dim(W, Role.FAN_OUT, block=3), Dim(W, Role.FAN_OUT, segments=3)
    plain = found(lambda w: nn.Linear(5, 3 * w))
    assert not plain.certain
    assert [option.dims[0] for option in plain.options] == [blocks, segments]
    fused = found(lambda w: nn.Linear(5, 3 * w), name="c_attn")
    assert not fused.certain
    assert [option.dims[0] for option in fused.options] == [replace(segments, alive=(0,)), blocks]
    consumer = found(lambda w: nn.Linear(3 * w, 5))
    assert [option.dims[1] for option in consumer.options] == [
        Dim(W, Role.FAN_IN, block=3),
        Dim(W, Role.FAN_IN, segments=3),
    ]


@pytest.mark.parametrize("axis", ["num_attention_heads", "n_head", "num_key_value_heads", "n_kv_heads"])
def test_what_a_head_has_is_a_block(axis: str) -> None:
    for make, expected in (
        (lambda w: nn.Linear(5, 6 * w), (Dim(axis, Role.FAN_OUT, block=6), FIXED)),
        (lambda w: nn.Linear(6 * w, 5), (FIXED, Dim(axis, Role.FAN_IN, block=6))),
    ):
        candidates = found(make, axis=axis)
        assert candidates.certain
        assert [option.dims for option in candidates.options] == [expected]


OUT, INTO, EACH = (Dim("width", role) for role in (Role.FAN_OUT, Role.FAN_IN, Role.PER_UNIT))


@pytest.mark.parametrize(
    ("make", "certain", "dims"),
    [
        pytest.param(lambda w: nn.Conv1d(w, 8, 3, bias=False), True, (FIXED, INTO, FIXED), id="in"),
        pytest.param(lambda w: nn.Conv2d(8, w, 3, bias=False), True, (OUT, FIXED, FIXED, FIXED), id="out"),
        pytest.param(lambda w: nn.Conv1d(w, w, 3, bias=False), True, (OUT, INTO, FIXED), id="both"),
        pytest.param(lambda w: nn.ConvTranspose1d(w, w, 3, bias=False), True, (INTO, OUT, FIXED), id="transposed"),
        pytest.param(lambda w: nn.Conv1d(w, w, 3, groups=w, bias=False), True, (EACH, FIXED, FIXED), id="depthwise"),
        pytest.param(lambda w: nn.Conv1d(w, w, 3, groups=w // 2, bias=False), False, (OUT, FIXED, FIXED), id="groups"),
    ],
)
def test_convolutions(make: Make, certain: bool, dims: tuple[Dim, ...]) -> None:
    candidates = found(make)
    assert candidates.certain is certain
    assert [option.dims for option in candidates.options] == [dims]


def test_a_bias_of_a_depthwise_convolution_is_per_unit_and_of_another_an_output() -> None:
    for groups, expected in ((4, EACH), (1, OUT)):
        model = nn.Conv1d(4, 4, 3, groups=groups)
        bias = candidates(OwnedParameter("conv.bias", model, (4,), {0: Move((("width", 1),))}))
        assert bias.options == (ParamAxes((expected,)),)


# -- what is nothing known -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "named"),
    [
        pytest.param(lambda w: Holder(2, w, 5, 5), ["part.weight (Holder", "dimension 1"], id="4-D"),
        pytest.param(lambda w: nn.Bilinear(w, 3, 2), ["part.weight (Bilinear", "dimension 1"], id="bilinear"),
        pytest.param(lambda w: nn.PReLU(w), ["part.weight (PReLU", "dimension 0"], id="an activation's"),
    ],
)
def test_what_nothing_is_known_of_is_refused_by_name(make: Make, named: list[str]) -> None:
    with pytest.raises(PlanError) as refused:
        found(make)
    for text in named:
        assert text in str(refused.value)
