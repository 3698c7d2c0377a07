"""Probing: the reference model's axes are right, and whatever can't be told is an error that names the parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ds_sparkling.axes import FIXED, Dim, Norm, ParamAxes, Role
from ds_sparkling.errors import PlanError
from ds_sparkling.models.olmoe import OlmoeConfig, OlmoeForCausalLM
from ds_sparkling.probe import base_widths, build_on_meta, probe

H, I = "hidden_size", "moe_intermediate_size"  # noqa: E741 - the paper's letters
WIDTHS = {H: 8, I: 6}
HIDDEN_OUT, HIDDEN_IN = Dim(H, Role.FAN_OUT), Dim(H, Role.FAN_IN)


def build_olmoe(tie_word_embeddings: bool = True, **widths: int) -> OlmoeForCausalLM:
    sizes: dict[str, Any] = {**WIDTHS, **widths}
    config = OlmoeConfig(
        vocab_size=11,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        num_experts=4,
        num_experts_per_tok=2,
        tie_word_embeddings=tie_word_embeddings,
        **sizes,
    )
    return OlmoeForCausalLM(config)


# -- the reference model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_every_dimension_of_the_reference_model(tied: bool) -> None:
    axes = probe(lambda **widths: build_olmoe(tied, **widths), WIDTHS)
    layer = {
        "input_layernorm.weight": ParamAxes((Dim(H, Role.GAIN),), norm=Norm.RMS),
        "self_attn.q_proj.weight": ParamAxes((FIXED, HIDDEN_IN)),
        "self_attn.k_proj.weight": ParamAxes((FIXED, HIDDEN_IN)),
        "self_attn.v_proj.weight": ParamAxes((FIXED, HIDDEN_IN)),
        "self_attn.o_proj.weight": ParamAxes((HIDDEN_OUT, FIXED)),
        "self_attn.q_norm.weight": ParamAxes((FIXED,)),
        "self_attn.k_norm.weight": ParamAxes((FIXED,)),
        "post_attention_layernorm.weight": ParamAxes((Dim(H, Role.GAIN),), norm=Norm.RMS),
        "mlp.gate.weight": ParamAxes((FIXED, HIDDEN_IN)),
        "mlp.experts.gate_up_proj": ParamAxes(
            (FIXED, Dim(I, Role.FAN_OUT, segments=2, alive=(0,)), HIDDEN_IN), stacked_experts=True
        ),
        "mlp.experts.down_proj": ParamAxes((FIXED, HIDDEN_OUT, Dim(I, Role.FAN_IN)), stacked_experts=True),
    }
    expected = {
        "embed_tokens.weight": ParamAxes((FIXED, HIDDEN_OUT)),
        **{f"layers.{index}.{name}": value for index in range(2) for name, value in layer.items()},
        "norm.weight": ParamAxes((Dim(H, Role.GAIN),), norm=Norm.RMS, head_gain=tied),
    }
    if not tied:
        expected["lm_head.weight"] = ParamAxes((FIXED, HIDDEN_IN))
    assert axes == expected
    assert list(axes) == [name for name, _ in build_olmoe(tied).named_parameters()]


def test_an_axis_that_is_not_asked_for_stays_fixed() -> None:
    axes = probe(build_olmoe, {I: 6})
    moved = {name for name, param_axes in axes.items() if param_axes.axes}
    assert moved == {f"layers.{i}.mlp.experts.{name}" for i in range(2) for name in ("gate_up_proj", "down_proj")}
    assert not axes["norm.weight"].head_gain  # the tied embedding doesn't grow


def test_axes_of_equal_width_are_told_apart() -> None:
    """A table of sizes would take one for the other; and 2 x inner equals hidden here as well."""
    for widths in ({H: 8, I: 8}, {H: 8, I: 4}):
        axes = probe(lambda **w: build_olmoe(**w), widths)
        assert axes["layers.0.mlp.experts.gate_up_proj"].dims[1:] == (
            Dim(I, Role.FAN_OUT, segments=2, alive=(0,)),
            HIDDEN_IN,
        )
        assert axes["layers.0.mlp.experts.down_proj"].dims[1:] == (HIDDEN_OUT, Dim(I, Role.FAN_IN))


def test_probing_allocates_nothing_and_draws_nothing() -> None:
    state = torch.get_rng_state()
    probe(build_olmoe, WIDTHS)
    model = build_on_meta(build_olmoe, WIDTHS)
    assert {param.device.type for param in model.parameters()} == {"meta"}
    assert torch.equal(torch.get_rng_state(), state)
    assert next(build_olmoe().parameters()).device.type == "cpu"  # the default device is what it was


# -- other modules -------------------------------------------------------------------------------------------------


def one_module(make: Callable[[int], nn.Module], name: str = "part") -> Callable[..., nn.Module]:
    """A build_model with the axis ``width`` and a linear map beside the module in question."""

    def build_model(width: int) -> nn.Module:
        model = nn.Module()
        model.add_module("beside", nn.Linear(width, 3))
        model.add_module(name, make(width))
        return model

    return build_model


class Holder(nn.Module):
    """A module of no known type with one parameter."""

    def __init__(self, *shape: int, name: str = "weight") -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.empty(*shape)))


class RMSNormOfOurOwn(Holder):
    pass


def probed(make: Callable[[int], nn.Module], name: str = "part") -> dict[str, ParamAxes]:
    return probe(one_module(make, name), {"width": 4})


@pytest.mark.parametrize(
    ("make", "parameter", "expected"),
    [
        (lambda w: nn.Linear(w, 5), "part.weight", (FIXED, Dim("width", Role.FAN_IN))),
        (lambda w: nn.Linear(w, 5), "part.bias", (FIXED,)),
        (lambda w: nn.Linear(5, w), "part.weight", (Dim("width", Role.FAN_OUT), FIXED)),
        (lambda w: nn.Linear(5, w), "part.bias", (Dim("width", Role.FAN_OUT),)),
        (lambda w: nn.Linear(w, w), "part.weight", (Dim("width", Role.FAN_OUT), Dim("width", Role.FAN_IN))),
        (lambda w: nn.Embedding(5, w), "part.weight", (FIXED, Dim("width", Role.FAN_OUT))),
        (lambda w: nn.RMSNorm(w), "part.weight", (Dim("width", Role.GAIN),)),
        (lambda w: RMSNormOfOurOwn(w), "part.weight", (Dim("width", Role.GAIN),)),
        (lambda w: nn.LayerNorm(w, bias=False), "part.weight", (Dim("width", Role.GAIN),)),
        (lambda w: Holder(7, w, 5), "part.weight", (FIXED, Dim("width", Role.FAN_OUT), FIXED)),
        (lambda w: Holder(7, 5, w), "part.weight", (FIXED, FIXED, Dim("width", Role.FAN_IN))),
        (lambda w: Holder(7, 5), "part.weight", (FIXED, FIXED)),
    ],
)
def test_roles_follow_the_modules_type(
    make: Callable[[int], nn.Module], parameter: str, expected: tuple[Dim, ...]
) -> None:
    assert probed(make)[parameter].dims == expected


@pytest.mark.parametrize("name", ["gate_proj", "w1"])
def test_a_gate_of_its_own_is_kept_alive(name: str) -> None:
    """As a linear map of that name, and as a parameter of stacked experts, which AutoEP makes of them."""
    assert probed(lambda w: nn.Linear(5, w), name)[f"{name}.weight"].dims[0].alive == (0,)
    assert probed(lambda w: nn.Linear(w, 5), name)[f"{name}.weight"].dims[1].alive == ()
    assert probed(lambda w: Holder(7, w, 5, name=name))[f"part.{name}"].dims[1].alive == (0,)
    for other in ("up_proj", "w3"):
        assert probed(lambda w: nn.Linear(5, w), other)[f"{other}.weight"].dims[0].alive == ()


def test_a_fused_gate_and_up_has_two_segments_of_which_the_gate_is_alive() -> None:
    expected = Dim("width", Role.FAN_OUT, segments=2, alive=(0,))
    assert probed(lambda w: nn.Linear(5, 2 * w), "gate_up_proj")["gate_up_proj.weight"].dims[0] == expected
    assert probed(lambda w: Holder(7, 2 * w, 5, name="gate_up_proj"))["part.gate_up_proj"].dims[1] == expected


# -- what can't be told --------------------------------------------------------------------------------------------


class WithBuffer(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("statistics", torch.zeros(*shape))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        pytest.param(lambda w: nn.Linear(5, 2 * w), ["part.weight", "2 times width", "gate_up_proj"], id="twice"),
        pytest.param(lambda w: nn.Linear(5, 3 * w), ["part.weight", "3 times width"], id="fused qkv"),
        pytest.param(lambda w: nn.Linear(2 * w, 5), ["part.weight", "dimension 1"], id="twice as fan-in"),
        pytest.param(lambda w: Holder(5, w), ["part.weight", "Holder", "dimension 1"], id="unknown 2-D"),
        pytest.param(lambda w: Holder(w), ["part.weight", "Holder"], id="unknown 1-D"),
        pytest.param(lambda w: Holder(w, 5, 5), ["part.weight", "dimension 0"], id="as many experts"),
        pytest.param(lambda w: Holder(2, w, 5, 5), ["part.weight", "dimension 1"], id="4-D"),
        pytest.param(lambda w: nn.LayerNorm(w), ["part.bias", "LayerNorm"], id="a norm's bias"),
        pytest.param(lambda w: nn.Embedding(w, 5), ["part.weight", "dimension 0"], id="a vocabulary"),
        pytest.param(lambda w: nn.Linear(5, w + 1), ["part.weight", "5 to 9"], id="not a multiple"),
        pytest.param(lambda w: nn.Linear(5, w * w), ["part.weight", "16 to 64"], id="a square"),
        pytest.param(lambda w: nn.Linear(5, 64 // w), ["part.weight", "16 to 8"], id="shrinks"),
        pytest.param(lambda w: WithBuffer(w), ["part.statistics", "width"], id="a moving buffer"),
    ],
)
def test_what_can_not_be_told_is_an_error_that_names_the_parameter(
    make: Callable[[int], nn.Module], named: list[str]
) -> None:
    with pytest.raises(PlanError) as refused:
        probed(make)
    for text in named:
        assert text in str(refused.value)


def test_a_fused_parameter_that_gates_nothing_known_is_refused_as_a_consumer() -> None:
    """Twice the width on the fan-in side of a gate_up_proj isn't gate and up."""
    with pytest.raises(PlanError, match=r"gate_up_proj\.weight.*dimension 1"):
        probed(lambda w: nn.Linear(2 * w, 5), "gate_up_proj")


