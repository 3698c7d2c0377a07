"""The RMS of what goes into modules and comes out of them, added up over calls; sums of several ranks can be added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class ActivationMeter:
    """Counts while it is switched on.

    Args:
        modules: what to measure, by name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = dict(modules)
        self._handles: list[RemovableHandle] = []
        self._squares: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._counts: dict[str, tuple[int, int]] = {}

    @property
    def names(self) -> list[str]:
        return list(self._modules)

    def on(self) -> None:
        """Hook the modules' forward."""
        self.off()
        self._handles = [
            module.register_forward_hook(self._hook(name), with_kwargs=True) for name, module in self._modules.items()
        ]

    def off(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def take(self, device: torch.device) -> Tensor:
        """The sums since the last call; fp64 [modules, (squares in, elements in, squares out, elements out)]."""
        sums = torch.zeros(len(self._modules), 4, dtype=torch.float64, device=device)
        for row, name in zip(sums, self._modules, strict=True):
            for squares_in, squares_out in self._squares.get(name, []):
                row[0] += squares_in
                row[2] += squares_out
            row[1], row[3] = self._counts.get(name, (0, 0))
        self._squares, self._counts = {}, {}
        return sums

    def _hook(self, name: str) -> Any:
        @torch.no_grad()
        def hook(_module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
            given, made = first_activation([*args, *kwargs.values()]), first_activation([output])
            if given is None or made is None:
                return
            # Each norm is taken in fp32 and squared and added in fp64.
            squares = tuple(torch.linalg.vector_norm(x, dtype=torch.float32).double().square() for x in (given, made))
            self._squares.setdefault(name, []).append((squares[0], squares[1]))
            counts = self._counts.get(name, (0, 0))
            self._counts[name] = (counts[0] + given.numel(), counts[1] + made.numel())

        return hook


def first_activation(values: Sequence[Any]) -> Tensor | None:
    """The first floating-point tensor among the values, or in a tuple or list among them."""
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
        if isinstance(value, (tuple, list)):
            inside = first_activation(value)
            if inside is not None:
                return inside
    return None


def root_mean_squares(sums: Tensor) -> list[tuple[float, float] | None]:
    """RMS in and out by module, from :meth:`ActivationMeter.take`'s sums; None where there was no call."""
    found: list[tuple[float, float] | None] = []
    for squares_in, count_in, squares_out, count_out in sums.tolist():
        called = count_in > 0 and count_out > 0
        found.append(((squares_in / count_in) ** 0.5, (squares_out / count_out) ** 0.5) if called else None)
    return found
