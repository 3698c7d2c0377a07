"""Models that hold a module, or a parameter, under several names; ``shared_factory:build_norm`` and so on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 31
WIDTHS, WIDE = {"hidden_size": 6, "inner": 5}, {"hidden_size": 12, "inner": 15}


class Block(nn.Module):
    """A layer with everything that another may share."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(hidden), nn.Linear(hidden, inner), nn.Linear(inner, hidden)
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(hidden)), nn.Parameter(torch.ones(hidden))])
        self.register_buffer("seen", torch.arange(3.0))

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.up(self.norm(x)))
        return x * self.scales[0] + self.down(inner) * self.scales[1]


class Shared(nn.Module):
    """Three layers and a head, of which something is shared."""

    def __init__(self, how: str, hidden: int, inner: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, hidden)
        self.layers: Any = nn.ModuleList(Block(hidden, inner) for _ in range(3))
        self.extra: Any = Block(hidden, inner)
        self.last = nn.RMSNorm(hidden)
        self.head = nn.Linear(hidden, VOCABULARY, bias=False)
        SHARE[how](self)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        for layer in (*self.layers, self.extra):
            x = layer(x)
        logits: Tensor = self.head(self.last(x))
        return logits if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def share_norm(model: Shared) -> None:
    model.layers[2].norm = model.layers[0].norm


def share_linear(model: Shared) -> None:
    model.layers[2].up = model.layers[1].up


def share_block(model: Shared) -> None:
    """Under two names of one module, and under a third elsewhere."""
    model.layers[2] = model.layers[0]
    model.extra = model.layers[0]


def share_embedding(model: Shared) -> None:
    model.wrapped = nn.ModuleDict({"tokens": model.embed})
    model.again = model.embed


def share_list(model: Shared) -> None:
    """One list of two layers, and one parameter twice in another."""
    model.layers[1].scales = model.layers[0].scales
    model.layers[2].scales[1] = model.layers[2].scales[0]


def share_parameter(model: Shared) -> None:
    """Parameters of modules that are two."""
    model.layers[1].up.weight = model.layers[0].up.weight
    model.layers[1].norm.weight = model.layers[2].norm.weight


def share_tied(model: Shared) -> None:
    """A tied head next to a norm that layers share, which aren't neighbours."""
    model.head.weight = model.embed.weight
    model.layers[2].norm = model.layers[0].norm
    model.extra.norm = model.layers[0].norm


def share_last(model: Shared) -> None:
    """The norm before a tied head must take a factor that a layer's must not."""
    model.head.weight = model.embed.weight
    model.extra.norm = model.last


def share_everything(model: Shared) -> None:
    """All that goes together; one of the blocks is used by two names, and nothing of it is its own."""
    for share in (share_tied, share_linear, share_list, share_parameter, share_embedding):
        share(model)
    model.extra = model.layers[0]


SHARE: dict[str, Callable[[Shared], None]] = {
    "norm": share_norm,
    "linear": share_linear,
    "block": share_block,
    "embedding": share_embedding,
    "list": share_list,
    "parameter": share_parameter,
    "tied": share_tied,
    "everything": share_everything,
    "last": share_last,
}


def build(how: str, hidden_size: int = WIDTHS["hidden_size"], inner: int = WIDTHS["inner"]) -> nn.Module:
    """A model that shares what ``how`` says."""
    torch.manual_seed(7)
    return Shared(how, hidden_size, inner)


def __getattr__(name: str) -> Callable[..., nn.Module]:
    kind = name.removeprefix("build_")
    if kind not in SHARE:
        raise AttributeError(name)
    return partial(build, kind)
