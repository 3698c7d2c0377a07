"""The growth record: which growths a run has been through. It travels in every checkpoint as ``ds_sparkling.json``.

It is JSON next to DeepSpeed's files, so a resume or a tool learns the model's widths without unpickling anything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ds_sparkling.errors import CheckpointError
from ds_sparkling.files import whole_file
from ds_sparkling.spec.axes import ParamAxes
from ds_sparkling.spec.strategy import Strategy

FILE_NAME = "ds_sparkling.json"
_FORMAT = 2


@dataclass(frozen=True)
class RecordedGrowth:
    """One growth that has happened.

    Attributes:
        step: optimizer steps done when it happened.
        planned_step: the ``at_step`` of the planned growth that it fulfilled; None if ``grow`` was called by hand.
        widths: the axes that grew, and to what.
        strategy: how.
    """

    step: int
    planned_step: int | None
    widths: dict[str, int]
    strategy: Strategy

    def to_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "planned_step": self.planned_step,
            "widths": dict(self.widths),
            "strategy": self.strategy.to_dict(),
        }


@dataclass(frozen=True)
class Spent:
    """What a run has spent so far.

    Attributes:
        tokens: tokens trained on.
        flops: training compute, 6 x active parameters x tokens (Eq. 29).
    """

    tokens: int = 0
    flops: float = 0.0

    def plus(self, tokens: int, active: int) -> Spent:
        """What it is after ``tokens`` more, on a model of ``active`` parameters per token."""
        return Spent(self.tokens + tokens, self.flops + 6.0 * active * tokens)


@dataclass(frozen=True)
class GrowthRecord:
    """The widths a run started with, what its parameters' dimensions are, and the growths so far.

    Attributes:
        initial_widths: of every axis, grown or not.
        axes: of the model's parameters as built.
        growths: in order.
        tried: the axes of which ``axes`` is known to be right.
        spent: by the time of the checkpoint that the record is in; None if nobody knows.
        proved: growths, in words, that were shown to keep the model's function, and the fingerprint of what that holds
            for: the growth, the axes and the model.
    """

    initial_widths: dict[str, int]
    axes: dict[str, ParamAxes]
    growths: tuple[RecordedGrowth, ...] = ()
    tried: tuple[str, ...] = ()
    spent: Spent | None = field(default=None, compare=False)
    proved: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def widths(self) -> dict[str, int]:
        """The widths in force."""
        widths = dict(self.initial_widths)
        for growth in self.growths:
            widths.update(growth.widths)
        return widths

    @property
    def width_history(self) -> dict[str, tuple[int, ...]]:
        """Per axis, its width at the start and after every growth."""
        history = {axis: [width] for axis, width in self.initial_widths.items()}
        for growth in self.growths:
            for axis, widths in history.items():
                widths.append(growth.widths.get(axis, widths[-1]))
        return {axis: tuple(widths) for axis, widths in history.items()}

    def after(
        self, widths: Mapping[str, int], strategy: Strategy, *, step: int, planned_step: int | None
    ) -> GrowthRecord:
        """The record once the axes in ``widths`` have grown to them."""
        growth = RecordedGrowth(step, planned_step, dict(widths), strategy)
        return replace(self, growths=(*self.growths, growth))

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "initial_widths": dict(self.initial_widths),
            "widths": self.widths,
            "stages": [growth.to_dict() for growth in self.growths],
            "tried": list(self.tried),
            "spent": None if self.spent is None else asdict(self.spent),
            "proved": dict(self.proved),
            "axes": {name: axes.to_dict() for name, axes in self.axes.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GrowthRecord:
        if data["format"] != _FORMAT:
            raise ValueError(f"format {data['format']!r}, expected {_FORMAT}")
        return cls(
            dict(data["initial_widths"]),
            {name: ParamAxes.from_dict(axes) for name, axes in data["axes"].items()},
            tuple(
                RecordedGrowth(s["step"], s["planned_step"], dict(s["widths"]), Strategy.from_dict(s["strategy"]))
                for s in data["stages"]
            ),
            tuple(data["tried"]),
            Spent(**data["spent"]) if data.get("spent") else None,
            dict(data.get("proved") or {}),
        )

    def write(self, checkpoint: Path) -> None:
        """Write the record into the checkpoint directory ``checkpoint`` (DIR/TAG), by a rename.

        Raises:
            SparklingError: if the file system refuses.
        """
        with whole_file(checkpoint / FILE_NAME) as part:
            checkpoint.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(self.to_dict(), indent=1))


def read_record(checkpoint: Path) -> GrowthRecord | None:
    """The record in the checkpoint directory ``checkpoint`` (DIR/TAG); None if it has none.

    Raises:
        CheckpointError: if the file is damaged or of an unknown format.
    """
    path = checkpoint / FILE_NAME
    try:
        return GrowthRecord.from_dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"growth record {path} can't be read: {type(error).__name__}: {error}") from error


def find_checkpoint(
    directory: str | os.PathLike[str], tag: str | None = None, *, universal: bool | None = False
) -> Path | None:
    """The checkpoint directory that ``load_checkpoint(directory, tag)`` would load; None if there is none yet.

    Args:
        directory, tag: as in ``load_checkpoint``.
        universal: whether the engine loads universal checkpoints, whose newest is named in ``latest_universal`` instead
            of ``latest``; None if nobody knows: then ``latest_universal`` counts where it is the only one.

    Raises:
        CheckpointError: if a tag is given, or named in ``latest``, and doesn't exist.
    """
    root = Path(directory)
    latest = root / ("latest_universal" if universal else "latest")
    if universal is None and not latest.is_file():
        latest = root / "latest_universal"
    if tag is None and not latest.is_file():
        return None
    name = tag if tag is not None else latest.read_text().strip()
    if not name:
        raise CheckpointError(f"{latest} is empty; write the tag to load into it, or pass tag=")
    path = root / name
    if not path.is_dir():
        source = "given" if tag is not None else f"named in {latest}"
        raise CheckpointError(f"checkpoint {path} ({source}) doesn't exist")
    return path


def recorded_widths(
    checkpoint: str | os.PathLike[str] | None, tag: str | None = None, *, universal: bool | None = None
) -> dict[str, int]:
    """The widths at which a model has to be built to be loaded from ``checkpoint``: ``build_model(**widths)``.

    Args:
        checkpoint: a directory to load a checkpoint from; None if there is none.
        tag: the checkpoint in it; the one named in ``latest`` by default.
        universal: whether the engine is going to load universal checkpoints (``checkpoint.load_universal`` in its
            config), whose newest is named in ``latest_universal``; by default if there are no others.

    Returns:
        Nothing if there is no checkpoint yet, or one without a growth record: the starting widths.

    Raises:
        CheckpointError: as :func:`find_checkpoint` and :func:`read_record`.
    """
    found = None if checkpoint is None else find_checkpoint(checkpoint, tag, universal=universal)
    record = None if found is None else read_record(found)
    return {} if record is None else record.widths
