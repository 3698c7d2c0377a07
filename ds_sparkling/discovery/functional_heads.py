"""Heads that use the embedding's weight without being a module: nothing in the model's structure tells of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ds_sparkling.discovery.forward import Call, run

_PRODUCTS: frozenset[Callable[..., Any]] = frozenset(
    (F.linear, torch.matmul, torch.mm, torch.bmm, torch.einsum, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
)


def functional_head(model: nn.Module, call: Call, names: Collection[str]) -> str:
    """What to say of an embedding among the parameters ``names`` that is multiplied with, but by no linear module."""
    owners: dict[int, set[type[nn.Module]]] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            owners.setdefault(id(param), set()).add(type(module))
    embeddings = {
        param.untyped_storage().data_ptr(): name
        for name, param in model.named_parameters()
        if name in names and all(issubclass(owner, nn.Embedding) for owner in owners[id(param)])
    }
    if not embeddings:
        return ""
    watcher = _Products(embeddings)
    with watcher:
        run(model, call)
    if watcher.found is None:
        return ""
    function, name = watcher.found
    return (
        f". {type(model).__name__} also multiplies by {name} itself ({function}), as a head tied to the embedding, "
        "without a module that tells so. Give it one: head = nn.Linear(..., bias=False); head.weight = "
        f"{name}; and call the head instead"
    )


class _Products(TorchFunctionMode):
    """Notes a product with one of some weights."""

    def __init__(self, weights: Mapping[int, str]) -> None:
        super().__init__()
        self._weights = weights
        self.found: tuple[str, str] | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _PRODUCTS:
            for arg in (*args, *(kwargs or {}).values()):
                name = self._weights.get(arg.untyped_storage().data_ptr()) if isinstance(arg, Tensor) else None
                if name is not None:
                    self.found = (func.__name__, name)
        return func(*args, **(kwargs or {}))