def test_buffers_that_keep_their_shape_are_fine() -> None:
    assert probed(lambda w: WithBuffer(3))["beside.weight"].axes == {"width"}


def test_an_axis_that_moves_nothing_is_refused() -> None:
    with pytest.raises(PlanError, match="no parameter changes with 'rope_theta'"):
        probe(lambda width, rope_theta: nn.Linear(width, 3), {"width": 4, "rope_theta": 10})


def test_an_axis_that_adds_parameters_is_refused() -> None:
    def build_model(layers: int) -> nn.Module:
        return nn.Sequential(*[nn.Linear(3, 3) for _ in range(layers)])

    with pytest.raises(PlanError, match="changing layers changes which parameters"):
        probe(build_model, {"layers": 2})


def test_a_dimension_of_two_axes_is_refused() -> None:
    with pytest.raises(PlanError, match=r"weight: dimension 0 changes with both heads and head_dim"):
        probe(lambda heads, head_dim: nn.Linear(3, heads + head_dim - 1), {"heads": 1, "head_dim": 1})


def test_heads_are_refused_rather_than_guessed() -> None:
    """Rows of q are head_dim per head: blocks, which probing can't tell from segments."""
    with pytest.raises(PlanError, match=r"layers\.0\.self_attn\.q_proj\.weight.*6 times num_attention_heads"):
        probe(
            lambda **w: OlmoeForCausalLM(OlmoeConfig(vocab_size=5, num_hidden_layers=1, head_dim=6, **w)),
            {"num_attention_heads": 16},
        )


