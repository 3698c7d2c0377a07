"""Values that come from JSON and go back to it: frozen pydantic dataclasses, and their errors in this package's words.

A class states a key once: its type, its limits, its default and what it means. Reading, writing, the hints at
misspelt keys and the reference page all follow from that. Pydantic's own errors are put into words in one place,
:func:`_in_words`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from enum import Enum
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin

import pydantic
import pydantic.dataclasses
from pydantic import AfterValidator, AllowInfNan, ConfigDict, Field, Strict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ArgsKwargs, ErrorDetails
from typing_extensions import Self, dataclass_transform

from ds_sparkling.errors import ConfigError, SparklingError
from ds_sparkling.spec.json_files import json_path, writable


def _writable(value: str) -> str:
    if not writable(value):
        raise ValueError(f"can't have a NUL or half a character, got {shown(value)}")
    return value


#: Bits of a whole number; more don't become a float.
_BITS = 128
#: Characters of a value that an error shows.
_SHOWN = 200


def _fits(number: int) -> int:
    if number.bit_length() > _BITS:
        raise ValueError(f"is {shown(number)}, a number of more than {_BITS} bits")
    return number


def shown(value: object) -> str:
    """A value as an error shows it: its beginning, if it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python doesn't write integers of thousands of digits, nor deep nesting
        return f"an integer of {value.bit_length():,} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


#: A whole number; true isn't one, nor is 1.0.
Integer = Annotated[int, Strict(), AfterValidator(_fits)]
#: A finite number; true isn't one, nor is "3".
Number = Annotated[float, Strict()]
#: A number that was measured, which may have overflown.
Measured = Annotated[float, Strict(), AllowInfNan()]
#: true or false, and no number.
Switch = Annotated[bool, Strict()]
#: A string.
Text = Annotated[str, Strict(), AfterValidator(_writable)]

_SETTINGS = ConfigDict(extra="forbid", allow_inf_nan=False, validate_by_alias=True, validate_by_name=True)


@dataclasses.dataclass(frozen=True)
class InWords:
    """In a field's annotation: what it may hold, where its Python type doesn't say it."""

    words: str


_C = TypeVar("_C", bound="type[Checked]")
_Location = tuple[int | str, ...]


@pydantic.dataclasses.dataclass(frozen=True, config=_SETTINGS)
class Checked:
    """Base of all that :func:`checked` makes.

    What a validator of a subclass says as a :class:`ValueError` goes on after the path of what it looked at ("is
    empty"), or has ``{path}`` where the path belongs. This package's own errors are whole sentences, which follow the
    path if they don't begin with it.

    Attributes:
        ERROR: what is raised for a value that can't be.
        PATH: what a constructor's errors put before the names of fields.
        SPREAD: a field whose keys stand beside the others' in JSON, and not in an object of their own.
    """

    ERROR: ClassVar[type[SparklingError]] = ConfigError
    PATH: ClassVar[str] = ""
    SPREAD: ClassVar[str | None] = None

    @classmethod
    def from_dict(cls, data: Any, path: str = "") -> Self:
        """The value that JSON holds.

        Args:
            data: the JSON, as Python's own types.
            path: where it stands, for errors.

        Raises:
            ConfigError: (or the class's own error) names the key by its path, what was found and what is allowed.
        """
        try:
            value: Self = _adapter(cls).validate_python(data, by_alias=True, by_name=False)
        except ValidationError as error:
            raise cls.ERROR(_in_words(cls, error, path)) from None
        return value

    def to_dict(self) -> dict[str, Any]:
        """As JSON; :meth:`from_dict` reads it."""
        data: dict[str, Any] = _adapter(type(self)).dump_python(self, mode="json")
        return data

    def given(self) -> dict[str, Any]:
        """The fields that don't have their defaults."""
        values = {name: (getattr(self, name), entry) for name, entry in _fields(type(self)).items()}
        return {
            name: value
            for name, (value, entry) in values.items()
            if entry.is_required() or value != entry.get_default(call_default_factory=True)
        }

    @pydantic.model_validator(mode="before")
    @classmethod
    def _know_keys(cls, data: Any) -> Any:
        """Refuse keys that there aren't, with the nearest that there is."""
        if not isinstance(data, Mapping):  # the arguments of a constructor, an instance, or a mistake
            return data
        keys = json_keys(cls)
        _refuse_unknown(data, keys, "{path}.")
        data = dict(data)
        for name, entry in _fields(cls).items():
            twice = [spelling[0] for spelling in _spellings(name, entry) if len(spelling) == 1 and spelling[0] in data]
            if len(twice) > 1:
                both = " and ".join(map(repr, twice))
                raise ValueError(f"{{path}} has both {both}, which mean the same; keep the first")
        for group, members in keys.items():
            if members is None or group not in data:
                continue
            if not isinstance(data[group], Mapping):
                raise ValueError(f"{{path}}.{group} must be an object, got {shown(data[group])}")
            _refuse_unknown(data[group], members, f"{{path}}.{group}.")
            if not data[group]:
                del data[group]
        if cls.SPREAD is not None:
            inner = json_keys(_spread(cls)).keys() & data.keys()
            data[cls.SPREAD] = {key: data.pop(key) for key in inner}
        return data


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, Field))
def checked(*, kw_only: bool = False) -> Callable[[_C], _C]:
    """Make a subclass of :class:`Checked` a frozen dataclass that checks its values however it is made."""

    def make(cls: _C) -> _C:
        made: Any = pydantic.dataclasses.dataclass(frozen=True, kw_only=kw_only, config=_SETTINGS)(cls)
        construct = made.__init__

        @functools.wraps(construct)
        def construct_in_words(self: Any, *args: Any, **kwargs: Any) -> None:
            if kw_only and args:  # pydantic counts what has a Field as positional all the same
                raise TypeError(f"{made.__name__} takes keywords, got {args!r}")
            try:
                construct(self, *args, **kwargs)
            except ValidationError as error:
                raise made.ERROR(_in_words(made, error, made.PATH)) from None

        made.__init__ = construct_in_words
        return made

    return make


