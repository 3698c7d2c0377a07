"""Find the axes of a checkpoint's parameters: in its growth record, by probing a model, or in a hints file."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ds_sparkling.checkpoint.layout import Param
from ds_sparkling.checkpoint.metadata import buffer_shapes, expert_layers
from ds_sparkling.checkpoint.names import OwnNames, some
from ds_sparkling.checkpoint.source import Source
from ds_sparkling.discovery.build import BuildModel, base_widths, check_wide
from ds_sparkling.discovery.factory import HuggingFaceFactory, named_factory, named_inputs
from ds_sparkling.discovery.find_axes import axes_to_grow
from ds_sparkling.discovery.layer_lists import layer_axes, refuse_layers
from ds_sparkling.discovery.reading import UnreadableError
from ds_sparkling.errors import CheckpointError, ConfigError, PlanError
from ds_sparkling.spec.autoep import BlockNames, block_axes
from ds_sparkling.spec.axes import ParamAxes
from ds_sparkling.spec.axes_by_pattern import TO_FILL, hintable, match_hints, name_pattern, parse_hints
from ds_sparkling.spec.config import SparklingConfig, read_json
from ds_sparkling.spec.record import check_shapes, check_steps

logger = logging.getLogger(__name__)

#: What adds layers, which checkpoints can't get.
_ONLINE = "plan the growth in the run's config, or call grow on its engine"


@dataclass(frozen=True)
class ModelAxes:
    """What is known of a model's width axes.

    Attributes:
        widths: those in force.
        axes: of the checkpoint's parameters, and of its buffers that follow an axis, in its names.
        built: of the model as built, in its own names; empty if only the checkpoint's are known.
        tried: the axes of which that is known for sure.
    """

    widths: dict[str, int]
    axes: dict[str, ParamAxes]
    built: dict[str, ParamAxes]
    tried: tuple[str, ...] = ()


class UnknownAxesError(PlanError):
    """Axes of some parameters aren't known; :attr:`hints` is a file to fill in."""

    def __init__(self, message: str, hints: str) -> None:
        super().__init__(message)
        self.hints = hints


def checkpoint_axes(source: Source, widths: Mapping[str, int], config: str | None, block: SparklingConfig) -> ModelAxes:
    """The axes of ``source``'s parameters.

    Args:
        widths: the axes that shall grow, and to what.
        config: a hints file, a Hugging Face ``config.json``, or ``module:function`` that builds the model; None to
            rely on the growth record.
        block: what else is said of the growth; a model that can be built is tried on a small instance first.

    Raises:
        UnknownAxesError: if they aren't known.
        PlanError, ConfigError: see the message.
    """
    record = source.record
    if config is None:
        refuse_layers(widths, () if record is None else record.layer_axes, _ONLINE)
        known = record is not None and record.axes and set(widths) <= set(record.tried)
        if record is None or not known:
            raise UnknownAxesError(
                f"{source.path} has no growth record that knows {', '.join(widths)}; pass --config with the model's "
                "config.json, module:function of what builds it, or a hints file",
                hints(
                    source.layout.params.values(),
                    dict.fromkeys(widths, TO_FILL) | (record.widths if record is not None else {}),
                ),
            )
        axes = _in_checkpoint(source, record.widths, record.axes)
        return _renamed(ModelAxes(record.widths, axes, dict(record.axes), record.tried))
    if not Path(config).exists() and ":" in config:
        return _probed(source, widths, block, named_factory(config), None)
    data = read_json(config)
    if "axes" in data:
        return _hinted(source, Path(config), data)
    if "model_type" not in data:
        raise ConfigError(f"{config} is neither a hints file ('axes') nor a Hugging Face config ('model_type')")
    return _probed(source, widths, block, HuggingFaceFactory(data), data)


def check_record(source: Source) -> None:
    """Hold the growth record of ``source``, if it has one, against its parameters and its step.

    Raises:
        CheckpointError: names the record, and the key or the parameter.
    """
    record = source.record
    if record is None:
        return
    model = source.model_states(0)
    check_steps(source.path, record, model["global_steps"])
    names, own = BlockNames.from_config(model.get("ds_config") or {}), OwnNames.of([*source.layout.params], record.axes)
    known = dict(record.axes)
    for layer in expert_layers(model):
        if record.axes:
            known |= block_axes(own(layer.path), names, record.axes)
    shapes = {name: param.shape for name, param in source.layout.params.items()} | buffer_shapes(model)
    axes = {name: known.get(name, known.get(own(name))) for name in shapes}
    told = {name: found for name, found in axes.items() if found is not None}
    check_shapes(source.path, record, told, shapes, str(source.path))


