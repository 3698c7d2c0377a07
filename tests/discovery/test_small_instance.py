"""Small instances: proportions, kinds of layers and inputs survive, whatever the architecture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import ds_sparkling
from ds_sparkling.discovery.comparison import Runnable, first_runnable
from ds_sparkling.discovery.factory import HuggingFaceFactory
from ds_sparkling.discovery.reading import probe
from ds_sparkling.discovery.small_config import fewer_experts, narrower, resolved
from ds_sparkling.discovery.small_instance import SMALL, instances, layer_kinds
from ds_sparkling.errors import PlanError
from ds_sparkling.models.olmoe import OlmoeConfig, OlmoeForCausalLM

H = "hidden_size"

#: name -> (what its default config lacks, its experts' or MLP's width, layers kept)
FAMILIES: dict[str, tuple[dict[str, Any], str | None, int]] = {
    "qwen3_moe": ({}, "moe_intermediate_size", 2),
    "qwen2_moe": ({"decoder_sparse_step": 3}, "moe_intermediate_size", 3),
    "mixtral": ({}, "intermediate_size", 2),
    "deepseek_v2": ({"num_experts_per_tok": 6, "moe_intermediate_size": 1408}, "moe_intermediate_size", 2),
    "deepseek_v3": ({}, "moe_intermediate_size", 4),
    "gpt_oss": ({}, "intermediate_size", 2),
    "glm4_moe": ({}, "moe_intermediate_size", 2),
    "llama": ({}, "intermediate_size", 2),
    "qwen3": ({}, "intermediate_size", 2),
    "gemma": ({}, "intermediate_size", 2),
    "gemma2": ({}, "intermediate_size", 2),
    "gemma3_text": ({}, "intermediate_size", 6),
    "gpt2": ({}, None, 2),
    "phi": ({}, "intermediate_size", 2),
    "olmo2": ({}, "intermediate_size", 2),
    "granite": ({}, "intermediate_size", 2),
}


def runnable(config: dict[str, Any], before: dict[str, int]) -> Runnable:
    """The small instance of a Hugging Face model whose axes double."""
    small = instances(HuggingFaceFactory(config), before, {axis: 2 * width for axis, width in before.items()})
    return first_runnable(small, None, torch.float64, seed=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_small_with_a_layer_of_each_kind(family: str) -> None:
    extra, inner, layers = FAMILIES[family]
    config = {"model_type": family, **extra}
    full = HuggingFaceFactory(config)
    settings = resolved(config)
    before = {H: settings.get(H, 768)} | ({inner: settings[inner]} if inner else {})
    found = runnable(config, before)
    assert sum(param.numel() for param in found.model.parameters()) <= SMALL
    assert [count for count, _ in layer_kinds(found.model).values()] == [layers]
    assert found.dtype is torch.float64
    if inner:  # the same proportions, as far as both divide by two
        small = found.instance.before
        assert small[H] * before[inner] == small[inner] * before[H]
    assert found.instance.after == {axis: 2 * width for axis, width in found.instance.before.items()}
    with torch.device("meta"):
        names = {name for name, _ in full(**before).named_parameters()}
    assert {name for name, _ in found.model.named_parameters()} <= names


def test_olmoe_runs_small_along_its_inner_width() -> None:
    """Its query norm spans all heads, so that the hidden size can't be had apart from them."""
    found = runnable({"model_type": "olmoe"}, {"intermediate_size": 1024})
    assert sum(param.numel() for param in found.model.parameters()) <= SMALL


