"""Trials tell readings apart that a doubling alone can't, reach what only training reaches, and make selections act."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.family_list import FAMILIES
from ds_sparkling.check.growth_report import check_growth
from ds_sparkling.discovery import patience
from ds_sparkling.discovery.build import BuildModel, base_widths
from ds_sparkling.discovery.factory import HuggingFaceFactory
from ds_sparkling.discovery.find_axes import Found, axes_to_grow, find_axes
from ds_sparkling.discovery.forward import LENGTH
from ds_sparkling.discovery.token_selection import enough_tokens, selecting
from ds_sparkling.errors import PlanError
from ds_sparkling.spec.axes import Dim, ParamAxes, Role
from ds_sparkling.spec.strategy import Scaling, Split, Strategy

VOCABULARY = 40
CONFIGS = {family.config["model_type"]: dict(family.config) for family in FAMILIES}


def found(build_model: BuildModel, growth: dict[str, int], strategy: Strategy | None = None, **more: Any) -> Found:
    widths = base_widths(build_model, growth, None)
    return axes_to_grow(build_model, widths, [growth], [], strategy or Strategy(), **more)


# -- readings that a doubling can't tell apart ---------------------------------------------------------------------


class Experts(nn.Module):
    """Experts stacked as [experts, in, out], which everything is sent through."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.empty(3, hidden, inner)), nn.Parameter(torch.empty(3, inner, hidden))
        self.router = nn.Linear(hidden, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bti,eih->bteh", torch.einsum("bth,ehi->bti", x, self.up).relu(), self.down)
        return torch.einsum("bteh,bte->bth", y, self.router(x).softmax(-1))


class Mixture(nn.Module):
    def __init__(self, hidden: int = 8, inner: int = 12) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(VOCABULARY, hidden), nn.RMSNorm(hidden)
        self.experts, self.head = Experts(hidden, inner), nn.Linear(hidden, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        logits: Tensor = self.head(x + self.experts(self.norm(x)))
        return logits


class Gated(nn.Module):
    """Transposed experts with biases, whose names tell nothing, so that every one of them may be read in many ways."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.empty(3, hidden, 2 * inner)), nn.Parameter(torch.empty(3, 2 * inner))
        self.c, self.d = nn.Parameter(torch.empty(3, inner, hidden)), nn.Parameter(torch.empty(3, hidden))
        self.router = nn.Linear(hidden, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = (torch.einsum("bth,ehi->btei", x, self.a) + self.b).chunk(2, -1)
        y = torch.einsum("btei,eih->bteh", gate.relu() * up, self.c) + self.d
        return torch.einsum("bteh,bte->bth", y, self.router(x).sigmoid())


def test_parameters_that_are_all_laid_out_in_an_unlikely_way_are_told() -> None:
    def build_model(hidden: int = 8, inner: int = 12) -> nn.Module:
        model = Mixture(hidden, inner)
        model.set_submodule("experts", Gated(hidden, inner))
        return model

    told = found(build_model, {"hidden": 16, "inner": 48})
    assert told.proof
    assert told.axes["experts.a"].dims[2].segments == 2


def test_experts_that_nothing_tells_the_orientation_of_are_refused_without_trying() -> None:
    with pytest.raises(PlanError, match=r"experts\.up .*can't be told"):
        found(Mixture, {"hidden": 16}, check=False)


class PerHead(nn.Module):
    """Attention whose weights are [hidden, heads, size of a head] and back: three dimensions, and no experts."""

    def __init__(self, hidden: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(VOCABULARY, hidden), nn.Linear(hidden, VOCABULARY, bias=False)
        self.q, self.k, self.v = (nn.Parameter(torch.empty(hidden, heads, 4)) for _ in range(3))
        self.out = nn.Parameter(torch.empty(heads, 4, hidden))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        q, k, v = (torch.einsum("bth,hnd->bntd", x, weight) for weight in (self.q, self.k, self.v))
        y = torch.einsum("bntd,ndh->bth", F.scaled_dot_product_attention(q, k, v), self.out)
        logits: Tensor = self.head(x + y)
        return logits


@pytest.mark.parametrize("growth", [{"hidden": 16}, {"heads": 4}, {"hidden": 16, "heads": 6}])
def test_weights_of_three_dimensions_need_be_no_experts(growth: dict[str, int]) -> None:
    assert found(PerHead, growth).proof


PARTING = Strategy(perturbation=1.0)
GROWTHS = [
    ({"hidden": 16, "inner": 24}, Strategy()),
    ({"hidden": 16, "inner": 48}, Strategy()),
    ({"hidden": 16, "inner": 24}, PARTING),
    ({"hidden": 16, "inner": 24}, Strategy(split=Split((1.0, 2.0)))),
    ({"hidden": 12, "inner": 18}, Strategy(scaling=Scaling.FUNCTION)),
]


@pytest.mark.parametrize(("growth", "strategy"), GROWTHS)
def test_transposed_experts_are_told_when_both_their_widths_grow(growth: dict[str, int], strategy: Strategy) -> None:
    """The likelier reading, [out, in], has the same factors when both widths double."""
    told = found(Mixture, growth, strategy)
    assert told.proof
    roles = {name: [dim.role for dim in told.axes[f"experts.{name}"].dims[1:]] for name in ("up", "down")}
    assert roles == {"up": [Role.FAN_IN, Role.FAN_OUT], "down": [Role.FAN_IN, Role.FAN_OUT]}


@pytest.mark.parametrize(
    "growth", [{"hidden_size": 64, "intermediate_size": 96}, {"hidden_size": 64, "intermediate_size": 192}]
)
def test_gpt_oss_keeps_its_function_with_both_widths(growth: dict[str, int]) -> None:
    told = found(HuggingFaceFactory(CONFIGS["gpt_oss"]), growth, PARTING)
    experts = told.axes["model.layers.0.mlp.experts.gate_up_proj"]
    assert told.proof
    assert [dim.role for dim in experts.dims[1:]] == [Role.FAN_IN, Role.FAN_OUT]
    assert experts.dims[2].interleaved


class Cut(nn.Module):
    """Attention that cuts the hidden width into heads, so that their number has to follow it; and an MLP."""

    def __init__(self, hidden: int = 8, heads: int = 2, inner: int = 12) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(VOCABULARY, hidden), nn.Linear(hidden, VOCABULARY, bias=False)
        self.q, self.k, self.v = (nn.Linear(hidden, hidden, bias=False) for _ in range(3))
        self.up, self.down, self.heads = nn.Linear(hidden, inner), nn.Linear(inner, hidden), heads

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        logits: Tensor = self.head(x + self.down(self.up(x).relu()))
        return logits


def test_axes_that_follow_one_another_grow_by_equal_ratios() -> None:
    """No parameter carries the heads, so nothing but trying tells that they go with the hidden width."""
    assert found(Cut, {"hidden": 16, "heads": 4, "inner": 24}).proof


def test_a_planned_growth_that_parts_groups_unevenly_promises_no_function() -> None:
    """Three times the heads in twice the groups is one and a half times the heads of each."""
    config = {**CONFIGS["llama"], "hidden_size": 24, "head_dim": 8}
    growth = {"num_attention_heads": 12, "num_key_value_heads": 4}
    assert found(HuggingFaceFactory(config), growth).proof
    assert "the same function" not in check_growth(HuggingFaceFactory(config), None, growth).promise.text


# -- what only training reaches ------------------------------------------------------------------------------------


class Predicting(nn.Module):
    """A head for the token after the next, of which only a loss tells; its input is two vectors end to end."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(VOCABULARY, hidden), nn.Linear(hidden, VOCABULARY, bias=False)
        self.join = nn.Linear(2 * hidden, hidden, bias=False)

    def second(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.join(torch.cat([x[:, :-1], x[:, 1:]], -1)))
        return logits


class WithLabels(Predicting):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.table(input_ids)
        logits: Tensor = self.head(x)
        if labels is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + F.cross_entropy(
            self.second(x).flatten(0, 1), labels[:, 1:].flatten()
        )


class InTraining(Predicting):
    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        x = self.table(input_ids)
        return (self.head(x), self.second(x).logsumexp(-1)) if self.training else (self.head(x),)


class Unreached(Predicting):
    def forward(self, input_ids: Tensor, rest: Tensor | None = None) -> tuple[Tensor, ...]:
        x = self.table(input_ids)
        return (self.head(x),) if rest is None else (self.head(x), self.second(x))


@pytest.mark.parametrize("model", [WithLabels, InTraining])
def test_what_the_loss_or_training_alone_depends_on_is_tried(model: type[Predicting]) -> None:
    told = found(model, {"hidden": 16})
    assert told.proof
    assert told.axes["join.weight"].dims[1].segments == 2


def test_what_nothing_depends_on_is_refused_where_there_is_a_choice() -> None:
    with pytest.raises(PlanError, match=r"join\.weight .*Trying it out doesn't tell"):
        found(Unreached, {"hidden": 16})
    report = check_growth(Unreached, None, {"hidden": 16})
    assert not report.kept
    assert "join.weight" in report.broken[-1]
    hint = ParamAxes((Dim("hidden", Role.FAN_OUT), Dim("hidden", Role.FAN_IN, segments=2)))
    assert found(Unreached, {"hidden": 16}, hints={r"join\.weight": hint}).proof
    ids = torch.arange(12).view(2, 6)
    told = found(Unreached, {"hidden": 16}, inputs={"input_ids": ids, "rest": ids})
    assert told.axes["join.weight"].dims[1].segments == 2


class Warming(Predicting):
    """Its second loss is still multiplied by 0."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__(hidden)
        self.share: Tensor
        self.register_buffer("share", torch.zeros(()), persistent=False)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.table(input_ids)
        logits: Tensor = self.head(x)
        return (
            logits if labels is None else logits.logsumexp(-1).mean() + self.share * self.second(x).logsumexp(-1).mean()
        )


class Noisy(Predicting):
    """Its second output exists only in training, where it is shaken."""

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        x = self.table(input_ids)
        return (self.head(x), self.second(x) * (1 + torch.rand(()))) if self.training else (self.head(x),)


@pytest.mark.parametrize("model", [Warming, Noisy])
def test_what_is_computed_but_not_compared_is_refused_where_there_is_a_choice(model: type[Predicting]) -> None:
    with pytest.raises(PlanError, match=r"join\.weight .*Trying it out doesn't tell"):
        found(model, {"hidden": 16})


class Dropping(WithLabels):
    """Drops in every way; and shakes in training, by as many numbers as it is wide, if it is told to."""

    def __init__(self, hidden: int = 8, shaken: bool = False) -> None:
        super().__init__(hidden)
        self.dropout, self.shaken = nn.Dropout(0.5), shaken
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.training:
            self.seen += 1
        x = F.dropout(self.dropout(self.table(input_ids)), 0.3, self.training)
        part = x[..., :8]
        part = F.scaled_dot_product_attention(part, part, part, None, 0.4 * self.training)
        x = x + self.attention(part, part, part)[0].mean(-1, keepdim=True)
        if self.shaken and self.training:
            x = x * (1 + 0.1 * torch.rand_like(x))
        logits: Tensor = self.head(x) * (1 + self.seen)
        if labels is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + self.second(x).logsumexp(-1).mean()


@pytest.mark.parametrize("shaken", [False, True])
def test_what_training_draws_hides_nothing(shaken: bool) -> None:
    """A model whose training can't be compared is looked at with its labels in evaluation mode."""
    state = torch.get_rng_state()
    told = found(lambda hidden=16: Dropping(hidden, shaken), {"hidden": 32})
    assert told.proof
    assert told.axes["join.weight"].dims[1].segments == 2
    assert torch.equal(torch.get_rng_state(), state)


class Translating(nn.Module):
    """An encoder-decoder, which runs with labels or with what its decoder shall read."""

    def __init__(self, hidden: int = 8, tell: str = "labels") -> None:
        super().__init__()
        self.table, self.head, self.tell = nn.Embedding(VOCABULARY, hidden), nn.Linear(hidden, VOCABULARY), tell

    def forward(
        self, input_ids: Tensor, decoder_input_ids: Tensor | None = None, labels: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        read = {"labels": labels, "decoder": decoder_input_ids}[self.tell]
        if read is None:
            raise ValueError("what shall the decoder read?")
        return (self.head(self.table(read) + self.table(input_ids).mean(1, keepdim=True)),)


@pytest.mark.parametrize("tell", ["labels", "decoder"])
def test_encoder_decoders_are_tried(tell: str) -> None:
    assert found(lambda hidden=8: Translating(hidden, tell), {"hidden": 16}).proof


# -- selections ----------------------------------------------------------------------------------------------------


class Window(nn.Module):
    """Sees all of the last tokens, and of those before only a part that follows its width."""

    def __init__(self, hidden: int = 8, window: int = 24) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(VOCABULARY, hidden), nn.Linear(hidden, VOCABULARY, bias=False)
        self.sliding_window = window

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        rest = x.shape[-1] ** -1 * x[:, : -self.sliding_window].sum(1, keepdim=True)
        logits: Tensor = self.head(x + rest)
        return logits


def test_a_selection_acts_in_a_trial() -> None:
    with pytest.raises(PlanError, match="the input of head"):
        found(Window, {"hidden": 16})
    assert found(lambda hidden=8: Window(hidden, 10**6), {"hidden": 16}).proof  # beyond what anybody would wait for
    assert enough_tokens(Window()) == 48


@pytest.mark.parametrize(
    "name", ["local_window", "window_length", "local_size", "span", "topk", "top_k_tokens", "k", "num_selected"]
)
def test_sizes_of_selections_are_known_by_name(name: str) -> None:
    model = Window()
    del model.sliding_window
    assert enough_tokens(model) == LENGTH
    setattr(model, name, 20)
    assert enough_tokens(model) == 40


def test_a_config_lets_fewer_tokens_through() -> None:
    config = {"sliding_window": 4096, "index_topk": 2048, "max_window_layers": 28, "num_experts_per_tok": 8, "vocab": 2}
    assert selecting(config) == {"sliding_window": 4, "index_topk": 4}
    assert selecting({"compress_rates": {"a": 4, "b": 128}, "sliding_window": None}) == {
        "compress_rates": {"a": 4, "b": 4}
    }


@pytest.mark.parametrize(("axis", "kept"), [("index_head_dim", False), ("index_n_heads", True), ("hidden_size", True)])
def test_the_indexer_of_deepseek_v3_2_selects(axis: str, kept: bool) -> None:
    """With more tokens than it lets through, its heads' own width changes which ones they are."""
    config = {**CONFIGS["deepseek_v3"], "model_type": "deepseek_v32", "index_head_dim": 8, "index_n_heads": 4}
    factory = HuggingFaceFactory({**config, "index_topk": 2048})
    width = int(str({**config, "hidden_size": 32}[axis]))
    if kept:
        assert found(factory, {axis: 2 * width}).proof
    else:
        with pytest.raises(PlanError, match="growing index_head_dim would change the model's function"):
            found(factory, {axis: 2 * width})


# -- what it costs -------------------------------------------------------------------------------------------------


def test_trying_ends_and_says_how_to_go_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(patience, "_EVERY", 0.0)
    with caplog.at_level(logging.WARNING):
        assert found(Mixture, {"hidden": 16, "inner": 24}).proof
    assert "trying growths on a small instance, for 0 s so far, at most" in caplog.text
    assert '"check": false' in caplog.text
    monkeypatch.setattr(patience, "LIMIT", -1.0)
    with pytest.raises(PlanError, match=r'join\.weight .*0 s of trying weren\'t enough .*"check": false'):
        found(WithLabels, {"hidden": 16})
    assert "weren't enough" in found(Cut, {"inner": 24}).proof.doubt


def test_a_reading_costs_little_once_a_model_is_built() -> None:
    """Wide models are built once per width, and filled anew only where a reading differs."""
    built: list[int] = []

    def build_model(hidden: int = 8, inner: int = 12) -> nn.Module:
        model = Mixture(hidden, inner)
        if model.head.weight.device.type == "cpu":
            built.append(hidden)
        return model

    with pytest.raises(PlanError, match="growing hidden would change"):  # after 128 readings
        find_axes(
            lambda hidden=8, inner=12: Scaled(build_model(hidden, inner)), {"hidden": 8, "inner": 12}, [("hidden",)]
        )
    assert len(built) < 12


class Scaled(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids)
        return logits * logits.new_tensor(float(self.model.get_parameter("head.weight").shape[1])).log()