def hints(params: Iterable[Param], widths: Mapping[str, Any], axes: Mapping[str, ParamAxes] | None = None) -> str:
    """A hints file for ``params``: one pattern per kind, with what is known and question marks for the rest."""
    entries: dict[str, Any] = {}
    for param in params:
        known = (axes or {}).get(param.name)
        if known is None:
            dims: list[Any] = [
                {} if param.expert and position == 0 else TO_FILL for position in range(len(param.shape))
            ]
            entry: dict[str, Any] = {"dims": dims, **({"stacked_experts": True} if param.expert else {})}
        else:
            entry = known.to_dict()
        entries[name_pattern(param.name)] = {"shape": list(param.shape), **entry}
    comment = (
        'For every dimension, in place of "?": {} if it never grows, or {"axis": "hidden_size", "role": "fan_in"} '
        "(fan_out, fan_in, gain, per_unit or index), with block (entries per unit), segments (copies of the axis), "
        "interleaved (segments that take turns), alive (segments that zero initialisation must leave), groups (what "
        "the units are in) and power (of the width that the model multiplies by) if not 1, 1, false, [], 1 and 0; or "
        '{"parts": [...]} with such entries, or {"fixed": 64} for what never grows, for parts of different widths. '
        '"norm": "rms" or "layer" for gains; "head_gain": true for that of the norm before a head that is tied to the '
        'embedding; "offset": 1 for a gain stored without the 1 in 1 + w; "powers": {"hidden_size": 0.5} for widths '
        "that no dimension carries and that the model multiplies by. widths: those in force."
    )
    return json.dumps({"comment": comment, "widths": dict(widths), "axes": entries}, indent=1) + "\n"


def _hinted(source: Source, path: Path, data: Mapping[str, Any]) -> ModelAxes:
    widths = data.get("widths") or {}
    for axis, width in widths.items():
        if not isinstance(width, int) or isinstance(width, bool):
            raise ConfigError(f"{path}: widths.{axis} is {width!r}; give the width in force")
    params = source.layout.params
    where = f"{path}: axes"
    said, buffers = parse_hints(data["axes"], where), buffer_shapes(source.model_states(0))
    shapes = {name: param.shape for name, param in params.items()} | buffers
    axes = match_hints(said, hintable(shapes, buffers, said), where)
    unmatched = [name for name in params if name not in axes]
    if unmatched:
        raise UnknownAxesError(
            f"{path} matches no axes to {unmatched[0]}"
            + (f" and {len(unmatched) - 1} more" if len(unmatched) > 1 else ""),
            hints(params.values(), widths, axes),
        )
    axes = {name: axes[name] for name in shapes if name in axes}
    if source.layout.settings.stage > 1 and source.model_states(0).get("frozen_param_shapes") is None:
        logger.warning(
            "%s was saved with exclude_frozen_parameters: if anything is frozen, the frozen base isn't in it and isn't "
            "widened",
            source.path,
        )
    return ModelAxes(dict(widths), axes, {})


def _probed(
    source: Source,
    widths: Mapping[str, int],
    block: SparklingConfig,
    build_model: BuildModel,
    config: Mapping[str, Any] | None,
) -> ModelAxes:
    given = dict(source.record.widths) if source.record is not None else {}
    if config is not None:
        given = {axis: config[axis] for axis in widths if axis in config} | given
    before = base_widths(build_model, widths, given)
    refuse_layers(widths, layer_axes(build_model, before, widths), _ONLINE)
    # Axes that have grown must stay what they were taken for.
    growths = [growth.widths for growth in source.record.growths] if source.record is not None else []
    try:
        inputs = named_inputs(block.inputs) if block.inputs is not None and block.check else None
        found = axes_to_grow(
            build_model, before, [widths], growths, block.strategy, block.axes, inputs, check=block.check
        )
    except UnreadableError as error:
        raise UnknownAxesError(str(error), hints(source.layout.params.values(), before)) from error
    check_wide(build_model, found.axes, before, widths)
    if found.proof.doubt:
        logger.warning("%s", found.proof.doubt)
    return _renamed(ModelAxes(before, _in_checkpoint(source, before, found.axes), found.axes, found.tried))


def _in_checkpoint(source: Source, widths: Mapping[str, int], built: Mapping[str, ParamAxes]) -> dict[str, ParamAxes]:
    """The axes in the checkpoint's names, from those of the model as built."""
    model = source.model_states(0)
    known = dict(built)
    own = OwnNames.of([*source.layout.params], built)
    names = BlockNames.from_config(model.get("ds_config") or {})
    blocks = [own(layer.path) for layer in expert_layers(model)]
    for block in blocks:
        known.update(block_axes(block, names, built))
    unmatched = [param for name, param in source.layout.params.items() if name not in known and own(name) not in known]
    if unmatched:
        raise UnknownAxesError(
            f"{unmatched[0].name} is in {source.path}, but not in the model as built",
            hints(source.layout.params.values(), widths, known),
        )
    held = (*source.layout.params, *buffer_shapes(model))
    present = {known_as for name in held for known_as in (name, own(name))}
    rewritten = tuple(f"{block}." for block in blocks)
    absent = [name for name in built if name not in present and not name.startswith(rewritten)]
    if absent:
        raise CheckpointError(
            f"{source.path} lacks {some(absent)} of the model as built, so they can't be widened with the rest. If it "
            "was saved with exclude_frozen_parameters, the frozen base isn't in it: save it whole, or grow the run "
            "online"
        )
    found = {name: known.get(name, known.get(own(name))) for name in held}
    return {name: axes for name, axes in found.items() if axes is not None}


def _renamed(axes: ModelAxes) -> ModelAxes:
    """``axes`` without those of the model as built, where a wrapper has changed names: the engine reads them anew."""
    names = OwnNames.of([*axes.axes], axes.built)
    return axes if all(names(name) == name or name in axes.built for name in axes.axes) else replace(axes, built={})