# -- keys ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a JSON object, for the reference page.

    Attributes:
        path: from the object on, as ``init.fan_out`` or ``growths[].at_step``.
        type: what it may hold, in words.
        default: as JSON; None if it must be given.
        meaning: one or two sentences.
    """

    path: str
    type: str
    default: Any
    meaning: str


def json_keys(kind: type[Checked]) -> dict[str, dict[str, None] | None]:
    """The keys of the JSON object that ``kind`` is read from; of one that holds others, these."""
    keys: dict[str, dict[str, None] | None] = {}
    for name, entry in _fields(kind).items():
        if name == kind.SPREAD:
            keys.update(json_keys(_spread(kind)))
            continue
        for first, *rest in _spellings(name, entry):
            if not rest:
                keys[first] = None
            else:
                group = keys.setdefault(first, {})
                assert group is not None
                group[rest[0]] = None
    return keys


def described_keys(kind: type[Checked], before: str = "") -> Iterator[Key]:
    """Every key of the JSON that ``kind`` is read from, with those of the objects in it."""
    for name, entry in _fields(kind).items():
        if name == kind.SPREAD:
            yield from described_keys(_spread(kind), before)
            continue
        path = before + ".".join(_spellings(name, entry)[0])
        default = None
        if not entry.is_required():
            default = TypeAdapter(_annotated(entry)).dump_python(
                entry.get_default(call_default_factory=True), mode="json"
            )
        yield Key(path, _type_in_words(entry), default, entry.description or "")
        inner, many = _inner(entry.annotation)
        if inner is not None:
            yield from described_keys(inner, f"{path}[]." if many else f"{path}.")


def nearest(found: Any, known: Collection[str]) -> str:
    """What might be meant by ``found``, and all that is known."""
    near = difflib.get_close_matches(str(found)[:_SHOWN], known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}known: {', '.join(sorted(known))}"


def _refuse_unknown(data: Mapping[Any, Any], known: Collection[str], where: str) -> None:
    for key in data:
        if key not in known:
            raise ValueError(f"{where}{key}: unknown key; {nearest(key, known)}")


def _fields(kind: type[Checked]) -> dict[str, FieldInfo]:
    found: dict[str, FieldInfo] = kind.__pydantic_fields__  # type: ignore[attr-defined]
    return {name: entry for name, entry in found.items() if entry.init is not False}


def _spread(kind: type[Checked]) -> type[Checked]:
    inner: Any = _fields(kind)[str(kind.SPREAD)].annotation
    assert issubclass(inner, Checked)
    return inner


def _spellings(name: str, entry: FieldInfo) -> list[list[str]]:
    """How a field may be called in JSON, each as the path to it; the first is the one to use."""
    alias = entry.validation_alias
    choices = alias.choices if isinstance(alias, pydantic.AliasChoices) else [name if alias is None else alias]
    return [[choice] if isinstance(choice, str) else [str(key) for key in choice.path] for choice in choices]


def _annotated(entry: FieldInfo) -> Any:
    """The field's annotation as it was written."""
    annotated: Any = Annotated
    parts = (entry.annotation, *entry.metadata, None)
    return annotated[parts]