@pytest.mark.parametrize(
    ("config", "experts"),
    [
        ({"num_experts": 128, "num_experts_per_tok": 8}, 16),
        ({"num_local_experts": 8, "num_experts_per_tok": 2}, 4),
        ({"num_experts": 4, "num_experts_per_tok": 3}, 4),
        ({"n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4}, 16),
        ({"n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 2}, 32),
        ({"n_routed_experts": 64, "num_experts_per_tok": 6, "n_group": None, "topk_group": None}, 12),
    ],
)
def test_enough_experts_remain_to_choose_from(config: dict[str, Any], experts: int) -> None:
    key = next(name for name in ("num_experts", "num_local_experts", "n_routed_experts") if name in config)
    assert fewer_experts(config)[key] == experts


def test_widths_that_are_no_axes_are_divided_too() -> None:
    config = resolved({"model_type": "qwen3_moe"})
    made = narrower(config, 16, [H])
    assert made[H] == config[H]
    assert made["moe_intermediate_size"] * 16 == config["moe_intermediate_size"]
    assert made["vocab_size"] == config["vocab_size"]


HEADS, GROUPS = "num_attention_heads", "num_key_value_heads"


@pytest.mark.parametrize("axes", [(H,), (HEADS,), (HEADS, GROUPS)], ids="-".join)
def test_heads_keep_their_ratio_whether_they_are_axes_or_not(axes: tuple[str, ...]) -> None:
    config = {"model_type": "qwen3_moe", H: 2048, HEADS: 32, GROUPS: 4, "head_dim": 128}
    settings = runnable(config, {axis: int(str(config[axis])) for axis in axes}).model.get_submodule("").config
    assert (settings.num_attention_heads, settings.num_key_value_heads) == (16, 2)  # type: ignore[union-attr]


def test_heads_that_follow_others_still_do() -> None:
    """Llama has a key/value head per head, where its config doesn't say otherwise."""
    factory = HuggingFaceFactory({"model_type": "llama"})
    assert ds_sparkling.prove_function(factory, probe(factory, {HEADS: 32}), {HEADS: 32}, {HEADS: 64})


def test_a_vocabulary_of_an_odd_size_is_made_small() -> None:
    found = runnable({"model_type": "gpt2"}, {"vocab_size": 50257})
    assert 128 <= found.instance.before["vocab_size"] < 50257


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text"])
def test_a_family_that_scales_its_embedding_by_its_width_is_refused(family: str) -> None:
    """Unless the axes take the factor out again, which those given here don't."""
    factory = HuggingFaceFactory({"model_type": family})
    width = resolved({"model_type": family})[H]
    axes = {
        name: replace(found, dims=tuple(replace(dim, power=0.0) for dim in found.dims))
        for name, found in probe(factory, {H: width}).items()
    }
    with pytest.raises(PlanError, match=r"something else is model\.embed_tokens \(Gemma.*WordEmbedding\)"):
        ds_sparkling.prove_function(factory, axes, {H: width}, {H: width})


class Uneven(nn.Module):
    """Many layers, the third of another kind than the first two."""

    def __init__(self, width: int, layers: int = 8) -> None:
        super().__init__()
        self.table = nn.Embedding(64, width)
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=index == 2) for index in range(layers))
        self.head = nn.Linear(width, 64, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def test_a_model_small_enough_is_left_as_it_is() -> None:
    (only,) = instances(Uneven, {"width": 64}, {"width": 128})
    assert only.note == ""
    assert only.layers == ()
    assert only.build_model is Uneven


def test_a_large_model_is_cut_after_the_last_new_kind_of_layer() -> None:
    first = next(instances(Uneven, {"width": 4096}, {"width": 6144}))
    assert first.layers == (("layers", 3),)
    assert (first.before, first.after) == ({"width": 1024}, {"width": 1536})
    assert first.note == "3 of 8 modules of layers, width 1024"
    assert len(first.build().get_submodule("layers")) == 3  # type: ignore[arg-type]
    assert first.build(wide=True).get_submodule("head").weight.shape == (64, 1536)


class Indexed(Uneven):
    """A model that counts on all its layers."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) + self.get_parameter("layers.7.weight").sum()


def test_a_model_that_needs_all_its_layers_keeps_them() -> None:
    found = first_runnable(instances(Indexed, {"width": 4096}, {"width": 8192}), None, torch.float64, seed=0)
    assert found.instance.layers == ()
    assert len(found.model.get_submodule("layers")) == 8  # type: ignore[arg-type]


def test_widths_that_do_not_divide_and_models_that_stay_large_are_refused() -> None:
    with pytest.raises(PlanError, match=r"no fewer than 50,000,000 .*check it as it is"):
        next(instances(Uneven, {"width": 8193}, {"width": 8194}))


def test_building_a_small_instance_draws_nothing() -> None:
    state = torch.get_rng_state()
    first_runnable(instances(Uneven, {"width": 4096}, {"width": 8192}), None, torch.float64, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_small_instance_is_proven_with_the_large_ones_axes() -> None:
    """Axes of the model, not of its instance, are what the plan has; the layers are under the same names."""

    def build_model(hidden_size: int = 1024, moe_intermediate_size: int = 512) -> nn.Module:
        return OlmoeForCausalLM(OlmoeConfig(hidden_size=hidden_size, moe_intermediate_size=moe_intermediate_size))

    widths = {H: 1024, "moe_intermediate_size": 512}
    axes = probe(build_model, widths)
    key = "layers.1.mlp.experts.down_proj"
    wrong = {**axes, key: axes["layers.1.mlp.experts.gate_up_proj"]}
    assert ds_sparkling.prove_function(build_model, axes, widths, widths)
    with pytest.raises(PlanError, match="down_proj"):
        ds_sparkling.prove_function(build_model, wrong, widths, widths)


def test_a_hugging_face_moe_is_proven() -> None:
    config = {"model_type": "qwen3_moe", "head_dim": 128}
    widths = {H: 2048, "moe_intermediate_size": 768}
    factory = HuggingFaceFactory(config)
    proof = ds_sparkling.prove_function(factory, probe(factory, widths), widths, widths)
    assert proof
    assert proof.difference is not None
    assert proof.difference < 2e-6
