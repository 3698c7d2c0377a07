"""Readings: the reference model's is sure, others come in the order of likelihood, and hints settle what they say."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ds_sparkling.discovery.reading import probe, read
from ds_sparkling.errors import ConfigError, PlanError
from ds_sparkling.models.olmoe import OlmoeConfig, OlmoeForCausalLM
from ds_sparkling.spec.axes import FIXED, Dim, Norm, ParamAxes, Role
from ds_sparkling.spec.axes_by_pattern import parse_hints

H, I = "hidden_size", "moe_intermediate_size"  # noqa: E741 - the paper's letters
A, G, V = "num_attention_heads", "num_key_value_heads", "vocab_size"
WIDTHS = {H: 8, I: 6}
HIDDEN_OUT, HIDDEN_IN = Dim(H, Role.FAN_OUT), Dim(H, Role.FAN_IN)
W = "width"


def build_olmoe(tie_word_embeddings: bool = True, **widths: int) -> OlmoeForCausalLM:
    sizes: dict[str, Any] = {
        V: 11,
        "num_hidden_layers": 2,
        A: 4,
        G: 2,
        "head_dim": 6,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        **WIDTHS,
        **widths,
    }
    return OlmoeForCausalLM(OlmoeConfig(tie_word_embeddings=tie_word_embeddings, **sizes))


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


def test_heads_of_the_reference_model_are_blocks_in_groups() -> None:
    for widths, groups in (({A: 4, G: 2}, G), ({A: 4}, 2)):
        layer = "layers.1.self_attn."
        axes = probe(build_olmoe, widths)
        assert axes[f"{layer}q_proj.weight"].dims == (
            Dim(A, Role.FAN_OUT, block=6, alive=(0,), groups=groups),
            FIXED,
        )
        assert axes[f"{layer}o_proj.weight"].dims == (FIXED, Dim(A, Role.FAN_IN, block=6, groups=groups))
        moving = (Dim(G, Role.FAN_OUT, block=6), FIXED) if G in widths else (FIXED, FIXED)
        assert axes[f"{layer}k_proj.weight"].dims == axes[f"{layer}v_proj.weight"].dims == moving


def test_heads_that_share_nothing_are_in_no_groups() -> None:
    """Nothing declares key/value heads, or as many as heads whatever their number."""

    def build_model(**widths: int) -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 2 * widths[A]))
        model.config = SimpleNamespace(num_key_value_heads=widths[A])  # type: ignore[assignment]
        return model

    assert probe(build_model, {A: 4})["0.weight"].dims[0].groups == 1
    assert probe(lambda **w: nn.Linear(3, 2 * w[A]), {A: 4})["weight"].dims[0].groups == 1


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_of_the_reference_model_is_an_index(tied: bool) -> None:
    axes = probe(lambda **widths: build_olmoe(tied, **widths), {V: 11})
    assert axes["embed_tokens.weight"].dims == (Dim(V, Role.INDEX), FIXED)
    assert {name for name, param in axes.items() if param.axes} == (
        {"embed_tokens.weight"} if tied else {"embed_tokens.weight", "lm_head.weight"}
    )
    assert not any(param.head_gain for param in axes.values())
    joint = probe(lambda **widths: build_olmoe(tied, **widths), {V: 11, H: 8})
    assert joint["embed_tokens.weight"].dims == (Dim(V, Role.INDEX), HIDDEN_OUT)
    if not tied:
        assert joint["lm_head.weight"].dims == (Dim(V, Role.INDEX), HIDDEN_IN)


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
    devices: set[str] = set()

    def build_model(**widths: int) -> nn.Module:
        model = build_olmoe(True, **widths)
        devices.update(param.device.type for param in model.parameters())
        return model

    probe(build_model, WIDTHS)
    assert devices == {"meta"}
    assert torch.equal(torch.get_rng_state(), state)
    assert next(build_olmoe().parameters()).device.type == "cpu"  # the default device is what it was


# -- the order of readings -----------------------------------------------------------------------------------------


class Holder(nn.Module):
    """A module of no known type with parameters of given shapes."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))


