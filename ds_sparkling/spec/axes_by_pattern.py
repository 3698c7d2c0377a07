"""Match what a user says of parameters that probing can't read, by patterns of their names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from ds_sparkling.errors import ConfigError, PlanError
from ds_sparkling.spec.axes import ParamAxes
from ds_sparkling.spec.checked import shown

#: Stands in a hint for a dimension that is to be filled in.
TO_FILL = "?"

#: Numbers in an escaped name: parts of their own, and those of layers and experts that are attributes of their own.
_NUMBERS = re.compile(r"(?<=\\\.)\d+(?=\\\.|$)|(?<=expert)\d+|(?<=expert_)\d+|(?<=layer)\d+|(?<=layer_)\d+")


def name_pattern(name: str) -> str:
    """A pattern that matches ``name`` and all that differ from it in the numbers of layers and experts alone."""
    return _NUMBERS.sub(r"\\d+", re.escape(name))


def parse_hints(entries: Any, where: str) -> dict[str, ParamAxes]:
    """Pattern -> axes, from JSON; ``shape`` in an entry is for the reader.

    Args:
        entries: the JSON, or axes that were read before.
        where: what holds the entries, for errors.

    Raises:
        ConfigError: names the entry that can't be read.
    """
    if not isinstance(entries, Mapping):
        raise ConfigError(f"{where} must be an object, got {shown(entries)}")
    return {pattern: _parse_hint(pattern, entry, f"{where}.{pattern}") for pattern, entry in entries.items()}


def _parse_hint(pattern: str, entry: Any, where: str) -> ParamAxes:
    if isinstance(entry, ParamAxes):
        return entry
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where} must be an object, got {shown(entry)}")
    dims = entry.get("dims")
    if isinstance(dims, Collection) and TO_FILL in dims:
        raise ConfigError(f"{where}: still has a {TO_FILL!r} to fill in")
    try:
        re.compile(pattern)
        return ParamAxes.from_dict({key: entry[key] for key in entry if key != "shape"}, where)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"{where}: it isn't a pattern: {error}") from error
    except PlanError as error:
        raise ConfigError(str(error)) from error


def hintable(
    shapes: Mapping[str, tuple[int, ...]], buffers: Collection[str], hints: Mapping[str, ParamAxes]
) -> dict[str, tuple[int, ...]]:
    """What patterns may mean: parameters, and buffers that have as many dimensions as they say."""

    def fits(name: str) -> bool:
        return any(re.fullmatch(pattern, name) and len(h.dims) == len(shapes[name]) for pattern, h in hints.items())

    return {name: shape for name, shape in shapes.items() if name not in buffers or fits(name)}


def match_hints(
    hints: Mapping[str, ParamAxes], shapes: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, ParamAxes]:
    """The axes of the parameters that patterns match.

    Args:
        shapes: of all parameters.
        where: what holds the hints, for errors.

    Raises:
        PlanError: if patterns contradict each other or a parameter's shape, or match nothing.
    """
    found: dict[str, ParamAxes] = {}
    used: set[str] = set()
    for name, shape in shapes.items():
        matching = [pattern for pattern in hints if re.fullmatch(pattern, name)]
        used.update(matching)
        if len({hints[pattern] for pattern in matching}) > 1:
            raise PlanError(f"{where}: {name} matches {', '.join(map(repr, matching))}, which differ")
        if not matching:
            continue
        if len(hints[matching[0]].dims) != len(shape):
            raise PlanError(f"{where}.{matching[0]} has {len(hints[matching[0]].dims)} dims, but {name} is {shape}")
        found[name] = hints[matching[0]]
    for pattern in hints:
        if pattern not in used:
            raise PlanError(f"{where}.{pattern} matches no parameter")
    return found
