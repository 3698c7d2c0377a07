"""More layers: which old layer each layer of a longer list comes from, and when each of them was born."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ds_sparkling.errors import PlanError
from ds_sparkling.spec.strategy import LayerOrder


def layer_sources(axis: str, before: int, after: int, order: LayerOrder | tuple[int, ...]) -> tuple[int, ...]:
    """The old layer that every layer comes from.

    Args:
        axis: what counts the layers, for errors.
        before, after: how many there are.
        order: the rule, or the sources themselves.

    Raises:
        PlanError: if there aren't more layers than before, or the sources given don't fit.
    """
    if not 1 <= before < after:
        raise PlanError(f"{axis}: {before} -> {after} layers; a growth adds layers")
    if isinstance(order, tuple):
        return _given(axis, before, after, order)
    if order is LayerOrder.STACK:
        return tuple(layer % before for layer in range(after))
    if order is LayerOrder.INTERPOSE:
        return tuple(layer * before // after for layer in range(after))
    if order is LayerOrder.LAST:
        return (*range(before), *[before - 1] * (after - before))
    repeated = min(after - before, before)
    first = (before - repeated) // 2
    copies = (first + copy % repeated for copy in range(after - before))
    return (*range(first + repeated), *copies, *range(first + repeated, before))


def _given(axis: str, before: int, after: int, sources: tuple[int, ...]) -> tuple[int, ...]:
    """Sources that were given, once they are checked."""
    where = f"layers.sources {list(sources)}"
    if len(sources) != after:
        raise PlanError(f"{where} has {len(sources)} entries; {axis} grows to {after}, so it needs {after}")
    beyond = [source for source in sources if source >= before]
    if beyond:
        raise PlanError(f"{where} names layer {beyond[0]}; there are {before}, from 0 on")
    lost = sorted(set(range(before)) - set(sources))
    if lost:
        raise PlanError(f"{where} lacks layer {lost[0]}, which would be lost: name every old layer")
    return sources


@dataclass(frozen=True)
class LayerGrowth:
    """A list of layers that gets longer.

    Attributes:
        axis: what counts the layers.
        counted: what that becomes; one of them may be two layers of the list.
        path: the list's name in the model.
        sources: the old layer that every layer comes from. The first that comes from one is that layer.
    """

    axis: str
    counted: int
    path: str
    sources: tuple[int, ...]

    @cached_property
    def new(self) -> tuple[bool, ...]:
        """Which layers are new."""
        return tuple(source in self.sources[:layer] for layer, source in enumerate(self.sources))

    def place(self, name: str) -> tuple[int, str] | None:
        """The layer that a parameter of the longer list is in, and what it is called there; None if it is in none."""
        found = in_list(name, self.path)
        if found is not None and found[0] >= len(self.sources):
            raise PlanError(f"{name}: {self.path} is planned to have {len(self.sources)} layers")
        return found


def widths_alone(after: Mapping[str, int], layers: Sequence[LayerGrowth]) -> dict[str, int]:
    """The axes of a growth that don't count layers."""
    deeper = {growth.axis for growth in layers}
    return {axis: width for axis, width in after.items() if axis not in deeper}


def in_list(name: str, path: str) -> tuple[int, str] | None:
    """The index in the list ``path`` that a parameter belongs to, and the rest of its name; None if it is elsewhere."""
    if not name.startswith(f"{path}."):
        return None
    index, _, rest = name.removeprefix(f"{path}.").partition(".")
    return (int(index), rest) if index.isdecimal() and rest else None


def source_of(name: str, layers: Sequence[LayerGrowth]) -> str:
    """What the parameter that ``name`` comes from is called before a growth."""
    for growth in layers:
        if (found := growth.place(name)) is not None:
            return f"{growth.path}.{growth.sources[found[0]]}.{found[1]}"
    return name


def is_new(name: str, layers: Sequence[LayerGrowth]) -> bool:
    """Whether a parameter is in a layer that a growth makes."""
    places = ((growth, growth.place(name)) for growth in layers)
    return any(growth.new[found[0]] for growth, found in places if found is not None)


def renumbered(names: Sequence[str], layers: Sequence[LayerGrowth]) -> list[str]:
    """All names after a growth, from those before it, layer by layer in the place of each list.

    Args:
        names: in the model's order.
        layers: what grows; no list is inside another.
    """
    found: list[str] = []
    whole = {growth.path: growth for growth in layers}
    for path, group in itertools.groupby(names, lambda name: next((p for p in whole if in_list(name, p)), None)):
        if path is None:
            found += group
            continue
        rests: dict[int, list[str]] = {}
        for name in group:
            place = in_list(name, path)
            assert place is not None
            rests.setdefault(place[0], []).append(place[1])
        for layer, source in enumerate(whole[path].sources):
            found += [f"{path}.{layer}.{rest}" for rest in rests.get(source, [])]
    return found


def layer_births(growths: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, tuple[int, ...]]:
    """In which growth every layer came to be, by the list that it is in; 0 for those that were there.

    Args:
        growths: of every growth so far, the sources of the layers of each list that got longer.
    """
    births: dict[str, tuple[int, ...]] = {}
    for number, lists in enumerate(growths, start=1):
        for path, sources in lists.items():
            old = births.get(path, (0,) * (max(sources) + 1))
            births[path] = tuple(
                number if source in sources[:layer] else old[source] for layer, source in enumerate(sources)
            )
    return births


def birth_in(name: str, births: Mapping[str, Sequence[int]]) -> int:
    """In which growth the layer that a parameter is in came to be; 0 if it is in none that ever was new."""
    for path, of_layers in births.items():
        if (found := in_list(name, path)) is not None:
            return of_layers[found[0]]
    return 0
