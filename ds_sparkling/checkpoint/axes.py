"""What the dimensions of a checkpoint's parameters are: from its growth record, a model to probe, or a hints file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_sparkling.autoep import BlockNames, block_axes
from ds_sparkling.axes import FIXED, Dim, ParamAxes, Role
from ds_sparkling.checkpoint.layout import Param
from ds_sparkling.checkpoint.metadata import expert_layers
from ds_sparkling.checkpoint.source import Source
from ds_sparkling.config import read_json
from ds_sparkling.errors import ConfigError, PlanError
from ds_sparkling.factory import HuggingFaceFactory, named_factory
from ds_sparkling.probe import BuildModel, base_widths, probe

_TO_FILL = "?"


@dataclass(frozen=True)
class ModelAxes:
    """What is known of a model's width axes.

    Attributes:
        widths: those in force.
        axes: of the checkpoint's parameters, in its names.
        built: of the model as built, in its own names; empty if only the checkpoint's are known.
    """

    widths: dict[str, int]
    axes: dict[str, ParamAxes]
    built: dict[str, ParamAxes]


class UnknownAxesError(PlanError):
    """Axes of some parameters aren't known; :attr:`hints` is a file to fill in."""

    def __init__(self, message: str, hints: str) -> None:
        super().__init__(message)
        self.hints = hints


def find_axes(source: Source, widths: Iterable[str], config: str | None) -> ModelAxes:
    """The axes of ``source``'s parameters.

    Args:
        widths: the axes that shall grow.
        config: a hints file, a Hugging Face ``config.json``, or ``module:function`` that builds the model; None to
            rely on the growth record.

    Raises:
        UnknownAxesError: if they aren't known.
        PlanError, ConfigError: see the message.
    """
    record = source.record
    if config is None:
        known = record is not None and record.axes and set(widths) <= record.widths.keys()
        if record is None or not known:
            raise UnknownAxesError(
                f"{source.path} has no growth record that knows {', '.join(widths)}; pass --config with the model's "
                "config.json, module:function of what builds it, or a hints file",
                hints(
                    source.layout.params.values(),
                    dict.fromkeys(widths, _TO_FILL) | (record.widths if record is not None else {}),
                ),
            )
        return ModelAxes(record.widths, _in_checkpoint(source, record.widths, record.axes), dict(record.axes))
    if not Path(config).exists() and ":" in config:
        return _probed(source, widths, named_factory(config), None)
    data = read_json(config)
    if "axes" in data:
        return _hinted(source, Path(config), data)
    if "model_type" not in data:
        raise ConfigError(f"{config} is neither a hints file ('axes') nor a Hugging Face config ('model_type')")
    return _probed(source, widths, HuggingFaceFactory(data), data)


def hints(params: Iterable[Param], widths: Mapping[str, Any], axes: Mapping[str, ParamAxes] | None = None) -> str:
    """A hints file for ``params``: one pattern per kind, with what is known and question marks for the rest."""
    entries: dict[str, Any] = {}
    for param in params:
        known = (axes or {}).get(param.name)
        dims: list[Any] = [_TO_FILL] * len(param.shape) if known is None else known.to_dict()["dims"]
        if param.expert and known is None:
            dims[0] = {}
        stacked = param.expert if known is None else known.stacked_experts
        entries[_pattern(param.name)] = {"shape": list(param.shape), "dims": dims, "stacked_experts": stacked}
    comment = (
        'For every dimension, in place of "?": {} if it never grows, or {"axis": "hidden_size", "role": "fan_in"} '
        "(fan_out, fan_in or gain), with block (entries per unit), segments (copies of the axis end to end) and alive "
        '(segments that zero initialisation must leave) if they are not 1, 1 and []. "head_gain": true for the norm '
        "before a head that is tied to the embedding. widths: those in force."
    )
    return json.dumps({"comment": comment, "widths": dict(widths), "axes": entries}, indent=1) + "\n"


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name))


def _hinted(source: Source, path: Path, data: Mapping[str, Any]) -> ModelAxes:
    widths = data.get("widths") or {}
    for axis, width in widths.items():
        if not isinstance(width, int) or isinstance(width, bool):
            raise ConfigError(f"{path}: widths.{axis} is {width!r}; give the width in force")
    patterns = {}
    for pattern, entry in data["axes"].items():
        try:
            patterns[re.compile(pattern)] = _param_axes(entry)
        except (re.error, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{path}: axes.{pattern}: {error}") from error
    axes: dict[str, ParamAxes] = {}
    used = set()
    unmatched = []
    for name, param in source.layout.params.items():
        found = [pattern for pattern in patterns if pattern.fullmatch(name)]
        used.update(found)
        if len({patterns[pattern] for pattern in found}) > 1:
            several = ", ".join(repr(pattern.pattern) for pattern in found)
            raise PlanError(f"{path}: {name} matches {several}, which differ")
        if not found:
            unmatched.append(param)
        elif len(patterns[found[0]].dims) != len(param.shape):
            raise PlanError(
                f"{path}: axes.{found[0].pattern} has {len(patterns[found[0]].dims)} dims, but {name} is {param.shape}"
            )
        else:
            axes[name] = patterns[found[0]]
    if unmatched:
        raise UnknownAxesError(
            f"{path} matches no axes to {unmatched[0].name}"
            + (f" and {len(unmatched) - 1} more" if len(unmatched) > 1 else ""),
            hints(source.layout.params.values(), widths, axes),
        )
    for pattern in patterns:
        if pattern not in used:
            raise PlanError(f"{path}: axes.{pattern.pattern} matches no parameter of {source.path}")
    return ModelAxes(dict(widths), axes, {})


def _param_axes(entry: Mapping[str, Any]) -> ParamAxes:
    dims = []
    for dim in entry["dims"]:
        if dim == _TO_FILL:
            raise ValueError("still has a '?' to fill in")
        if not dim:
            dims.append(FIXED)
        else:
            unknown = sorted(dim.keys() - {"axis", "role", "block", "segments", "alive"})
            if unknown:
                raise ValueError(f"unknown key {unknown[0]!r}")
            alive = tuple(dim.get("alive", ()))
            dims.append(Dim(dim["axis"], Role(dim["role"]), dim.get("block", 1), dim.get("segments", 1), alive))
    return ParamAxes(tuple(dims), bool(entry.get("stacked_experts", False)), bool(entry.get("head_gain", False)))


def _probed(
    source: Source, widths: Iterable[str], build_model: BuildModel, config: Mapping[str, Any] | None
) -> ModelAxes:
    given = dict(source.record.widths) if source.record is not None else {}
    if config is not None:
        given = {axis: config[axis] for axis in widths if axis in config} | given
    before = base_widths(build_model, widths, given)
    try:
        built = probe(build_model, before)
    except PlanError as error:
        raise UnknownAxesError(str(error), hints(source.layout.params.values(), before)) from error
    return ModelAxes(before, _in_checkpoint(source, before, built), built)


def _in_checkpoint(source: Source, widths: Mapping[str, int], built: Mapping[str, ParamAxes]) -> dict[str, ParamAxes]:
    """The axes in the checkpoint's names, from those of the model as built."""
    model = source.model_states(0)
    known = dict(built)
    names = BlockNames.from_config(model.get("ds_config") or {})
    for layer in expert_layers(model):
        known.update(block_axes(layer.path, names, built))
    unmatched = [param for name, param in source.layout.params.items() if name not in known]
    if unmatched:
        raise UnknownAxesError(
            f"{unmatched[0].name} is in {source.path}, but not in the model as built",
            hints(source.layout.params.values(), widths, known),
        )
    return {name: known[name] for name in source.layout.params}
