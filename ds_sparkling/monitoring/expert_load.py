"""Measure how a mixture of experts spreads its tokens: the routers' entropy and each expert's load, over calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ds_sparkling.monitoring.blocks import router_map


@dataclass(frozen=True)
class Router:
    """A router to be measured.

    Attributes:
        module: the router.
        experts: E, how many experts it chooses from.
        top_k: how many it chooses for a token, which is needed if it doesn't tell its choices itself.
        scoring: what makes probabilities of its logits, ``softmax`` or ``sigmoid``.
    """

    module: nn.Module
    experts: int
    top_k: int | None
    scoring: str = "softmax"


@dataclass(frozen=True)
class Routing:
    """What one router did.

    Attributes:
        entropy: mean over tokens of -sum_e p_e ln p_e, in nats; ln E is even. None if only choices were seen.
        counts: assignments by expert, fp64 [E].
    """

    entropy: float | None
    counts: Tensor

    @property
    def load(self) -> Tensor:
        """Each expert's share of the assignments times E: 1 is even. [E]"""
        return self.counts / self.counts.sum() * len(self.counts)


class RoutingMeter:
    """Counts while it is switched on.

    If a router gives the experts that it chose (int64 [..., k], as AutoEP's does), these are counted. Of other routers
    the ``top_k`` largest logits of each token are. Other outputs are ignored.

    Args:
        routers: what to measure, by name.
    """

    def __init__(self, routers: Mapping[str, Router]) -> None:
        self._routers = dict(routers)
        self._handles: list[RemovableHandle] = []
        self._sums: dict[str, Tensor] = {}

    @property
    def names(self) -> list[str]:
        return list(self._routers)

    def on(self) -> None:
        """Hook the routers' forward."""
        self.off()
        for name, router in self._routers.items():
            linear = router_map(router.module)
            assert linear is not None
            if linear is router.module:
                self._handles.append(linear.register_forward_hook(self._logits_hook(name, router, choose=True)))
            else:
                self._handles.append(linear.register_forward_hook(self._logits_hook(name, router, choose=False)))
                self._handles.append(router.module.register_forward_hook(self._choice_hook(name, router)))

    def off(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def take(self, device: torch.device) -> Tensor:
        """The sums since the last call, router after router: entropy, tokens, assignments by expert; fp64, flat."""
        empty = {name: torch.zeros(2 + router.experts, dtype=torch.float64) for name, router in self._routers.items()}
        taken, self._sums = {**empty, **self._sums}, {}
        return torch.cat([torch.zeros(0, dtype=torch.float64, device=device), *(s.to(device) for s in taken.values())])

    def read(self, sums: Tensor) -> dict[str, Routing]:
        """What :meth:`take`'s sums say, for the routers that were called."""
        sizes = [2 + router.experts for router in self._routers.values()]
        found = {}
        for name, part in zip(self._routers, sums.cpu().split(sizes), strict=True):
            if part.any():
                found[name] = Routing(float(part[0] / part[1]) if part[1] > 0 else None, part[2:])
        return found

    def _sum(self, name: str, router: Router, device: torch.device) -> Tensor:
        if name not in self._sums:
            self._sums[name] = torch.zeros(2 + router.experts, dtype=torch.float64, device=device)
        return self._sums[name]

    def _logits_hook(self, name: str, router: Router, *, choose: bool) -> Any:
        @torch.no_grad()
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            tensors = _tensors(output)
            scores = [t for t in tensors if t.is_floating_point() and t.shape[-1] == router.experts]
            chosen = _chosen(tensors)
            if scores:
                # Beside the scores of all experts, some give those of the chosen ones with zeros in between.
                given = scores[0] if len(scores) == 1 else max(scores, key=lambda t: int(t.count_nonzero()))
                scores_NE = given.flatten(0, -2).float()
                sums = self._sum(name, router, given.device)
                sums[0] += token_entropy(scores_NE, router.scoring).sum()
                sums[1] += len(scores_NE)
                if chosen is None and router.top_k is not None:
                    chosen = scores_NE.topk(router.top_k, dim=-1).indices
            if choose and chosen is not None:
                self._count(name, router, chosen)

        return hook

    def _choice_hook(self, name: str, router: Router) -> Any:
        @torch.no_grad()
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            chosen = _chosen(_tensors(output))
            if chosen is not None:
                self._count(name, router, chosen)

        return hook

    def _count(self, name: str, router: Router, chosen: Tensor) -> None:
        counts = torch.bincount(chosen.flatten(), minlength=router.experts)
        self._sum(name, router, chosen.device)[2:] += counts[: router.experts]


def _tensors(output: Any) -> list[Tensor]:
    """The tensors among what a router gives that have a row for every token."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.dim() > 1]


def _chosen(tensors: Sequence[Tensor]) -> Tensor | None:
    return next((tensor for tensor in tensors if tensor.dtype == torch.int64), None)


def token_entropy(scores_NE: Tensor, kind: str = "softmax") -> Tensor:
    """-sum_e p_e ln p_e of every token, in nats; [N].

    Args:
        scores_NE: a router's logits, or already its probabilities: rows that aren't negative and add up to 1.
        kind: what makes probabilities of logits, ``softmax`` or ``sigmoid`` (over their sum).
    """
    rows = scores_NE.sum(-1)
    if bool((scores_NE >= 0).all()) and bool(((rows - 1).abs() < 1e-2).all()):
        probabilities_NE = scores_NE / rows[:, None]
    elif kind == "sigmoid":
        probabilities_NE = scores_NE.sigmoid()
        probabilities_NE = probabilities_NE / probabilities_NE.sum(-1, keepdim=True)
    else:
        probabilities_NE = scores_NE.softmax(-1)
    return torch.special.entr(probabilities_NE).sum(-1)
