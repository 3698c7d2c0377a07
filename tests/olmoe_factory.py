"""What builds the tests' tiny model, for ``--config olmoe_factory:build_tied``."""

from typing import Any

import torch
from torch import nn

from tiny import Case

build_tied = Case(tied=True).build_model
build_untied = Case(tied=False).build_model


class Strange(nn.Module):
    """A module that nobody knows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.odd = nn.Parameter(torch.empty(width, 1, 1, 1))


def build_unknown(hidden_size: int = 6, moe_intermediate_size: int = 5) -> nn.Module:
    model: Any = build_tied(hidden_size=hidden_size, moe_intermediate_size=moe_intermediate_size)
    model.strange = Strange(hidden_size)
    return model
