"""Samples, effective rank, activations and routing, against direct computation; blocks and routers of any model."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_sparkling.monitoring.activations import ActivationMeter, root_mean_squares
from ds_sparkling.monitoring.blocks import repeated_blocks, router_map, routers
from ds_sparkling.monitoring.expert_load import Router, RoutingMeter, token_entropy
from ds_sparkling.monitoring.sampling import Grid, chosen, thinned
from ds_sparkling.monitoring.spectrum import effective_rank
from ds_sparkling.spec.autoep import BlockNames
from families import FAMILIES

CPU = torch.device("cpu")


# -- samples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "keep", "counts"),
    [(10**6, (), (8, 6, 10)), (240, (), (4, 6, 10)), (30, (), (1, 3, 10)), (30, (1,), (1, 6, 5)), (3, (1,), (1, 6, 1))],
)
def test_a_grid_keeps_to_its_limit(limit: int, keep: tuple[int, ...], counts: tuple[int, ...]) -> None:
    assert thinned((8, 6, 10), limit, keep).counts == counts


def test_a_grid_has_evenly_spaced_elements_in_their_order() -> None:
    grid = Grid((4, 3, 5), (2, 3, 2))
    expected = [(i * 3 + j) * 5 + k for i, j, k in itertools.product((0, 2), (0, 1, 2), (0, 2))]
    assert grid.flat().tolist() == expected
    assert grid.numel == 12
    assert not grid.whole
    assert Grid((4, 3), (4, 3)).flat().tolist() == list(range(12))


def test_a_choice_of_names_is_the_same_everywhere_and_no_regular_pattern() -> None:
    names = [f"layers.{layer}.{kind}" for layer in range(24) for kind in ("q", "o", "w1", "w2")]
    first = chosen(names, 16)
    assert first == chosen(names, 16)
    assert len(set(first)) == 16
    assert sorted(first, key=names.index) == first
    assert {name.split(".")[2] for name in first} == {"q", "o", "w1", "w2"}
    assert chosen(names[:5], 16) == names[:5]


# -- effective rank ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_effective_rank_of_a_diverged_matrix_is_no_number(bad: float) -> None:
    matrix = torch.randn(4, 6)
    matrix[1, 2] = bad
    assert math.isnan(effective_rank(matrix))


@pytest.mark.parametrize("shape", [(20, 50), (50, 20)])
def test_effective_rank_is_the_exponential_of_the_spectrums_entropy(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    values = torch.linalg.svdvals(matrix.double())
    shares = values / values.sum()
    assert effective_rank(matrix) == pytest.approx(float((-(shares * shares.log()).sum()).exp()), rel=1e-9)


def test_effective_rank_of_what_is_known() -> None:
    assert effective_rank(torch.eye(7)) == pytest.approx(7.0)
    assert effective_rank(torch.ones(5, 9)) == pytest.approx(1.0, abs=1e-5)
    assert effective_rank(torch.zeros(3, 3)) == 0.0
    half = torch.eye(4)
    assert effective_rank(torch.cat([half, half])) == pytest.approx(4.0)  # copies add no direction


# -- activations ------------------------------------------------------------------------------------------------


class Tupled(nn.Module):
    """Like Hugging Face's blocks: given by keyword, answering with a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(3, 3))

    def forward(self, mask: Tensor, hidden_states: Tensor) -> tuple[Tensor, None]:
        return 2 * hidden_states, None


def test_rms_over_several_calls_while_switched_on() -> None:
    torch.manual_seed(0)
    block, unused = Tupled(), Tupled()
    meter = ActivationMeter({"a": block, "b": unused})
    mask = torch.ones(2, dtype=torch.bool)
    inputs = [torch.randn(4, 3), torch.randn(2, 3), 100 * torch.randn(5, 3)]
    meter.on()
    for x in inputs[:2]:
        block(mask, hidden_states=x)
    meter.off()
    block(mask, hidden_states=inputs[2])
    found = root_mean_squares(meter.take(CPU))
    rms = float(torch.cat(inputs[:2]).square().mean().sqrt())
    assert found[0] == pytest.approx((rms, 2 * rms))
    assert found[1] is None
    assert root_mean_squares(meter.take(CPU)) == [None, None]
    assert not block._forward_hooks


# -- routing ----------------------------------------------------------------------------------------------------


class Listed(nn.Linear):
    """A router that answers as some of Hugging Face's do."""

    def __init__(self, answer: Any) -> None:
        super().__init__(3, 4)
        self.answer = answer

    def forward(self, x: Tensor) -> Any:
        return self.answer


