"""More layers: what they come from, and that they can start by adding nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_sparkling.discovery.build import BuildModel, check_wide
from ds_sparkling.discovery.deeper import layer_growths, layer_outputs, prove_layers
from ds_sparkling.discovery.factory import HuggingFaceFactory
from ds_sparkling.discovery.find_axes import axes_to_grow
from ds_sparkling.errors import PlanError
from ds_sparkling.spec.axes import ParamAxes
from ds_sparkling.spec.strategy import LayerContent, Layers, Strategy
from families import FAMILIES

#: What a layer of a family writes to the residual stream, and in which list it is.
OUTPUTS = {
    "llama": ("model.layers", {"self_attn.o_proj.weight", "mlp.down_proj.weight"}),
    "gpt2": ("transformer.h", {"attn.c_proj.weight", "attn.c_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"}),
    "mixtral": ("model.layers", {"self_attn.o_proj.weight", "mlp.experts.down_proj"}),
    # Norms come after attention and MLP, so their gains are the last that is used.
    "olmo2": ("model.layers", {"post_attention_layernorm.weight", "post_feedforward_layernorm.weight"}),
    "cohere": ("model.layers", {"self_attn.o_proj.weight", "mlp.down_proj.weight"}),
}


def outputs(build_model: BuildModel, axis: str = "num_hidden_layers") -> tuple[set[str], dict[str, ParamAxes], Any]:
    widths, after = {axis: 2}, {axis: 4}
    layers = layer_growths(build_model, widths, after, Strategy())
    axes = axes_to_grow(build_model, widths, [after], [], Strategy()).axes
    axes = layer_outputs(build_model, axes, widths, layers)
    (path,) = {growth.path for growth in layers}
    marked = {name for name, found in axes.items() if found.layer_output}
    return {name.removeprefix(f"{path}.").partition(".")[2] for name in marked}, axes, layers


@pytest.mark.parametrize("family", sorted(OUTPUTS))
def test_new_layers_of_a_family_add_nothing(family: str) -> None:
    build_model = HuggingFaceFactory({"model_type": family, **FAMILIES[family]})
    found, axes, layers = outputs(build_model)
    path, expected = OUTPUTS[family]
    assert (found, layers[0].path, layers[0].sources) == (expected, path, (0, 1, 0, 1))
    proof = prove_layers(build_model, axes, {"num_hidden_layers": 2}, layers)
    assert proof
    assert proof.difference == 0.0


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.norm = nn.LayerNorm(8)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "post":
            return self.norm(x + self.down(self.up(x).relu()))
        if self.kind == "plain":
            return self.down(self.up(self.norm(x)).relu())
        return x + self.down(self.up(self.norm(x)).relu())


class Stack(nn.Module):
    def __init__(self, depth: int, kind: str, head: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        if kind == "sequential":
            self.blocks: nn.Module = nn.Sequential(*(Block("pre") for _ in range(depth)))
        else:
            self.blocks = nn.ModuleList(Block("post" if kind == "skipped" else kind) for _ in range(depth))
        if kind == "shared":
            for block in self.blocks.children():
                block.down = self.blocks[0].down
        if head:
            self.blocks[0].extra = nn.Parameter(torch.ones(head))
        self.kind = kind

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        blocks = list(self.blocks.children())
        for block in blocks[:2] if self.kind == "skipped" else blocks:
            x = block(x)
        return x @ self.embedding.weight.T


def stack(kind: str, head: int = 0) -> BuildModel:
    def build_model(depth: int = 2) -> nn.Module:
        return Stack(depth, kind, head)

    return build_model


@pytest.mark.parametrize("kind", ["pre", "sequential"])
def test_a_model_of_ones_own(kind: str) -> None:
    found, axes, layers = outputs(stack(kind), "depth")
    assert found == {"down.weight", "down.bias"}
    assert layers[0].path == "blocks"
    assert prove_layers(stack(kind), axes, {"depth": 2}, layers).difference == 0.0


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("post", "new layers change what passes through them even if all of their parameters are zero"),
        ("plain", "new layers change what passes through them even if all of their parameters are zero"),
        ("skipped", "new layers have no part in what the model gives"),
    ],
)
def test_layers_that_cannot_be_silent_are_refused(kind: str, message: str) -> None:
    with pytest.raises(PlanError, match=f"depth: {message}"):
        outputs(stack(kind), "depth")


def test_a_layer_of_another_kind_is_no_source() -> None:
    with pytest.raises(
        PlanError, match="depth: layer 2 of blocks would come from layer 0, and build_model makes it of"
    ):
        layer_growths(stack("pre", head=3), {"depth": 2}, {"depth": 4}, Strategy())
    fitting = Strategy(layers=Layers(sources=(0, 1, 1, 1), content=LayerContent.COPY))
    assert layer_growths(stack("pre", head=3), {"depth": 2}, {"depth": 4}, fitting)[0].new == (False, False, True, True)


def test_a_tensor_that_layers_share_is_refused_before_anything_is_touched() -> None:
    build_model, axes = stack("shared"), axes_to_grow(stack("shared"), {"depth": 2}, [], [], Strategy()).axes
    layers = layer_growths(build_model, {"depth": 2}, {"depth": 4}, Strategy())
    with pytest.raises(PlanError, match=r"blocks\.2\.down\.weight would come from blocks\.0\.down\.weight, but"):
        check_wide(build_model, axes, {"depth": 2}, {"depth": 4}, layers)


def test_lists_of_a_config_that_have_an_entry_per_layer_are_repeated() -> None:
    types = ["sliding_attention", "full_attention"]
    config = {"model_type": "gemma2", **FAMILIES["gemma2"], "layer_types": types}
    build_model = HuggingFaceFactory(config)
    assert build_model(num_hidden_layers=5).config.layer_types == [*types, *types, types[0]]
    assert build_model.widened({"num_hidden_layers": 4})["layer_types"] == types * 2
