"""Every model family that is known: what its parameters may be, on tiny models, and DeepSeek-V3 at its own size."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from ds_sparkling.discovery.build import base_widths, build_on_meta
from ds_sparkling.discovery.factory import HuggingFaceFactory
from ds_sparkling.discovery.reading import Reading, read
from ds_sparkling.errors import PlanError
from ds_sparkling.spec.axes import Dim, Norm, ParamAxes, Role
from families import FAMILIES

HIDDEN, HEADS, SHARED = "hidden_size", "num_attention_heads", "num_key_value_heads"
#: What grows, by a short name; families of whom a config has only some of these grow those.
GROWING = {
    "hidden": (HIDDEN,),
    "experts": ("moe_intermediate_size",),
    "inner": ("intermediate_size",),
    "shared expert": ("shared_expert_intermediate_size",),
    "heads": (HEADS, SHARED),
    "query heads": (HEADS,),
    "tokens": ("vocab_size",),
    "all": (HIDDEN, HEADS, SHARED, "intermediate_size", "vocab_size"),
}

#: Families whose hidden size is that of their heads, so that it grows only together with their number.
MADE_OF_HEADS = {"olmoe", "stablelm"}
#: Families that make their heads from a hidden size that stays, so that more heads change no parameter.
SPLIT = {"gpt2", "gpt_neox", "bloom", "falcon"}
REFUSED = {
    **{(family, "hidden"): "let their number grow along" for family in MADE_OF_HEADS},
    **{(family, "query heads"): r"self_attn\.k_(norm|proj)\.weight: dimension 0" for family in MADE_OF_HEADS},
    ("stablelm", "heads"): "no parameter changes",
    **{(family, growing): "no parameter changes" for family in SPLIT for growing in ("heads", "query heads")},
    ("qwen2_moe", "inner"): "no parameter changes",
    ("qwen3_next", "inner"): "no parameter changes",
}

SHARED_EXPERTS = {f"shared_experts.{name}_proj" for name in ("gate", "up", "down")}
BLOOM_MLP = {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}
#: What nobody can be sure of without trying: the last two parts of the modules' (or parameters') names.
UNSURE = {
    **{(family, "experts"): SHARED_EXPERTS for family in ("deepseek_v2", "deepseek_v3", "ernie4_5_moe")},
    ("gpt2", "hidden"): {"attn.c_attn", "mlp.c_fc", "mlp.c_proj"},
    ("gpt_neox", "hidden"): {"attention.query_key_value"},
    ("bloom", "hidden"): {"self_attention.query_key_value"} | BLOOM_MLP,
    ("falcon", "hidden"): {"self_attention.query_key_value"} | BLOOM_MLP,
    ("phi3", "heads"): {"self_attn.qkv_proj"},
    ("phi3", "query heads"): {"self_attn.qkv_proj"},
    ("olmoe", "all"): {"self_attn.k_norm"},
    ("stablelm", "all"): {"self_attn.k_proj", "self_attn.v_proj"},
}

LAYER_NORM = {"gpt2", "phi", "cohere", "gpt_neox", "stablelm", "starcoder2", "nemotron", "bloom", "falcon"}
#: By their defaults, or by their tiny config.
TIED = {
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "cohere",
    "starcoder2",
    "ernie4_5_moe",
    "bloom",
    "falcon",
}


def widths_of(family: str, growing: str) -> dict[str, int]:
    """The widths of what grows, as far as the family has them; none if the first is missing."""
    config = build_on_meta(HuggingFaceFactory(FAMILIES[family]), {}).config
    axes = [axis for axis in GROWING[growing] if isinstance(getattr(config, axis, None), int)]
    if not axes or axes[0] != GROWING[growing][0]:
        return {}
    return base_widths(HuggingFaceFactory(FAMILIES[family]), axes, None)


def doubled(widths: dict[str, int]) -> dict[str, int]:
    return {axis: 2 * width for axis, width in widths.items()}


def parts(name: str) -> str:
    return ".".join(name.removesuffix(".weight").removesuffix(".bias").split(".")[-2:])


ONE_BY_ONE = [growing for growing in GROWING if growing != "all"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_read_or_refused_for_a_reason(family: str) -> None:
    """Whatever a parameter may be, the wide model's has the shape that this says."""
    factory, tried = HuggingFaceFactory(FAMILIES[family]), set()
    for growing in ONE_BY_ONE:
        widths = widths_of(family, growing)
        if not widths:
            continue
        tried.add(growing)
        if (family, growing) in REFUSED:
            with pytest.raises(PlanError, match=REFUSED[family, growing]):
                read(factory, widths)
            continue
        reading = read(factory, widths)
        assert {parts(name) for name in reading.uncertain} == UNSURE.get((family, growing), set()), growing
        check_shapes(factory, widths, reading)
    assert tried >= {"hidden", "heads", "query heads", "tokens"}
    assert ("experts" in tried) is ("moe_intermediate_size" in FAMILIES[family])