def test_a_model_that_does_not_build_is_named_with_its_widths() -> None:
    def build_model(width: int) -> nn.Module:
        if width > 4:
            raise ValueError("too wide for us")
        return nn.Linear(width, 3)

    with pytest.raises(PlanError, match=r"width.*8.*ValueError: too wide for us"):
        probe(build_model, {"width": 4})
    with pytest.raises(PlanError, match=r"depth.*TypeError"):
        build_on_meta(build_model, {"depth": 4})


# -- tied heads ----------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, width: int, second: nn.Module | None = None, norms: int = 1, repeated: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.norms = nn.Sequential(*[nn.RMSNorm(width) for _ in range(norms)])
        self.layers = nn.ModuleList(nn.RMSNorm(width) for _ in range(repeated))
        self.head: Any = second if second is not None else nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight


def test_the_norm_before_a_tied_head_takes_the_heads_factor() -> None:
    axes = probe(lambda width: Tied(width, repeated=2), {"width": 4})
    assert {name for name, param_axes in axes.items() if param_axes.head_gain} == {"norms.0.weight"}
    assert "head.weight" not in axes
    assert axes["embed.weight"].dims == (FIXED, Dim("width", Role.FAN_OUT))


@pytest.mark.parametrize("norms", [0, 2])
def test_a_tied_head_needs_exactly_one_norm_before_it(norms: int) -> None:
    with pytest.raises(PlanError, match=r"head\.weight is tied.*width.*one norm"):
        probe(lambda width: Tied(width, norms=norms, repeated=1), {"width": 4})


