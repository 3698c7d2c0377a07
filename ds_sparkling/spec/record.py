"""The growth record: which growths a run has been through. It travels in every checkpoint as ``ds_sparkling.json``.

It is JSON next to DeepSpeed's files, so a resume or a tool learns the model's widths without unpickling anything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from ds_sparkling.errors import CheckpointError, PlanError, SparklingError
from ds_sparkling.files import whole_file
from ds_sparkling.spec.axes import GrownWidths, Norm, ParamAxes, Widths
from ds_sparkling.spec.checked import Checked, Integer, Number, Text, checked, shown
from ds_sparkling.spec.json_files import load_json
from ds_sparkling.spec.layers import LayerGrowth, layer_births, renumbered, source_of
from ds_sparkling.spec.strategy import Strategy

FILE_NAME = "ds_sparkling.json"
#: 3 knew no new layers; 2 said "stages" where 3 says "growths"; 1 also knew only norms that divide by the RMS, and
#: didn't say so.
_FORMAT = 4
#: What to do about a record that can't be.
_WAY_OUT = "copy it again from where it is whole, or take another checkpoint"


@checked()
class RecordedGrowth(Checked):
    """One growth that has happened."""

    ERROR = CheckpointError

    step: Integer = Field(ge=0, description="Optimizer steps done when it happened.")
    planned_step: Annotated[Integer, Field(ge=0)] | None = Field(
        description="The at_step of the planned growth that it fulfilled. null if grow was called by hand."
    )
    widths: GrownWidths = Field(description="The axes that grew, and to what.")
    strategy: Strategy = Field(description="How they grew.")
    layers: dict[str, tuple[Annotated[Integer, Field(ge=0)], ...]] = Field(
        default_factory=dict,
        description="Of every list of layers that got longer, by its name: the old layer that each layer comes from.",
    )


@checked()
class Spent(Checked):
    """What a run has spent so far."""

    ERROR = CheckpointError

    tokens: Integer = Field(default=0, ge=0, description="Tokens trained on.")
    flops: Number = Field(default=0.0, ge=0, description="Training compute, 6 x active parameters x tokens (Eq. 29).")

    def plus(self, tokens: int, active: int) -> Spent:
        """What it is after ``tokens`` more, on a model of ``active`` parameters per token."""
        return Spent(self.tokens + tokens, self.flops + 6.0 * active * tokens)


def growth_in_words(before: Mapping[str, int], after: Mapping[str, int | str]) -> str:
    """What grows, in words: every axis in ``after``, from its width in ``before``."""
    return ", ".join(f"{axis} {before.get(axis, '?')} -> {after[axis]}" for axis in sorted(after))


@checked()
class GrowthRecord(Checked):
    """The widths a run started with, what its parameters' dimensions are, and the growths so far."""

    ERROR = CheckpointError

    initial_widths: Widths = Field(description="Of every axis, grown or not.")
    axes: dict[str, ParamAxes] = Field(description="Of the model's parameters as built, by name.")
    growths: tuple[RecordedGrowth, ...] = Field(default=(), description="In order.")
    tried: tuple[Text, ...] = Field(default=(), description="The axes of which the record is known to be right.")
    layer_axes: tuple[Text, ...] = Field(default=(), description="Those of the axes that count layers.")
    spent: Annotated[
        Spent | None,
        Field(description="By the time of the checkpoint that the record is in. null if nobody knows."),
    ] = field(default=None, compare=False, kw_only=True)
    proved: Annotated[
        dict[str, Text],
        Field(
            description="Growths to come, in words, that were shown to keep the model's function, and the fingerprint "
            "of what that holds for: the growth, the axes and the model."
        ),
    ] = field(default_factory=dict, compare=False, kw_only=True)

    @model_validator(mode="after")
    def _one_after_the_other(self) -> GrowthRecord:
        """Growths follow one another, and make every axis wider."""
        widths, step, planned = dict(self.initial_widths), 0, set[int]()
        layers: dict[str, int] = {}
        for index, growth in enumerate(self.growths):
            path = f"{{path}}.growths[{index}]"
            for axis, width in growth.widths.items():
                if axis not in widths:
                    raise ValueError(f"{path}.widths names {axis!r}, which initial_widths lacks")
                if width <= widths[axis]:
                    raise ValueError(
                        f"{path}.widths.{axis} is {width}, and it was {widths[axis]} before: it has to grow"
                    )
            if growth.step < step:
                raise ValueError(f"{path}.step is {growth.step}, and the growth before came at step {step}")
            if growth.planned_step in planned:
                raise ValueError(f"{path}.planned_step is {growth.planned_step}, as an earlier growth's")
            for list_name, sources in growth.layers.items():
                before = layers.get(list_name, max(sources, default=-1) + 1)
                if not 0 < before < len(sources) or {*sources} != {*range(before)}:
                    raise ValueError(
                        f"{path}.layers.{list_name} is {shown(list(sources))}, and there were {before} layers before: "
                        "every one has to go on, and others to be added"
                    )
                layers[list_name] = len(sources)
            if growth.planned_step is not None:
                planned.add(growth.planned_step)
            widths.update(growth.widths)
            step = growth.step
        for axis in self.tried:
            if axis not in widths:
                raise ValueError(f"{{path}}.tried names {axis!r}, which initial_widths lacks")
        return self

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

    @property
    def layer_births(self) -> dict[str, tuple[int, ...]]:
        """In which growth every layer came to be, by the list that it is in; 0 for those that were there."""
        return layer_births([growth.layers for growth in self.growths])

    def after(
        self,
        widths: Mapping[str, int],
        strategy: Strategy,
        *,
        step: int,
        planned_step: int | None,
        layers: Sequence[LayerGrowth] = (),
    ) -> GrowthRecord:
        """The record once the axes in ``widths`` have grown to them; what proved this growth has served.

        Args:
            layers: the lists of layers that get longer with them.
        """
        sources = {longer.path: longer.sources for longer in layers}
        growth = RecordedGrowth(step, planned_step, dict(widths), strategy, sources)
        axes = {name: self.axes[source_of(name, layers)] for name in renumbered([*self.axes], layers)}
        done = {*growth_in_words(self.widths, widths).split(", ")}
        proved = {words: proof for words, proof in self.proved.items() if not {*words.split(", ")} <= done}
        return replace(self, growths=(*self.growths, growth), axes=axes, proved=proved)

    @model_serializer(mode="wrap")
    def _as_file(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What the file holds: also its format, and the widths in force for readers without this package."""
        data = handler(self)
        return {
            "format": _FORMAT,
            "initial_widths": data["initial_widths"],
            "widths": self.widths,
            "growths": data["growths"],
            "tried": data["tried"],
            "layer_axes": data["layer_axes"],
            "spent": data["spent"],
            "proved": data["proved"],
            "axes": data["axes"],
        }

    @model_validator(mode="wrap")
    @classmethod
    def _widths_twice(cls, data: Any, handler: ModelWrapValidatorHandler[GrowthRecord]) -> GrowthRecord:
        """The widths in force, which a file says for other readers, have to be those that its growths lead to."""
        record = handler(data)
        said = data.get("widths", record.widths) if isinstance(data, Mapping) else record.widths
        if said != record.widths:
            raise ValueError(
                f"{{path}}.widths is {shown(said)}, and initial_widths and growths lead to {shown(record.widths)}"
            )
        return record

    @model_validator(mode="before")
    @classmethod
    def _of_file(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        data = dict(data)
        found = data.pop("format", None)
        if type(found) is int and found > _FORMAT:
            raise ValueError(
                f"is of format {shown(found)}, which a newer release of ds_sparkling wrote; this one reads 1 to "
                f"{_FORMAT}"
            )
        if type(found) is not int or found < 1:
            raise ValueError(f"is of format {shown(found)}; known are 1 to {_FORMAT}")
        if found < 3 and "stages" in data:
            data["growths"] = data.pop("stages")
        if found == 1:
            data = {**data, "tried": [], "axes": _with_norms(data.get("axes"))}
        for key in ("growths", "tried"):
            if key not in data:
                raise ValueError(f"lacks {key!r}")
        data.pop("widths", None)
        return data

    def write(self, checkpoint: Path) -> None:
        """Write the record into the checkpoint directory ``checkpoint`` (DIR/TAG), by a rename.

        Raises:
            SparklingError: if the file system refuses.
        """
        with whole_file(checkpoint / FILE_NAME) as part:
            checkpoint.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(self.to_dict(), indent=1))


def _with_norms(axes: Any) -> Any:
    """Axes of format 1, each gain that of a norm that divides by the RMS."""
    if not isinstance(axes, Mapping):
        return axes
    gains = {name for name, entry in axes.items() if '"gain"' in json.dumps(entry)}
    return {name: {**entry, "norm": Norm.RMS} if name in gains else entry for name, entry in axes.items()}


def read_record(checkpoint: Path) -> GrowthRecord | None:
    """The record in the checkpoint directory ``checkpoint`` (DIR/TAG); None if it has none.

    Raises:
        CheckpointError: if the file is damaged or of an unknown format.
    """
    path = checkpoint / FILE_NAME
    try:
        return GrowthRecord.from_dict(load_json(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"growth record {path} can't be read: {error.strerror or error}") from error
    except (ValueError, RecursionError, SparklingError) as error:
        raise CheckpointError(f"growth record {path} can't be read: {error}; {_WAY_OUT}") from error


def check_shapes(
    path: Path, record: GrowthRecord, axes: Mapping[str, ParamAxes], shapes: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Hold what a record says of parameters against their shapes.

    Args:
        path: the checkpoint directory (DIR/TAG) that the record is in.
        record: the record.
        axes: what it says of the parameters, by the names that ``shapes`` has.
        shapes: those that there are; of a parameter without axes nothing is said.
        where: what has the shapes, for errors.

    Raises:
        CheckpointError: names the record and the parameter.
    """
    for name in axes.keys() & shapes.keys():
        try:
            fault = axes[name].contradiction(shapes[name], record.widths)
        except PlanError as error:
            fault = str(error)
        if fault is not None:
            raise CheckpointError(
                f"growth record {path / FILE_NAME} doesn't belong to {where}: by its axes and its widths "
                f"{shown(record.widths)}, {name} {fault}; {_WAY_OUT}"
            )


def check_steps(path: Path, record: GrowthRecord, step: int) -> None:
    """Hold a record against the optimizer steps that its checkpoint was saved after.

    Args:
        path: the checkpoint directory (DIR/TAG) that the record is in.

    Raises:
        CheckpointError: names the record, if one of its growths is still to come.
    """
    for index, growth in enumerate(record.growths):
        if growth.step > step:
            raise CheckpointError(
                f"growth record {path / FILE_NAME} doesn't belong to its checkpoint, which was saved at step {step}: "
                f"growths[{index}].step is {growth.step}; {_WAY_OUT}"
            )


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