def check_shapes(factory: HuggingFaceFactory, widths: dict[str, int], reading: Reading) -> None:
    narrow, wide = build_on_meta(factory, widths), build_on_meta(factory, doubled(widths))
    shapes = {name: tuple(param.shape) for name, param in wide.named_parameters()}
    options = {name: kind.options for kind in reading.kinds for name in kind.names}
    moved = set()
    for name, param in narrow.named_parameters():
        for option in options[name]:
            assert option.shape(tuple(param.shape), widths) == tuple(param.shape)
            assert option.shape(tuple(param.shape), doubled(widths)) == shapes[name]
        moved |= {name} if shapes[name] != tuple(param.shape) else set()
    assert moved
    for axes in itertools.islice(reading.readings(), 3):
        assert list(axes) == list(shapes)
        assert {name for name, param_axes in axes.items() if param_axes.axes} == moved


@pytest.mark.parametrize("family", sorted(MADE_OF_HEADS))
def test_a_hidden_size_of_heads_grows_together_with_their_number(family: str) -> None:
    factory, widths = HuggingFaceFactory(FAMILIES[family]), widths_of(family, "all")
    reading = read(factory, widths)
    assert {parts(name) for name in reading.uncertain} == UNSURE[family, "all"]
    check_shapes(factory, widths, reading)
    axes = next(reading.readings())
    unsure = axes[reading.uncertain[0]].dims[0]
    assert (unsure.axis, unsure.block) == (SHARED, widths[HIDDEN] // widths[HEADS])


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_and_tied_heads_are_told(family: str) -> None:
    growing = "all" if family in MADE_OF_HEADS else "hidden"
    factory, widths = HuggingFaceFactory(FAMILIES[family]), widths_of(family, growing)
    reading = read(factory, widths)
    axes = next(reading.readings())
    gains = {name: param for name, param in axes.items() if any(dim.role is Role.GAIN for dim in param.dims)}
    assert gains
    outside = {name: param for name, param in gains.items() if not any(part.isdigit() for part in name.split("."))}
    assert {param.norm for param in outside.values()} == {Norm.LAYER if family in LAYER_NORM else Norm.RMS}
    feeding = {name for name, param in axes.items() if param.head_gain}
    assert bool(feeding) is (family in TIED)
    if feeding:  # the last norm, with its shift
        last = next(reversed(outside)).rpartition(".")[0]
        assert feeding == {name for name in outside if name.startswith(f"{last}.")}
    vocabulary = [dim for param in read(factory, widths_of(family, "tokens")).readings() for dim in _tokens(param)]
    assert vocabulary
    assert {dim.role for dim in vocabulary} == {Role.INDEX}


def _tokens(axes: dict[str, ParamAxes]) -> list[Dim]:
    return [dim for param in axes.values() for dim in param.dims if dim.axis == "vocab_size"]


# -- DeepSeek-V3 ---------------------------------------------------------------------------------------------------


def test_deepseek_v3_is_read_at_its_own_size_without_storage() -> None:
    """671 billion parameters; any storage for them would end the test."""
    factory, models = HuggingFaceFactory({"model_type": "deepseek_v3"}), []

    def build_model(**widths: int) -> nn.Module:
        models.append(factory(**widths))
        return models[-1]

    state = torch.get_rng_state()
    widths = {HIDDEN: 7168, "moe_intermediate_size": 2048}
    reading = read(build_model, widths)
    assert torch.equal(torch.get_rng_state(), state)
    assert {tensor.device.type for model in models for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    assert 670e9 < sum(param.numel() for param in models[0].parameters()) < 672e9
    assert not reading.uncertain
    axes = next(reading.readings())
    shapes = {name: tuple(param.shape) for name, param in models[0].named_parameters()}
    assert list(axes) == list(shapes)
    experts = "model.layers.60.mlp.experts."
    assert axes[f"{experts}gate_up_proj"].dims[1].segments == 2
    assert axes[f"{experts}gate_up_proj"].shape(shapes[f"{experts}gate_up_proj"], {HIDDEN: 8192}) == (256, 4096, 8192)
    assert len(reading.kinds) < 40
