"""Runs as they left their curves in TensorBoard's event files.

A growth opens a new file, and so does a resumption, which may go back behind the end of the file before it. A point's
place in a run is its sample count and, as a validation before a growth and one after it share that, the growth in
force. Where a later file begins, everything behind that place in earlier ones is dropped; at the same place its points
replace theirs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ds_sparkling.errors import SparklingError
from ds_sparkling.progress import progress_bar
from ds_sparkling.report.event_records import Unread, records
from ds_sparkling.spec.run_summary import RunSummary, read_summary
from ds_sparkling.text_tables import printable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]

#: What is read; all of it over the sample count. Others' tags may be over anything.
_PREFIXES = (
    "Train/",
    "Validation/",
    "Growth/",
    "lr/",
    "update_rms/",
    "twins/",
    "activation_",
    "effective_rank/",
    "router/",
)
_GROWTH = "Growth/"
_NUMBER = "Growth/number"
#: A number of growths, units or parameters is below this.
_MOST = 2.0**63
_PLAN = "Growth/plan/text_summary"
#: What releases before 0.2 called a growth's number and the learning rate of its elements.
_FORMER = {"Growth/stage": _NUMBER, "lr/stage_": "lr/birth_"}


class RunPosition(NamedTuple):
    """Where a point is: samples seen, and growths done."""

    samples: int
    growths: int


class Event(NamedTuple):
    """A point as it stands in a file; ``wall_time`` in seconds orders the points of one file."""

    wall_time: float
    samples: int
    value: float


@dataclass(frozen=True)
class EventFile:
    """The contents of one file: scalars by tag, the growth plans as (samples, text), and what isn't in here, in
    words."""

    scalars: dict[str, list[Event]]
    plans: list[tuple[int, str]]
    notes: list[str]


@dataclass(frozen=True)
class TagCurve:
    """One tag of a run, by place.

    Attributes:
        samples: [points], ascending; twice the same where a growth was.
        values: [points].
        growths: [points], growths done.
    """

    samples: FloatArray
    values: FloatArray
    growths: FloatArray

    def since(self, number: int) -> TagCurve:
        """The points since growth ``number``."""
        keep = self.growths >= number
        return TagCurve(self.samples[keep], self.values[keep], self.growths[keep])

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True, kw_only=True)
class ReadGrowth:
    """A growth that a run went through: its number, where, to which widths and parameters, and the plan as text."""

    number: int
    samples: int
    widths: dict[str, int]
    parameters: int | None
    active_parameters: int | None
    plan: str | None


@dataclass(frozen=True, kw_only=True)
class ReadRun:
    """A run, read.

    Attributes:
        name: what it is called in the report.
        path: what was asked for.
        curves: by tag.
        growths: in order.
        summary: what the main job left at the end, if it did.
        notes: what of its files couldn't be read and was left out, a sentence each.
    """

    name: str
    path: Path
    curves: dict[str, TagCurve]
    growths: tuple[ReadGrowth, ...]
    summary: RunSummary | None
    notes: tuple[str, ...] = ()

    @property
    def grown_elsewhere(self) -> bool:
        """Whether it shows new elements whose growth it hasn't recorded, as one that was widened offline does."""
        return not self.growths and ("lr/birth_1" in self.curves or "twins/cosine" in self.curves)

    def curve(self, *tags: str) -> TagCurve | None:
        """The first of these tags that the run has points of."""
        return next((self.curves[tag] for tag in tags if tag in self.curves), None)

    def family(self, prefix: str) -> dict[str, TagCurve]:
        """The curves of all tags ``prefix/NAME``, by NAME."""
        start = f"{prefix}/"
        return {tag.removeprefix(start): curve for tag, curve in self.curves.items() if tag.startswith(start)}

    def spent(self, tag: str, samples: FloatArray) -> FloatArray | None:
        """Tokens or compute (``tag``) when so many samples were seen; NaN beyond what the run has recorded.

        Both start at 0 and are linear between points, as long as the model's width doesn't change between them.
        """
        known = self.curve(tag)
        if known is None:
            return None
        return np.interp(
            samples, np.concatenate(([0.0], known.samples)), np.concatenate(([0.0], known.values)), right=np.nan
        )


def read_run(path: Path, name: str) -> ReadRun:
    """Everything a run has left under ``path``.

    Args:
        path: a run's directory, or the directory of its event files.
        name: what it is to be called.

    Raises:
        SparklingError: if there are no event files, those of several runs, or nothing readable in them.
    """
    readable, notes = _readable(_files(path))
    with progress_bar(readable, desc=name, shown=None) as bar:
        files = sorted(map(_read, bar), key=_begin)
    notes += [note for _, file in files for note in file.notes]
    curves = merge([file for _, file in files])
    if not curves and notes:
        raise SparklingError(f"{path}: nothing in the event files can be read: " + "; ".join(notes))
    if not curves:
        raise SparklingError(
            f"{path}: the event files hold none of the curves that the report knows; "
            "was the run stopped before its first log_every steps?"
        )
    growths = _growths(curves, [plan for _, file in files for plan in file.plans])
    summary = _outcome(path, notes)
    return ReadRun(name=name, path=path, curves=curves, growths=growths, summary=summary, notes=tuple(notes))


