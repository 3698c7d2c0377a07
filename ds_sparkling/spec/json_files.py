"""JSON as every part of this package reads it from files.

Python's own reader keeps the last of two equal keys, fails in its own words on integers of thousands of digits and on
deep nesting, and lets pass what no path, number or output can hold. Here all of it is refused, by where it stands.
"""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_sparkling.files import check_regular

#: Bytes that are read at most: the record of a model of 100,000 parameters takes a third of it.
_LARGEST = 64 << 20
#: Objects and lists within one another. What handles a config later, DeepSpeed among them, goes down by recursion.
_DEEPEST = 100
#: Digits of an integer that a float can hold.
_LONGEST = 308


class _Refused:
    """Stands for a value that isn't taken, until it is known where it stands."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def load_json(path: Path) -> Any:
    """What a JSON file holds.

    Args:
        path: of the file.

    Returns:
        As :func:`parse_json`.

    Raises:
        OSError: if it can't be read, or is a FIFO or a device, at which one might wait for ever; what a shell passes on
            as ``/dev/...`` is read.
        ValueError: as :func:`parse_json`, or if it is larger than any such file.
    """
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "a file's name can't have a NUL")
    if path.parts[:2] != ("/", "dev"):
        check_regular(path)
    with path.open("rb") as file:
        data = file.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise ValueError(f"it has more than {_LARGEST >> 20} MiB")
    return parse_json(data)


def parse_json(data: bytes) -> Any:
    """What JSON says.

    Args:
        data: as it stands in the file.

    Returns:
        Python's own types. No string has a NUL or half a character, no number is beyond a float's range (``NaN`` and
        ``Infinity`` are read where they are written so), and nothing nests deeper than a hundred levels.

    Raises:
        ValueError: if it isn't JSON, has a key twice, or something that isn't taken, which is named by its path.
    """
    try:
        value = json.loads(data.decode(), object_pairs_hook=_object, parse_int=_integer, parse_float=_number)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"it isn't JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"it nests deeper than {_DEEPEST} levels") from None
    _check(value, [])
    return value


def json_path(steps: Sequence[str | int]) -> str:
    """Where something stands, as ``growths[1].widths``."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        found[key] = _Refused("stands there twice; keep one") if key in found else value
    return found


def _integer(text: str) -> int | _Refused:
    digits = len(text.lstrip("-"))
    return (
        int(text) if digits <= _LONGEST else _Refused(f"is an integer of {digits:,} digits; no setting is that large")
    )


def _number(text: str) -> float | _Refused:
    number = float(text)
    return _Refused("is beyond the range of numbers") if math.isinf(number) else number


def _check(value: Any, where: list[str | int]) -> None:
    """Raise ValueError at the first thing in ``value``, which stands at ``where``, that isn't taken."""
    if isinstance(value, _Refused):
        raise ValueError(f"{json_path(where)} {value.reason}".strip())
    if isinstance(value, str) and not writable(value):
        raise ValueError(f"{json_path(where)} is {value!r}, which has a NUL or half a character".strip())
    if not isinstance(value, (dict, list)):
        return
    if len(where) >= _DEEPEST:
        raise ValueError(f"{json_path(where[:3])}... nests deeper than {_DEEPEST} levels")
    for step, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(step, str) and not writable(step):
            raise ValueError(f"{json_path(where)} has the key {step!r}, with a NUL or half a character".strip())
        where.append(step)
        _check(inner, where)
        where.pop()


def writable(text: str) -> bool:
    """Whether a path, a terminal and a file can all hold ``text``: no NUL in it, and no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text
