"""The modules that a report shows: layers, their direct children, and what stands outside all layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from torch import nn

from ds_sparkling.discovery.comparison import Change
from ds_sparkling.discovery.forward import Side


class ModuleLevel(str, Enum):
    """Where in a model a module stands: a whole layer, a part of one, or outside of all layers."""

    LAYER = "layer"
    BLOCK = "block"
    OUTSIDE = "outside"


@dataclass(frozen=True, kw_only=True)
class ModuleRms:
    """A module's output in the narrow and in the wide model.

    Attributes:
        module: its name.
        kind: its type.
        place: where it stands.
        before, after: RMS over all elements of all its calls.
        expected: what the ratio is by intention, where it isn't 1.
    """

    module: str
    kind: str
    place: ModuleLevel
    before: float
    after: float
    expected: float

    @property
    def ratio(self) -> float:
        """RMS after over before; 1 where both are zero."""
        return self.after / self.before if self.before else (1.0 if self.after == 0 else math.inf)


def rows(model: nn.Module, changes: Iterable[Change]) -> list[ModuleRms]:
    """The report's rows, in the order in which modules were run."""
    places = dict(_places("", model))
    found: dict[str, list[Change]] = {}
    for change in changes:
        if change.side is Side.OUTPUT and change.module in places:
            found.setdefault(change.module, []).append(change)
    return [
        ModuleRms(
            module=name,
            kind=type(model.get_submodule(name)).__name__,
            place=places[name],
            before=_root_mean_square([change.before for change in calls]),
            after=_root_mean_square([change.after for change in calls]),
            expected=calls[0].expected,
        )
        for name, calls in found.items()
    ]


def _places(prefix: str, module: nn.Module) -> Iterator[tuple[str, ModuleLevel]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if not any(True for _ in child.parameters()):
            continue
        if isinstance(child, nn.ModuleList):
            for index, layer in child.named_children():
                yield from _layer(f"{path}.{index}", layer)
        elif any(isinstance(inner, nn.ModuleList) for inner in child.modules()):
            yield from _places(f"{path}.", child)
        else:
            yield path, ModuleLevel.OUTSIDE


def _layer(path: str, layer: nn.Module) -> Iterator[tuple[str, ModuleLevel]]:
    """A layer and its children. A module of plain maps is a block of its own, even in a list of such."""
    whole = any(True for child in layer.children() for _ in child.children())
    yield path, ModuleLevel.LAYER if whole else ModuleLevel.BLOCK
    for name, child in layer.named_children():
        if any(True for _ in child.parameters()):
            yield f"{path}.{name}", ModuleLevel.BLOCK


def _root_mean_square(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))
