"""Averages of the weights that grow along: one that equals the weights makes the grown weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tiny
from distributed import Workers
from ds_sparkling.errors import GrowthError
from tiny import Case

FIRST, SECOND = {"hidden_size": 12, "moe_intermediate_size": 8}, {"moe_intermediate_size": 16}
RANDOM = {"init": {"fan_out": "random", "fan_in": "random"}, "check": False}


def weights(engine: Any) -> dict[str, torch.Tensor]:
    return {name: kept["weight"] for name, kept in tiny.local_state(engine)[0].items()}


def grown_twice(case: Case, as_module: bool) -> None:
    """An average that equals the weights does so after each of two growths."""
    import ds_sparkling

    engine = tiny.initialize(case)
    tiny.train(engine, 1)
    averaged: Any = AveragedModel(engine.module) if as_module else weights(engine)
    if as_module:
        averaged.update_parameters(engine.module)
    for widths in (FIRST, SECOND):
        assert ds_sparkling.grow_averaged(engine, averaged) is averaged  # has the engine's widths
        engine = ds_sparkling.grow(engine, widths)
        held, averaged = averaged, ds_sparkling.grow_averaged(engine, averaged)
        assert (held is averaged) == as_module
        own = dict(averaged.module.named_parameters()) if as_module else averaged
        expected = weights(engine)
        assert own.keys() == expected.keys()
        assert all(torch.equal(own[name], weight) for name, weight in expected.items())
    if as_module:
        averaged.eval()
        loss = float(averaged(*tiny.batch(10**6)).detach())
        assert loss == tiny.evaluate(engine)  # the model's own sizes have grown, too


@pytest.mark.parametrize(
    ("case", "as_module"),
    [
        (Case(2, 0, sparkling=RANDOM), True),
        (Case(2, 1, frozen=True), True),
        (Case(2, 2, tied=False), True),
        (Case(2, 3, sparkling=RANDOM), False),
        (Case(2, 3, ep=2), False),
    ],
    ids=str,
)
def test_an_average_that_equals_the_weights_grows_into_the_grown_weights(
    case: Case, as_module: bool, workers: Callable[[int], Workers]
) -> None:
    workers(2).run(grown_twice, case, as_module)


class Buffered(nn.Module):
    """Has a buffer that follows its width, and one that doesn't."""

    mask: torch.Tensor
    seen: torch.Tensor

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, width), nn.Linear(width, 3)
        self.register_buffer("mask", torch.ones(width), persistent=False)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(torch.relu(self.up(x)) * self.mask)
        return out


def with_buffers(case: Case) -> None:
    import ds_sparkling

    engine: Any = ds_sparkling.initialize(Buffered, case.config)
    averaged: Any = AveragedModel(engine.module)
    averaged.module.seen += 5
    state: Any = averaged.state_dict() | {"module.mask": averaged.module.mask}
    engine = ds_sparkling.grow(engine, {"width": 8})
    engine.module.mask[6] = 0.0
    state = ds_sparkling.grow_averaged(engine, state)
    ds_sparkling.grow_averaged(engine, averaged)
    for seen, mask in ((averaged.module.seen, averaged.module.mask), (state["module.seen"], state["module.mask"])):
        assert seen.tolist() == [5.0]
        assert torch.equal(mask, engine.module.mask)
        assert mask is not engine.module.mask


def test_buffers_are_the_averages_own_or_else_the_grown_models(workers: Callable[[int], Workers]) -> None:
    workers(2).run(with_buffers, Case(2, 1))


def followed(case: Case) -> tuple[bool, list[str], list[str]]:
    """What an average goes on with after a growth, and what is refused."""
    import ds_sparkling

    engine = tiny.initialize(case)
    averaged = AveragedModel(engine.module, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(engine.module)
    missing: Any = averaged.state_dict()
    engine = ds_sparkling.grow(engine, FIRST)
    ds_sparkling.grow_averaged(engine, averaged)
    before = [param.detach().clone() for param in engine.module.parameters()]
    tiny.train(engine, 1)
    averaged.update_parameters(engine.module)
    halfway = all(
        torch.allclose(own, (old + new) / 2)
        for own, old, new in zip(averaged.parameters(), before, engine.module.parameters(), strict=True)
    )
    grown = ds_sparkling.grow_averaged(engine, missing)
    engine = ds_sparkling.grow(engine, SECOND)
    once, both = ds_sparkling.grow_averaged(engine, grown), ds_sparkling.grow_averaged(engine, missing)
    assert all(torch.equal(once[name], both[name]) for name in missing)
    refused = []
    for given in ({**missing, "module.norm.weight": torch.zeros(7)}, {"embed_tokens.weight": torch.zeros(2)}):
        with pytest.raises(GrowthError) as error:
            ds_sparkling.grow_averaged(engine, given)
        refused.append(str(error.value))
    return halfway, list(grown), refused


def test_an_average_goes_on_averaging_and_one_of_other_widths_is_refused_by_name(
    workers: Callable[[int], Workers],
) -> None:
    halfway, names, (other, lacking) = workers(2).run(followed, Case(2, 1))[0]
    assert halfway
    assert {"n_averaged", "module.embed_tokens.weight"} <= set(names)
    assert "the average (norm.weight has shape (7,)) isn't of any widths" in other
    assert "the average lacks" in lacking
