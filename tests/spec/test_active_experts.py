"""How much of a model one token uses, as its config tells."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from ds_sparkling.spec.active_experts import active_share, chosen_experts


class Model(nn.Module):
    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)


@pytest.mark.parametrize("name", ["num_experts", "n_routed_experts", "num_local_experts"])
def test_the_share_is_that_of_the_config_or_of_its_text_model(name: str) -> None:
    told = {"num_experts_per_tok": 2, name: 8}
    assert active_share(Model(**told)) == 0.25
    assert active_share(Model(text_config=SimpleNamespace(**told), vision_config=None)) == 0.25


def test_what_is_not_told_is_not_guessed() -> None:
    assert active_share(Model(num_experts=8)) is None
    assert active_share(Model(num_experts_per_tok=2, num_experts=None)) is None
    assert chosen_experts(Model(num_experts_per_tok="2")) is None
    assert active_share(nn.Linear(1, 1)) is None