def _inner(annotation: Any) -> tuple[type[Checked] | None, bool]:
    """The class of what a field holds, and whether it holds many in a list."""
    if isinstance(annotation, type) and issubclass(annotation, Checked):
        return annotation, False
    if get_origin(annotation) is tuple:
        return _inner(get_args(annotation)[0])[0], True
    return None, False


#: The TypeAdapter of a class, made once.
_adapter: Callable[[Any], TypeAdapter[Any]] = functools.cache(TypeAdapter)


# -- words ---------------------------------------------------------------------------------------------------------

_KINDS = {
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "an object",
    "dataclass_type": "an object",
    "dataclass_exact_type": "an object",
}


def _in_words(kind: type[Checked], error: ValidationError, path: str) -> str:
    """The first thing that pydantic found wrong, as one sentence.

    Args:
        kind: what was made.
        error: what came of it.
        path: where the JSON stands; empty for a constructor.
    """
    found = error.errors(include_url=False)[0]
    location = _as_in_json(kind, found["loc"])
    if found["type"] == "missing" or found["type"] == "missing_argument":
        return f"{_path(path, location[:-1]) or kind.__name__} lacks {location[-1]!r}"
    where = _path(path, location)
    cause = found.get("ctx", {}).get("error")
    if isinstance(cause, SparklingError):
        text = str(cause)
        return text if not where or text.startswith(where) else f"{where}: {text}"
    if isinstance(cause, Exception):
        text = str(cause)
        if "{path}" not in text:
            return f"{where} {text}".strip()
        return text.replace("{path}", where) if where else re.sub(r"\{path\}(\.|: )?", "", text)
    return f"{where or kind.__name__} {_complaint(found)}"


def _complaint(found: ErrorDetails) -> str:
    given, limits = found["input"], found.get("ctx", {})
    if isinstance(given, ArgsKwargs):
        return found["msg"]
    if found["type"] in _KINDS:
        return f"must be {_KINDS[found['type']]}, got {shown(given)}"
    if found["type"] == "enum":
        allowed = re.findall("'([^']*)'", limits["expected"])
        return f"is {shown(given)}; {nearest(given, allowed)}"
    if found["type"] in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        ((limit, bound),) = limits.items()
        return f"must {_LIMITS[limit](bound)}, got {shown(given)}"
    return f"can't be {shown(given)}: {found['msg']}"


def _at_least(bound: float) -> str:
    if bound in (0, 1):
        return "be positive" if bound else "not be negative"
    return f"be at least {bound:g}"


_LIMITS: dict[str, Callable[[float], str]] = {
    "ge": _at_least,
    "gt": lambda bound: "be positive" if bound == 0 else f"be more than {bound:g}",
    "le": lambda bound: f"be at most {bound}",
    "lt": lambda bound: f"be less than {bound:g}",
}


def _as_in_json(kind: type[Checked], location: _Location) -> _Location:
    """A location with the keys that JSON has for a constructor's arguments and for what is spread."""
    if not location:
        return location
    entries = _fields(kind)
    first = list(entries)[location[0]] if isinstance(location[0], int) else location[0]
    if first == kind.SPREAD:
        return _as_in_json(_spread(kind), location[1:])
    if first in entries:
        return (*_spellings(first, entries[first])[0], *location[1:])
    return location


def _path(start: str, location: _Location) -> str:
    return json_path([start, *location] if start else location)


def _type_in_words(entry: FieldInfo) -> str:
    said = [word.words for word in entry.metadata if isinstance(word, InWords)]
    words = said[0] if said else _annotation_in_words(entry.annotation)
    bounds = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    limits = [
        f"{text} {getattr(limit, name):.10g}"
        for limit in entry.metadata
        for name, text in bounds.items()
        if hasattr(limit, name)
    ]
    return ", ".join([words, *limits])


def _annotation_in_words(annotation: Any) -> str:
    plain = {int: "integer", float: "number", bool: "true or false", str: "string", types.NoneType: "null"}
    if annotation in plain:
        return plain[annotation]
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _annotation_in_words(inner[0])
    if origin in (Union, types.UnionType):
        return " or ".join(map(_annotation_in_words, inner))
    if origin is tuple:
        return "list of objects" if _inner(annotation)[0] is not None else f"list of {_annotation_in_words(inner[0])}s"
    if origin is dict:
        return f"object of name: {_annotation_in_words(inner[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " | ".join(f'"{member.value}"' for member in annotation)
    return "object"