def merge(files: Sequence[EventFile]) -> dict[str, TagCurve]:
    """The curves of a run from its files, which are in the order in which they were opened."""
    points: dict[str, dict[RunPosition, float]] = {}
    for file in files:
        if not file.scalars:
            continue
        placed = _placed(file, points.get(_NUMBER, {}))
        begin = min(place for tag in placed.values() for place in tag)
        points = {tag: {place: v for place, v in known.items() if place <= begin} for tag, known in points.items()}
        for tag, more in placed.items():
            points.setdefault(tag, {}).update(more)
    return {tag: _curve(known) for tag, known in points.items() if known}


def _placed(file: EventFile, earlier_growths: dict[RunPosition, float]) -> dict[str, dict[RunPosition, float]]:
    """A file's points by place; the growths before it tell how many it begins with, unless it begins with one."""
    start = min(event.samples for events in file.scalars.values() for event in events)
    numbers = sorted(file.scalars.get(_NUMBER, []))
    growths = [
        event
        for event, last in zip(numbers, [None, *numbers], strict=False)
        if last is None or last.value != event.value
    ]
    before = max((place.growths for place in earlier_growths if place.samples < start), default=0)
    if growths and growths[0].samples == start:
        before = int(growths[0].value)

    def place(event: Event) -> RunPosition:
        done = [int(growth.value) for growth in growths if growth.wall_time <= event.wall_time]
        return RunPosition(event.samples, done[-1] if done else before)

    return {tag: {place(event): event.value for event in events} for tag, events in file.scalars.items()}


def _curve(points: dict[RunPosition, float]) -> TagCurve:
    ordered = sorted(points)
    samples, growths = (np.array([place[index] for place in ordered], float) for index in (0, 1))
    return TagCurve(samples, np.array([points[place] for place in ordered], float), growths)


def _growths(curves: dict[str, TagCurve], plans: Sequence[tuple[int, str]]) -> tuple[ReadGrowth, ...]:
    if _NUMBER not in curves:
        return ()
    marks = {tag: curve for tag, curve in curves.items() if tag.startswith("Growth/") and tag != _NUMBER}
    texts = dict(plans)
    growths = []
    numbers, first, times = np.unique(curves[_NUMBER].values, return_index=True, return_counts=True)
    for number, samples, count in zip(numbers, curves[_NUMBER].samples[first], times, strict=True):
        # The number is written all along, so a run may begin with one: it grew before these files were written.
        elsewhere = number == numbers[0] and count > 1 and int(samples) not in texts
        if not number or elsewhere:
            continue
        values = {
            tag.removeprefix("Growth/"): int(curve.values[curve.samples == samples][-1])
            for tag, curve in marks.items()
            if samples in curve.samples
        }
        parameters, active = values.pop("parameters", None), values.pop("active_parameters", None)
        growths.append(
            ReadGrowth(
                number=int(number),
                samples=int(samples),
                widths=values,
                parameters=parameters,
                active_parameters=active,
                plan=texts.get(int(samples)),
            )
        )
    return tuple(growths)


def _files(path: Path) -> list[Path]:
    """The event files of the one run under ``path``."""
    if not path.is_dir():
        found = "is a file" if path.exists() else "doesn't exist"
        raise SparklingError(f"{path} {found}; pass a run's directory, or the directory of its event files")
    files = sorted(path.rglob("events.out.tfevents.*"))
    if not files:
        raise SparklingError(
            f"{path} has no TensorBoard event files below it; pass the directory given to the run as --output, or "
            'enable "tensorboard" in its DeepSpeed config'
        )
    directories = sorted({file.parent for file in files})
    if len(directories) > 1:
        raise SparklingError(
            f"{path} has event files of more than one run below it; pass those to compare: "
            + " ".join(map(str, directories))
        )
    return files


def _read(file: Path) -> tuple[float, EventFile]:
    """When the file was opened, and what is in it."""
    # Here, so that --help doesn't wait for it.
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboard.compat.proto.event_pb2 import Event as Written

    opened: float | None = None
    found = EventFile({}, [], [])
    unread: list[Unread] = []
    odd: Counter[str] = Counter()
    for record in records(file):
        if isinstance(record, Unread):
            unread.append(record)
            continue
        begin, data = record
        try:
            event = Written.FromString(data)
        except DecodeError:
            unread.append(Unread(begin=begin, end=begin + len(data)))
            continue
        opened = event.wall_time if opened is None else opened
        for value in event.summary.value:
            _take(value, event, found, odd)
    empty = ["it is empty"] if opened is None and not unread else []
    found.notes.extend(f"{file}: {note}" for note in (*empty, *_unread_in_words(unread, file), *_odd_in_words(odd)))
    return opened or 0.0, found