def measured(module: nn.Module, top_k: int | None = 2) -> Any:
    meter = RoutingMeter({"a": Router(module, 4, top_k), "unused": Router(Listed(None), 4, 2)})
    meter.on()
    module(torch.ones(5, 3))
    module(torch.ones(5, 3))
    meter.off()
    module(torch.ones(5, 3))
    found = meter.read(meter.take(CPU))
    assert list(found) == ["a"]
    return found["a"]


def test_entropy_and_load_of_logits() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 4)
    found = measured(Listed(logits))
    p = logits.double().softmax(-1)
    assert found.entropy == pytest.approx(float(-(p * p.log()).sum(-1).mean()), rel=1e-5)
    counts = [2 * sum(expert in row for row in logits.topk(2).indices.tolist()) for expert in range(4)]
    assert found.counts.tolist() == counts
    assert found.load.tolist() == pytest.approx([count / 20 * 4 for count in counts])
    assert measured(Listed(logits), top_k=None).counts.sum() == 0


def test_a_router_that_tells_its_choice_is_taken_at_its_word() -> None:
    logits = torch.randn(5, 4)
    chosen_NK = torch.tensor([[0, 1]] * 5)
    scattered = torch.zeros(5, 4).index_fill(1, torch.tensor([0, 1]), 0.5)
    for answer in ((logits, torch.ones(5, 2), chosen_NK), (scattered, logits, chosen_NK)):
        found = measured(Listed(answer))
        assert found.counts.tolist() == [10, 10, 0, 0]
        assert found.entropy == pytest.approx(float(token_entropy(logits).mean()), rel=1e-6)


def test_of_a_router_that_gives_something_else_only_what_is_known_counts() -> None:
    logits, chosen_NK = torch.randn(5, 4), torch.tensor([[0, 1]] * 5)
    found = measured(Listed((chosen_NK, torch.ones(5, 2), torch.tensor(0.1))))
    assert (found.entropy, found.counts.tolist()) == (None, [10, 10, 0, 0])
    loss, count = torch.tensor(0.1), torch.tensor([5, 5, 0, 0])
    assert measured(Listed((logits, loss, count, None))).counts.sum() == 20
    assert measured(Listed({"logits": logits, "loss": loss})).entropy == measured(Listed(logits)).entropy
    router = Listed(None)
    meter = RoutingMeter({"a": Router(router, 4, 2)})
    meter.on()
    for answer in (None, loss, object()):
        router.answer = answer
        router(torch.ones(5, 3))
    assert meter.read(meter.take(CPU)) == {}


def test_entropy_of_probabilities_and_of_sigmoids() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [50.0, 0.0, 0.0, 0.0]])
    assert token_entropy(logits).tolist() == pytest.approx([math.log(4), 0.0], abs=1e-6)
    assert token_entropy(logits.softmax(-1)).tolist() == pytest.approx([math.log(4), 0.0], abs=1e-6)
    shares = torch.tensor([0.4, 0.2, 0.2, 0.2])
    expected = float(-(shares * shares.log()).sum())
    assert token_entropy(logits, "sigmoid").tolist() == pytest.approx([math.log(4), expected], abs=1e-5)


# -- finding them -----------------------------------------------------------------------------------------------


def layer(*parts: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Sequential(*parts, nn.Linear(2, 2)))


def test_blocks_are_the_elements_of_the_outer_lists() -> None:
    model = nn.Module()
    model.decoder = nn.Module()
    model.decoder.layers = nn.ModuleList([layer(nn.ModuleList([layer()])), layer()])
    model.heads = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    assert list(repeated_blocks(model)) == ["decoder.layers.0", "decoder.layers.1"]


@pytest.mark.parametrize(
    ("family", "layers"), [("qwen3_moe", [1]), ("deepseek_v3", [1]), ("gpt_oss", [0, 1]), ("llama4_text", [0, 1])]
)
def test_routers_of_families(family: str, layers: list[int]) -> None:
    from ds_sparkling.discovery.factory import HuggingFaceFactory

    config = FAMILIES[family]
    model = HuggingFaceFactory(config)()
    found = routers(model, BlockNames())
    assert list(found) == [f"model.layers.{index}" for index in layers]
    top_k = config["num_experts_per_tok"]
    made = {}
    for name, module in found.items():
        linear = router_map(module)
        assert linear is not None
        assert isinstance(linear.weight, Tensor)
        made[name] = Router(module, linear.weight.shape[0], top_k)
    meter = RoutingMeter(made)
    meter.on()
    model(input_ids=torch.randint(3, 60, (2, 16)))
    for routed in meter.read(meter.take(CPU)).values():
        assert routed.counts.sum() == 2 * 16 * top_k
        assert routed.entropy is not None
        assert 0 < routed.entropy <= math.log(len(routed.counts)) + 1e-6