def two_matrices(width: int) -> nn.Module:
    """Two kinds that may be either way round, of two layers each."""
    return nn.ModuleDict(
        {f"layers_{kind}": nn.ModuleList([Holder(weight=(3, width)) for _ in range(2)]) for kind in "ab"}
    )


def test_readings_deviate_from_the_likeliest_as_little_as_they_can() -> None:
    reading = read(two_matrices, {W: 4})
    roles = [tuple(axes[f"layers_{kind}.0.weight"].dims[1].role for kind in "ab") for axes in reading.readings()]
    assert roles[0] == (Role.FAN_IN, Role.FAN_IN)
    assert set(roles[1:3]) == {(Role.FAN_IN, Role.FAN_OUT), (Role.FAN_OUT, Role.FAN_IN)}
    assert roles[3:] == [(Role.FAN_OUT, Role.FAN_OUT)]


def test_parameters_that_differ_in_numbers_alone_are_read_alike() -> None:
    reading = read(two_matrices, {W: 4})
    assert sorted(kind.names for kind in reading.kinds) == [
        ("layers_a.0.weight", "layers_a.1.weight"),
        ("layers_b.0.weight", "layers_b.1.weight"),
    ]
    assert reading.uncertain == ["layers_a.0.weight", "layers_b.0.weight"]
    for axes in reading.readings():
        assert axes["layers_a.0.weight"] == axes["layers_a.1.weight"]
        assert list(axes) == [name for name, _ in two_matrices(4).named_parameters()]


def test_layers_of_one_name_that_are_not_alike_are_read_apart() -> None:
    def build_model(width: int) -> nn.Module:
        layers = [nn.Linear(3, width), nn.Linear(width, 3), nn.Linear(3, width)]
        return nn.ModuleDict({"layers": nn.ModuleList(layers)})

    reading = read(build_model, {W: 4})
    assert ("layers.0.weight", "layers.2.weight") in [kind.names for kind in reading.kinds]
    axes = next(reading.readings())
    assert axes["layers.0.weight"].dims == axes["layers.2.weight"].dims == (Dim(W, Role.FAN_OUT), FIXED)
    assert axes["layers.1.weight"].dims == (FIXED, Dim(W, Role.FAN_IN))


def test_probing_is_the_first_reading_where_that_is_sure() -> None:
    assert probe(build_olmoe, WIDTHS) == next(read(build_olmoe, WIDTHS).readings())


# -- hints ---------------------------------------------------------------------------------------------------------


def test_a_hint_settles_what_it_matches_whole() -> None:
    hint = ParamAxes((FIXED, Dim(W, Role.FAN_OUT)))
    reading = read(two_matrices, {W: 4}, {r"layers_a\.\d+\.weight": hint})
    assert reading.uncertain == ["layers_b.0.weight"]
    for axes in reading.readings():
        assert axes["layers_a.0.weight"] == axes["layers_a.1.weight"] == hint
    assert len(list(reading.readings())) == 2


