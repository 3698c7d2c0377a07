"""The proof that a growth keeps the function: sound models pass, models that scale by their own width are named."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ds_sparkling
import tiny
from ds_sparkling.discovery.build import BuildModel
from ds_sparkling.discovery.proof import Proof
from ds_sparkling.discovery.reading import probe
from ds_sparkling.errors import PlanError
from ds_sparkling.models.olmoe import OlmoeConfig, OlmoeForCausalLM
from ds_sparkling.spec.axes import Dim, ParamAxes, Role

VOCABULARY, HEADS = 23, 2


class Scaled(nn.Module):
    """An embedding that multiplies what it looks up."""

    def __init__(self, width: int, factor: float) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, width)
        self.factor = factor

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids) * self.factor


class Attention(nn.Module):
    """Bidirectional attention with heads of their own size, whose scores are multiplied by ``scale``."""

    def __init__(self, width: int, head_dim: int, scale: float) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, HEADS * head_dim, bias=False) for _ in range(3))
        self.out = nn.Linear(HEADS * head_dim, width, bias=False)
        self.scale = scale

    def forward(self, x_BTH: Tensor) -> Tensor:
        q, k, v = (part(x_BTH).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2))


class Model(nn.Module):
    """A language model with a knob wherever models are known to scale by their own width."""

    def __init__(self, width: int, *, inner_factor: float = 1, root_factor: float = 1, head: float = 1, **attn: Any):
        super().__init__()
        self.root_factor, self.head_factor = root_factor, head
        self.embedding = Scaled(width, inner_factor)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.layers = nn.ModuleList(Attention(width, **{"head_dim": 4, "scale": 0.5, **attn}) for _ in range(2))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x_BTH = self.embedding(input_ids) * self.root_factor
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x_BTH = x_BTH + layer(norm(x_BTH))
        return self.head(self.norm(x_BTH)) * self.head_factor


def prove(build_model: BuildModel, **widths: int) -> Proof:
    axes = probe(build_model, widths)
    return ds_sparkling.prove_function(build_model, axes, widths, widths)


def refusal(build_model: BuildModel, **widths: int) -> str:
    with pytest.raises(PlanError) as refused:
        prove(build_model, **widths)
    return str(refused.value)


@pytest.mark.parametrize("tied", [True, False])
def test_the_reference_model_keeps_its_function(tied: bool) -> None:
    proof = prove(tiny.Case(tied=tied).build_model, hidden_size=6, moe_intermediate_size=5)
    assert proof
    assert proof.difference is not None
    assert proof.difference < 1e-12


def test_a_sound_model_passes_and_nothing_is_drawn() -> None:
    state = torch.get_rng_state()
    assert prove(Model, width=16)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_papers_model_is_proven_on_a_small_instance() -> None:
    built: list[int] = []

    def build_model(hidden_size: int, moe_intermediate_size: int) -> nn.Module:
        model = OlmoeForCausalLM(OlmoeConfig(hidden_size=hidden_size, moe_intermediate_size=moe_intermediate_size))
        if next(model.parameters()).device.type == "cpu":
            built.append(hidden_size)
        return model

    assert prove(build_model, hidden_size=1024, moe_intermediate_size=512)
    assert built
    assert max(built) <= 128


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        (lambda w: {"inner_factor": w**0.5}, "first module to give something else is embedding (Scaled): RMS "),
        (lambda w: {"root_factor": w**0.5}, "the input of norms.0 (RMSNorm), computed since the output of embedding"),
        (lambda w: {"scale": (w / HEADS) ** -0.5}, "the input of layers.0.out (Linear), computed since the output of"),
        (lambda w: {"head": 1 / w}, "All its modules give the same, so it is in what Model does after the output of"),
    ],
    ids=["embedding", "root", "attention", "logits"],
)
def test_a_model_that_scales_by_its_own_width_is_refused_by_name(knobs: Any, named: str) -> None:
    message = refusal(lambda width: Model(width, **knobs(width)), width=16)
    assert "growing width would change the model's function" in message
    assert named in message


def test_heads_that_follow_the_hidden_size_are_refused() -> None:
    """Probing takes their rows for plain channels; a longer dot product is what it comes to."""
    message = refusal(lambda width: Model(width, head_dim=width // HEADS, scale=0.5), width=16)
    assert "layers.0.out (Linear)" in message


def test_the_axis_to_blame_is_told_from_its_companion() -> None:
    def build_model(hidden_size: int = 6, moe_intermediate_size: int = 5) -> nn.Module:
        model = tiny.Case().build_model(hidden_size=hidden_size, moe_intermediate_size=moe_intermediate_size)
        factor = moe_intermediate_size**-0.5
        model.get_submodule("layers.0.mlp").register_forward_hook(lambda _module, _args, output: output * factor)
        return model

    message = refusal(build_model, hidden_size=6, moe_intermediate_size=5)
    assert message.startswith("growing moe_intermediate_size would")
    assert "layers.0.mlp (MoE): RMS" in message


def test_wrong_axes_are_found_out() -> None:
    """Gate and up that alternate, taken for two halves: every unit is there twice, but not where it is looked for."""
    axes = {
        "0.weight": ParamAxes((Dim(), Dim("width", Role.FAN_OUT))),
        "1.up.weight": ParamAxes((Dim("inner", Role.FAN_OUT, segments=2, alive=(0,)), Dim("width", Role.FAN_IN))),
        "1.down.weight": ParamAxes((Dim("width", Role.FAN_OUT), Dim("inner", Role.FAN_IN))),
    }

    class Interleaved(nn.Module):
        def __init__(self, width: int, inner: int) -> None:
            super().__init__()
            self.up = nn.Linear(width, 2 * inner, bias=False)
            self.down = nn.Linear(inner, width, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            both = self.up(x)
            return self.down(F.silu(both[..., ::2]) * both[..., 1::2])

    def build_model(width: int, inner: int) -> nn.Module:
        return nn.Sequential(nn.Embedding(VOCABULARY, width), Interleaved(width, inner))

    widths = {"width": 8, "inner": 6}
    with pytest.raises(PlanError, match=r"growing inner .*something else is 1\.down \(Linear\)"):
        ds_sparkling.prove_function(build_model, axes, widths, widths)


def test_a_buffer_that_follows_the_width_is_what_the_wide_model_makes_it() -> None:
    """A restart builds buffers that aren't in checkpoints anew."""

    class Multiplied(nn.Module):
        def __init__(self, width: int, persistent: bool) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(VOCABULARY, width), nn.Linear(width, VOCABULARY, bias=False)
            self.register_buffer("factor", torch.tensor(width**0.5), persistent=persistent)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids) * self.factor)

    assert prove(lambda width: Multiplied(width, True), width=8)
    assert "the input of head" in refusal(lambda width: Multiplied(width, False), width=8)


