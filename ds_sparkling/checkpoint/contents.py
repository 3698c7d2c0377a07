"""The parameters of the checkpoint to be written: the source's, grown as a plan says, any stretch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from threading import Lock, local
from typing import Any

import torch
from torch import Tensor

from ds_sparkling.checkpoint.layout import Param
from ds_sparkling.checkpoint.source import WEIGHT, Source
from ds_sparkling.errors import CheckpointError
from ds_sparkling.growth import GrowthPlan, GrowthTables, Widener, grown_buffer
from ds_sparkling.growth.survey import Statistics
from ds_sparkling.spec.partition import cut
from ds_sparkling.spec.strategy import OptimizerState

#: Elements that are made at a time; with a few tensors of this size per worker memory doesn't depend on the model's.
BLOCK = 1 << 20


class Contents:
    """Logical parameters and optimizer state after the growth.

    Args:
        source: the checkpoint before.
        plan: the growth in the checkpoint's parameter names; None to take everything as it is.

    Raises:
        PlanError: if an optimizer state can't be grown as the plan's strategy says.
    """

    def __init__(self, source: Source, plan: GrowthPlan | None) -> None:
        self.source = source
        self.plan = plan
        self._wideners: dict[str, Widener] = {}
        if plan is not None:
            tables = GrowthTables(plan)
            self._wideners = {name: Widener(plan, name, tables=tables) for name in source.layout.params}
        self._statistics: dict[tuple[str, str], Statistics] = {}
        self._threads = local()
        self._locks = {name: Lock() for name in self._wideners}
        self.params: dict[str, Param] = dict(source.layout.params)
        for name, widener in self._wideners.items():
            self.params[name] = replace(self.params[name], shape=widener.after)
        for name, widener in self._wideners.items():
            for key in source.states(name) if self.params[name].trained else ():
                widener.state(key, _nothing, torch.empty(0), statistics=Statistics())

    def dtype(self, name: str, key: str) -> torch.dtype:
        """Of a parameter's master weights, or of one of its states."""
        return self.source.weight_dtype(name) if key == WEIGHT else self.source.states(name)[key]

    def numbers(self, name: str) -> dict[str, Any]:
        """A parameter's step counters."""
        numbers = self.source.numbers(name)
        if self.plan is not None and self.plan.strategy.optimizer_state is OptimizerState.DROP:
            return {key: value * 0 for key, value in numbers.items()}
        return numbers

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Logical shape of every parameter."""
        return {name: param.shape for name, param in self.params.items()}

    def buffer(self, name: str, held: Tensor) -> Tensor:
        """A buffer, from what the checkpoint holds of it."""
        return held if self.plan is None else grown_buffer(self.plan, name, held)

    def cuts(self, name: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """``start .. stop`` in stretches that one call of :meth:`make` should make: whole rows where it can be."""
        row = max(self.params[name].shape[-1], 1) if self.params[name].shape else 1
        block = max(BLOCK // row, 1) * row
        for index, offset, count in cut(start, stop, block):
            first = index * block + offset
            yield first, first + count

    @torch.no_grad()
    def make(self, name: str, key: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """The elements ``start .. stop``, 1-D, rounded to ``dtype``; valid until this thread makes the next ones."""
        widener = self._wideners.get(name)
        if widener is None:
            out = self._scratch(stop - start, dtype)
            done = 0
            for piece in self.source.read(name, key, start, stop):
                out[done : done + piece.numel()].copy_(piece)
                done += piece.numel()
            if done != stop - start:
                raise CheckpointError(f"{self.source.path}: {key} of {name} has fewer elements than the metadata says")
            return out
        out = self._scratch(stop - start, self.dtype(name, key))

        def old(first: int, last: int) -> Tensor:
            return self.source.elements(name, key, first, last)

        if key == WEIGHT:
            widener.weight(old, out, start, self._statistics_of(name, WEIGHT))
        elif widener.is_weights(key):
            widener.state(key, old, out, start, self._statistics_of(name, key))
        else:
            widener.state(key, old, out, start)
        return out.to(dtype)

    def _statistics_of(self, name: str, key: str) -> Statistics:
        """What new entries of the weight, or of a state that is weights, need to know of the old ones."""
        weights = None if key == WEIGHT else self._statistics_of(name, WEIGHT)
        with self._locks[name]:
            if (name, key) not in self._statistics:
                try:
                    self._statistics[name, key] = self._wideners[name].statistics(
                        lambda start, stop: self.source.elements(name, key, start, stop), weights
                    )
                except ValueError as error:
                    raise CheckpointError(f"{name}: {error}") from error
            return self._statistics[name, key]

    def _scratch(self, numel: int, dtype: torch.dtype) -> Tensor:
        """This thread's memory, used again and again: fresh pages cost more than what is written to them."""
        size = numel * dtype.itemsize
        held: Tensor | None = getattr(self._threads, "scratch", None)
        if held is None or held.numel() < size:
            held = self._threads.scratch = torch.empty(max(size, BLOCK * dtype.itemsize), dtype=torch.uint8)
        return held[:size].view(dtype)

    @property
    def bytes(self) -> int:
        """Of all weights and states as they will be kept."""
        total = 0
        for name, param in self.params.items():
            keys = [WEIGHT, *(self.source.states(name) if param.trained else ())]
            total += param.numel * sum(self.dtype(name, key).itemsize for key in keys)
        return total


def _nothing(_start: int, _stop: int) -> Tensor:
    return torch.empty(0)