@pytest.mark.parametrize(
    ("hints", "message"),
    [
        ({"layers_b": ParamAxes((FIXED, FIXED))}, "axes.layers_b matches no parameter"),
        ({r"layers_a\.0\.weight": ParamAxes((FIXED,))}, "has 1 dims, but layers_a.0.weight is"),
        ({".*": ParamAxes((FIXED, FIXED)), "layers_a.*": ParamAxes((Dim(W, Role.FAN_OUT), FIXED))}, "which differ"),
    ],
)
def test_hints_that_fit_nothing_are_refused(hints: dict[str, ParamAxes], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        read(two_matrices, {W: 4}, hints)


def test_readings_of_many_open_kinds_are_made_one_at_a_time() -> None:
    def build_model(width: int) -> nn.Module:
        return nn.ModuleDict({f"part_{i}x": Holder(weight=(width, width)) for i in range(60)})

    assert len(list(itertools.islice(read(build_model, {W: 4}).readings(), 100))) == 100


def test_a_hint_overrides_what_a_modules_type_tells() -> None:
    hint = ParamAxes((Dim(W, Role.FAN_OUT, block=1, power=0.5), FIXED))
    assert probe(lambda width: nn.Linear(3, width), {W: 4}, {"weight": hint})["weight"] == hint


def test_a_hint_for_one_layer_leaves_the_others() -> None:
    hint = ParamAxes((FIXED, Dim(W, Role.FAN_OUT)))
    reading = read(two_matrices, {W: 4}, {r"layers_a\.1\.weight": hint})
    assert reading.uncertain == ["layers_a.0.weight", "layers_b.0.weight"]


#: What can't be told by shapes, types and names alone, with what it is in truth.
UNSURE: dict[str, tuple[Callable[[int], nn.Module], list[dict[str, Any]]]] = {
    "a matrix of no known module": (
        lambda w: Holder(weight=(5, w)),
        [{}, {"axis": W, "role": "fan_in"}],
    ),
    "blocks": (lambda w: nn.Linear(5, 2 * w, bias=False), [{"axis": W, "role": "fan_out", "block": 2}, {}]),
    "segments": (lambda w: nn.Linear(5, 3 * w, bias=False), [{"axis": W, "role": "fan_out", "segments": 3}, {}]),
    "a grouped convolution": (
        lambda w: nn.Conv1d(w, w, 3, groups=w // 2, bias=False),
        [{"axis": W, "role": "fan_out"}, {}, {}],
    ),
    "four dimensions": (lambda w: Holder(weight=(2, w, 5, 3)), [{}, {"axis": W, "role": "fan_out"}, {}, {}]),
}


@pytest.mark.parametrize("name", UNSURE)
def test_what_can_not_be_told_is_an_error_with_a_hint_that_works_once_it_is_filled_in(name: str) -> None:
    make, dims = UNSURE[name]

    def build_model(width: int) -> nn.Module:
        return nn.ModuleDict({"beside": nn.Linear(width, 3), "layers": nn.ModuleList([make(width), make(width)])})

    with pytest.raises(PlanError) as refused:
        probe(build_model, {W: 4})
    text = str(refused.value)
    assert text.startswith("layers.0.weight (")
    assert "times width" in text
    hint = json.loads(re.findall(r'"sparkling": \{"axes": (\{.*\})\}, each', text)[0])
    (pattern,) = hint
    assert [dim == "?" for dim in hint[pattern]["dims"]] == [bool(dim) for dim in dims]
    with pytest.raises(ConfigError, match=r"still has a '\?' to fill in"):
        parse_hints(hint, "sparkling.axes")
    hint[pattern]["dims"] = dims
    axes = probe(build_model, {W: 4}, parse_hints(hint, "sparkling.axes"))
    for index in range(2):
        assert axes[f"layers.{index}.weight"].to_dict()["dims"] == dims
    assert axes["beside.weight"].dims == (FIXED, Dim(W, Role.FAN_IN))


def test_reading_does_not_refuse_what_trying_can_tell() -> None:
    reading = read(lambda width: Holder(weight=(5, width)), {W: 4})
    assert len(list(reading.readings())) == 2
    assert str(reading.unknown("weight")).startswith("weight (Holder, shape (5, 4)): dimension 1 is 1 times width")


# -- tied heads ----------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, width: int, second: nn.Module | None = None, norms: int = 1, repeated: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.norms = nn.Sequential(*[nn.RMSNorm(width) for _ in range(norms)])
        self.layers = nn.ModuleList(nn.RMSNorm(width) for _ in range(repeated))
        self.head: Any = second if second is not None else nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight


def head_gains(axes: Mapping[str, ParamAxes]) -> set[str]:
    return {name for name, param_axes in axes.items() if param_axes.head_gain}


def test_the_norm_before_a_tied_head_takes_the_heads_factor() -> None:
    axes = probe(lambda width: Tied(width, repeated=2), {W: 4})
    assert head_gains(axes) == {"norms.0.weight"}
    assert "head.weight" not in axes
    assert axes["embed.weight"].dims == (FIXED, Dim(W, Role.FAN_OUT))


def test_of_several_norms_outside_the_layers_the_last_feeds_the_head_likeliest() -> None:
    """One after the embedding, as some models have it, comes second; each may also store its gain without a one."""
    reading = read(lambda width: Tied(width, norms=2, repeated=1), {W: 4})
    found = [
        (head_gains(axes), axes["norms.1.weight"].offset, axes["norms.0.weight"].offset) for axes in reading.readings()
    ]
    last, first = {"norms.1.weight"}, {"norms.0.weight"}
    assert found[:4] == [(last, 0.0, 0.0), (last, 1.0, 0.0), (first, 0.0, 0.0), (first, 0.0, 1.0)]
    assert head_gains(probe(lambda width: Tied(width, norms=2), {W: 4})) == last


def test_a_layer_norms_shift_goes_with_its_gain_and_has_no_offset() -> None:
    class Shifted(Tied):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.norms = nn.Sequential(nn.LayerNorm(width))

    first, second = itertools.islice(read(Shifted, {W: 4}).readings(), 2)
    for axes, offset in ((first, 0.0), (second, 1.0)):
        assert head_gains(axes) == {"norms.0.weight", "norms.0.bias"}
        assert (axes["norms.0.weight"].offset, axes["norms.0.bias"].offset) == (offset, 0.0)


def test_a_tied_head_needs_a_norm_before_it() -> None:
    with pytest.raises(PlanError, match=r"head\.weight is tied.*width.*none outside the repeated layers"):
        probe(lambda width: Tied(width, norms=0, repeated=1), {W: 4})


def test_other_shared_weights_are_refused() -> None:
    with pytest.raises(PlanError, match=r"head\.weight shares its weight with embed\.weight"):
        probe(lambda width: Tied(width, second=nn.EmbeddingBag(11, width)), {W: 4})


def test_weights_that_modules_of_one_kind_share_are_read_once() -> None:
    axes = probe(lambda width: Tied(width, second=nn.Embedding(11, width)), {W: 4})
    assert axes["embed.weight"].dims == (FIXED, Dim(W, Role.FAN_OUT))
    assert "head.weight" not in axes
    assert not head_gains(axes)


def test_shared_weights_that_do_not_grow_are_fine() -> None:
    def build_model(width: int) -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, width))
        model[1].weight = model[0].weight
        return model

    assert probe(build_model, {W: 4})["2.weight"].dims[0].role is Role.FAN_OUT