# -- what can't be proven ------------------------------------------------------------------------------------------


class NeedsMore(Model):
    def forward(self, input_ids: Tensor, pictures: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input_ids) * pictures.mean()


@pytest.mark.parametrize(
    ("build_model", "reason"),
    [
        (lambda width: nn.Linear(width, 3), "Linear has no nn.Embedding to take token ids; pass inputs"),
        (NeedsMore, "NeedsMore.forward needs 'pictures', and only token ids and labels can be made up"),
    ],
)
def test_what_can_not_be_run_is_said_to_be_unproven(build_model: BuildModel, reason: str) -> None:
    proof = prove(build_model, width=16)
    assert not proof
    assert proof.difference is None
    assert proof.reason.startswith("not provable: ")
    assert reason in proof.reason


def test_given_inputs_prove_it_after_all() -> None:
    axes = probe(NeedsMore, {"width": 16})
    inputs = {"input_ids": torch.arange(8).view(2, 4), "pictures": torch.ones(3)}
    assert ds_sparkling.prove_function(NeedsMore, axes, {"width": 16}, {"width": 24}, inputs=inputs)


def test_a_model_that_is_not_deterministic_is_unproven() -> None:
    class Noisy(Model):
        def forward(self, input_ids: Tensor) -> Tensor:
            return super().forward(input_ids) + torch.rand(())

    assert re.search("logits differ between two runs", prove(Noisy, width=16).reason)