def test_other_shared_weights_are_refused() -> None:
    with pytest.raises(PlanError, match=r"head\.weight shares its weight with embed\.weight"):
        probe(lambda width: Tied(width, second=nn.Embedding(11, width)), {"width": 4})


def test_shared_weights_that_do_not_grow_are_fine() -> None:
    def build_model(width: int) -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, width))
        model[1].weight = model[0].weight
        return model

    assert probe(build_model, {"width": 4})["2.weight"].dims[0].role is Role.FAN_OUT


# -- where to start ------------------------------------------------------------------------------------------------


def test_starting_widths_are_the_given_ones_then_defaults_then_the_config() -> None:
    def build_model(hidden_size: int = 16, moe_intermediate_size: int | None = None) -> OlmoeForCausalLM:
        inner: dict[str, Any] = {} if moe_intermediate_size is None else {I: moe_intermediate_size}
        return build_olmoe(hidden_size=hidden_size, **inner)

    assert base_widths(build_model, [H, I], None) == {H: 16, I: 6}
    assert base_widths(build_model, [H, I], {I: 4}) == {H: 16, I: 4}
    assert base_widths(build_model, [H, I], {H: 32}) == {H: 32, I: 6}
    assert base_widths(build_model, [I], {H: 32}) == {H: 32, I: 6}


def test_given_widths_are_not_changed_and_no_model_is_built_for_them() -> None:
    def build_model(**widths: int) -> nn.Module:
        raise AssertionError("not needed")

    given = {"width": 4}
    found = base_widths(build_model, ["width"], given)
    assert found == given
    assert found is not given


def test_an_axis_without_any_width_is_refused() -> None:
    with pytest.raises(PlanError, match=r"no starting width.*'depth'.*sparkling.widths"):
        base_widths(build_olmoe, ["depth"], None)
    with pytest.raises(PlanError, match="'width'"):
        base_widths(lambda width=None: nn.Linear(width or 4, 3), ["width"], None)


def test_a_convolution_is_not_taken_for_stacked_experts() -> None:
    class Convolved(nn.Module):
        def __init__(self, hidden: int) -> None:
            super().__init__()
            self.conv = nn.Conv1d(hidden, 8, 3, bias=False)

    with pytest.raises(PlanError, match=r"conv\.weight: can't tell the role of dimension 1 in a Conv1d"):
        probe(Convolved, {"hidden": 4})