# -- multipliers ---------------------------------------------------------------------------------------------------


class Untied(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList([nn.Linear(width, width)])
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, 11, bias=False)


def powers(axes: Mapping[str, ParamAxes]) -> dict[str, float]:
    return {name: dim.power for name, param in axes.items() for dim in param.dims if dim.power}


def test_models_that_scale_by_their_width_are_read_after_those_that_do_not() -> None:
    found = [powers(axes) for axes in read(Untied, {W: 4}).readings()]
    assert found[0] == {}
    single = [power for power in found if len(power) == 1]
    assert found[1 : 1 + len(single)] == single
    assert {"embed.weight": 0.5} in single
    assert {"head.weight": -1.0} in single
    assert {"embed.weight": 0.5, "head.weight": -1.0} in found[1 + len(single) :]
    assert len(found) == len({tuple(sorted(power.items())) for power in found}) == 25


def test_a_tied_heads_multiplier_goes_into_the_gain_against_the_embeddings() -> None:
    """The weight's own correction for the embedding's multiplier is taken back before the logits."""
    found = [powers(axes) for axes in read(Tied, {W: 4}).readings()]
    assert found[0] == {}
    assert {"embed.weight": 0.5, "norms.0.weight": -0.5} in found
    assert {"norms.0.weight": -1.0} in found
    assert {"embed.weight": 0.5, "norms.0.weight": -1.5} in found
    assert {"embed.weight": 0.5} in found  # both multiplied by the root


def test_a_model_without_embeddings_has_no_multipliers() -> None:
    assert len(list(read(lambda width: nn.Linear(width, 3), {W: 4}).readings())) == 1