def _take(value: Any, event: Any, found: EventFile, odd: Counter[str]) -> None:
    """Sort one value of an event into what was found, or count what it should have been."""
    if value.tag == _PLAN:
        text = value.tensor.string_val
        if text:
            found.plans.append((event.step, text[0].decode(errors="replace").strip("`\n")))
        else:
            odd["plan(s) that aren't text"] += 1
    elif value.tag.startswith(_PREFIXES):
        tag = _today(value.tag)
        number, counts = _number(value), tag.startswith(_GROWTH)
        if number is None or (counts and not (0 <= number < _MOST and number.is_integer())):
            odd[f"value(s) of {tag} that aren't {'whole ' * counts}numbers"] += 1
        else:
            found.scalars.setdefault(tag, []).append(Event(event.wall_time, event.step, number))


def _number(value: Any) -> float | None:
    """The number that a value of an event is, as torch writes it or as TensorFlow does; None if it is none."""
    if value.HasField("simple_value"):
        return float(value.simple_value)
    if not value.HasField("tensor"):
        return None
    from tensorboard.util.tensor_util import make_ndarray

    try:
        return float(make_ndarray(value.tensor).item())
    except (TypeError, ValueError, KeyError, AttributeError):  # of another type, or of several elements
        return None


def _unread_in_words(unread: Sequence[Unread], file: Path) -> Iterator[str]:
    damaged = [part for part in unread if not part.unfinished]
    if damaged:
        first, size = damaged[0], sum(part.end - part.begin for part in damaged)
        yield (
            f"{size:,} of {file.stat().st_size:,} bytes can't be read, from byte {first.begin:,} on "
            f"({len(damaged)} place(s)), so points are missing; take the file from a copy if there is one"
        )
    for part in unread:
        if part.unfinished:
            yield (
                f"the last record, {part.end - part.begin:,} bytes from byte {part.begin:,} on, isn't whole: the run "
                "is still writing it, or was killed"
            )


def _odd_in_words(odd: Mapping[str, int]) -> Iterator[str]:
    for what, count in odd.items():
        yield f"{count} {what} left out"


def _today(tag: str) -> str:
    """A tag's name today, from that in a file of any release."""
    return next((now + tag.removeprefix(then) for then, now in _FORMER.items() if tag.startswith(then)), tag)


def _begin(file: tuple[float, EventFile]) -> float:
    return file[0]


def _readable(files: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The files that can be opened, and what is wrong with the others."""
    readable, notes = [], []
    for file in files:
        try:
            if file.is_file():
                file.open("rb").close()
                readable.append(file)
            else:
                notes.append(f"{file} is left out: {'a link to nothing' if file.is_symlink() else 'not a file'}")
        except OSError as error:
            notes.append(f"{file} is left out: {error.strerror}")
    return readable, notes


def _outcome(path: Path, notes: list[str]) -> RunSummary | None:
    """The summary in the run's directory, where ``path`` may be the event directory in it; one that can't be read is
    noted."""
    for directory in (path, path.parent):
        try:
            found = read_summary(directory)
        except SparklingError as error:
            notes.append(f"the summary is left out: {error}")
            continue
        if found is not None:
            return found
    return None


def default_names(paths: Sequence[Path]) -> list[str]:
    """Short names that tell the runs apart: the ends of their paths, as long as need be."""
    parts = [_parts(path) for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if _repeated(names) is None:
            return names
    return ["/".join(part) for part in parts]


def _parts(path: Path) -> tuple[str, ...]:
    parts = path.resolve().parts
    return parts[:-1] if parts[-1] == "tensorboard" else parts


def read_runs(paths: Sequence[Path], names: Sequence[str] | None = None) -> list[ReadRun]:
    """All runs, named.

    Raises:
        SparklingError: if a run can't be read, or names don't tell the runs apart.
    """
    names = list(names) if names is not None else default_names(paths)
    if len(names) != len(paths):
        raise SparklingError(f"--names gives {len(names)} names to {len(paths)} runs; give one to each")
    twice = _repeated(names)
    if twice is not None:
        raise SparklingError(f"two runs are called {twice!r}; pass different runs, or --names that tell them apart")
    names = [printable(name) for name in names]
    return [read_run(path, name) for path, name in zip(paths, names, strict=True)]


def _repeated(names: Sequence[str]) -> str | None:
    return next((name for index, name in enumerate(names) if name in names[:index]), None)
