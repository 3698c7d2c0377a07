"""The ``"sparkling"`` block of a DeepSpeed JSON, checked as a whole and turned into frozen dataclasses."""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ds_sparkling.errors import ConfigError
from ds_sparkling.spec.axes import ParamAxes
from ds_sparkling.spec.axes_by_pattern import parse_hints
from ds_sparkling.spec.state_kinds import StateKind
from ds_sparkling.spec.strategy import (
    BiasCorrection,
    Init,
    NewIndex,
    OptimizerState,
    Rewarmup,
    Scaling,
    Split,
    Strategy,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

BLOCK = "sparkling"

_E = TypeVar("_E", bound=Enum)
_D = TypeVar("_D", bound="DataclassInstance")


@dataclass(frozen=True)
class GrowthConfig:
    """One planned growth: when ``at_step`` optimizer steps are done, the axes in ``widths`` grow."""

    at_step: int
    widths: dict[str, int]


@dataclass(frozen=True)
class SparklingConfig:
    """The whole block.

    Attributes:
        growths: planned ones, by ``at_step``.
        widths: widths to start with, where they aren't ``build_model``'s defaults.
        strategy: init, scaling, optimizer state, re-warm-up and seed of every growth.
        checkpoint_dir: where checkpoints live; resumed from, and written to before a growth.
        checkpoint_before_growth: whether to save just before each growth.
        log_every: optimizer steps between points of the growth's curves in the monitors; 0 for none.
        diagnose_every: optimizer steps between diagnoses of blocks, twins, ranks and routers; 0 for no alarms either.
        axes: what parameters are that probing can't read, by patterns that match their names.
        check: whether to try each growth on a small instance of the model beforehand.
        inputs: ``module:function`` of what gives inputs to try the model with; random token ids by default.
        patience: seconds that ranks may come later than others to where a growth begins.
    """

    growths: tuple[GrowthConfig, ...] = ()
    widths: dict[str, int] | None = None
    strategy: Strategy = field(default_factory=Strategy)
    checkpoint_dir: str | None = None
    checkpoint_before_growth: bool = True
    log_every: int = 10
    diagnose_every: int = 50
    axes: dict[str, ParamAxes] = field(default_factory=dict)
    check: bool = True
    inputs: str | None = None
    patience: int = 50

    @classmethod
    def from_dict(cls, block: Mapping[str, Any]) -> SparklingConfig:
        """Parse and check the block.

        Raises:
            ConfigError: names the key by its path, what was found and what is allowed.
        """
        _check_keys(
            block,
            BLOCK,
            {
                "stages",
                "widths",
                "init",
                "scaling",
                "optimizer_state",
                "rewarmup",
                "bias_correction",
                "seed",
                "state_kinds",
                "checkpoint_dir",
                "checkpoint_before_growth",
                "log_every",
                "diagnose_every",
                "axes",
                "check",
                "inputs",
                "patience",
            },
        )
        init = _mapping(block.get("init", {}), f"{BLOCK}.init")
        _check_keys(init, f"{BLOCK}.init", {"fan_out", "fan_in", "norm", "vocabulary", "split", "perturbation"})
        strategy = Strategy(
            fan_out=_choice(init, f"{BLOCK}.init", "fan_out", Init.COPY),
            fan_in=_choice(init, f"{BLOCK}.init", "fan_in", Init.COPY),
            norm=_choice(init, f"{BLOCK}.init", "norm", Init.COPY),
            vocabulary=_choice(init, f"{BLOCK}.init", "vocabulary", NewIndex.MEAN),
            split=Split.parse(init.get("split", str(Strategy.split))),
            perturbation=_number(init.get("perturbation", Strategy.perturbation), f"{BLOCK}.init.perturbation"),
            scaling=_choice(block, BLOCK, "scaling", Scaling.RMS),
            optimizer_state=_choice(block, BLOCK, "optimizer_state", OptimizerState.ASYMMETRIC_RESET),
            rewarmup=_rewarmup(block.get("rewarmup", {})),
            bias_correction=_choice(block, BLOCK, "bias_correction", BiasCorrection.RESTART),
            seed=_integer(block.get("seed", 0), f"{BLOCK}.seed"),
            state_kinds=_state_kinds(block.get("state_kinds", {})),
        )
        widths, inputs = block.get("widths"), block.get("inputs")
        if inputs is not None and not (isinstance(inputs, str) and ":" in inputs):
            raise ConfigError(f"{BLOCK}.inputs must be module:function, got {inputs!r}")
        checkpoint_dir = block.get("checkpoint_dir")
        if checkpoint_dir is not None and not isinstance(checkpoint_dir, str):
            raise ConfigError(f"{BLOCK}.checkpoint_dir must be a path, got {checkpoint_dir!r}")
        axes = parse_hints(_mapping(block.get("axes", {}), f"{BLOCK}.axes"), f"{BLOCK}.axes")
        return cls(
            growths=_growths(block.get("stages", [])),
            widths=None if widths is None else _widths(widths, f"{BLOCK}.widths"),
            strategy=strategy,
            checkpoint_dir=checkpoint_dir,
            checkpoint_before_growth=_boolean(block, "checkpoint_before_growth"),
            log_every=_at_least(0, block, "log_every", cls.log_every),
            diagnose_every=_at_least(0, block, "diagnose_every", cls.diagnose_every),
            axes=axes,
            check=_boolean(block, "check"),
            inputs=inputs,
            patience=_at_least(1, block, "patience", cls.patience),
        )


def read_json(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """A DeepSpeed config as a dict, from a path or a mapping.

    Raises:
        ConfigError: if the file doesn't exist or isn't a JSON object.
    """
    if isinstance(config, Mapping):
        return dict(config)
    path = Path(config)
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"config file {path} doesn't exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} isn't JSON: {error}") from None
    except OSError as error:
        raise ConfigError(f"config file {path} can't be read: {error.strerror}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"config file {path} must hold a JSON object, found {type(data).__name__}")
    return data


def sparkling_config(config: Mapping[str, Any]) -> SparklingConfig:
    """The checked ``"sparkling"`` block of a DeepSpeed config; all defaults if there is none."""
    for key in config:
        if key != BLOCK and difflib.get_close_matches(str(key).lower(), [BLOCK], cutoff=0.8):
            raise ConfigError(f"unknown key {key!r} in the DeepSpeed config; did you mean {BLOCK!r}?")
    return SparklingConfig.from_dict(_mapping(config.get(BLOCK, {}), BLOCK))


def typed_block(kind: type[_D], config: Mapping[str, Any], name: str) -> _D:
    """The block ``name`` of a config as the dataclass ``kind``, its keys and their types checked.

    Raises:
        ConfigError: an unknown key, a missing one, or a value of another type than the field's.
    """
    block = _mapping(config.get(name, {}), name)
    known = {entry.name: entry for entry in fields(kind)}
    _check_keys(block, name, known)
    for key, entry in known.items():
        if key not in block:
            if entry.default is MISSING and entry.default_factory is MISSING:
                raise ConfigError(f"{name} lacks {key!r}")
        elif entry.type == "int":
            _integer(block[key], f"{name}.{key}")
        elif entry.type == "float":
            _number(block[key], f"{name}.{key}")
        elif entry.type in ("bool", "str") and type(block[key]).__name__ != entry.type:
            raise ConfigError(f"{name}.{key} must be a {entry.type}, got {block[key]!r}")
    try:
        return kind(**block)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error


def value_at(config: Mapping[str, Any], path: str, default: Any = None) -> Any:
    """What stands at a dotted path of a config; ``default`` if nothing does."""
    value: Any = config
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return default
        value = value[key]
    return value


def planned_steps(config: Mapping[str, Any]) -> int | None:
    """How many optimizer steps the run has, by ``training.steps`` or the scheduler; None if neither tells.

    Raises:
        ConfigError: if what stands there isn't a number of steps.
    """
    for path in ("training.steps", "scheduler.params.total_num_steps"):
        steps = value_at(config, path)
        if steps is None:
            continue
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ConfigError(f"{path} must be a positive integer, got {steps!r}; correct it or pass --steps N")
        return steps
    return None


def _growths(value: Any) -> tuple[GrowthConfig, ...]:
    path = f"{BLOCK}.stages"
    if not isinstance(value, list):
        raise ConfigError(f"{path} must be a list of growths, got {value!r}")
    growths = []
    for index, entry in enumerate(value):
        where = f"{path}[{index}]"
        entry = _mapping(entry, where)
        _check_keys(entry, where, {"at_step", "widths"})
        for key in ("at_step", "widths"):
            if key not in entry:
                raise ConfigError(f"{where} lacks {key!r}")
        growth = GrowthConfig(
            _integer(entry["at_step"], f"{where}.at_step"), _widths(entry["widths"], f"{where}.widths")
        )
        if growth.at_step < 0:
            raise ConfigError(f"{where}.at_step must not be negative, got {growth.at_step}")
        if not growth.widths:
            raise ConfigError(f"{where}.widths is empty; name at least one axis, or drop the growth")
        growths.append(growth)
    for index, (first, second) in enumerate(itertools.pairwise(growths), start=1):
        if second.at_step <= first.at_step:
            raise ConfigError(
                f"{path}[{index}].at_step ({second.at_step}) must come after {path}[{index - 1}].at_step "
                f"({first.at_step})"
            )
    return tuple(growths)


def _boolean(block: Mapping[str, Any], key: str) -> bool:
    """A switch that is on by default."""
    value = block.get(key, True)
    if not isinstance(value, bool):
        raise ConfigError(f"{BLOCK}.{key} must be true or false, got {value!r}")
    return value


def _at_least(least: int, block: Mapping[str, Any], key: str, default: int) -> int:
    number = _integer(block.get(key, default), f"{BLOCK}.{key}")
    if number < least:
        raise ConfigError(f"{BLOCK}.{key} must be at least {least}, got {number}")
    return number


def _rewarmup(value: Any) -> Rewarmup:
    path = f"{BLOCK}.rewarmup"
    block = _mapping(value, path)
    _check_keys(block, path, {"ratio", "steps", "scope", "curve", "faster_decay", "from_step", "decay_steps"})
    from_step, decay_steps = block.get("from_step"), block.get("decay_steps")
    return Rewarmup(
        ratio=_number(block.get("ratio", Rewarmup.ratio), f"{path}.ratio"),
        steps=_integer(block.get("steps", Rewarmup.steps), f"{path}.steps"),
        scope=_choice(block, path, "scope", Rewarmup.scope),
        curve=_choice(block, path, "curve", Rewarmup.curve),
        faster_decay=_number(block.get("faster_decay", Rewarmup.faster_decay), f"{path}.faster_decay"),
        from_step=None if from_step is None else _integer(from_step, f"{path}.from_step"),
        decay_steps=None if decay_steps is None else _integer(decay_steps, f"{path}.decay_steps"),
    )


def _state_kinds(value: Any) -> dict[str, StateKind]:
    path = f"{BLOCK}.state_kinds"
    block = _mapping(value, path)
    return {key: _choice(block, path, key, StateKind.MOMENT) for key in block}


def _widths(value: Any, path: str) -> dict[str, int]:
    widths = _mapping(value, path)
    for axis, width in widths.items():
        if _integer(width, f"{path}.{axis}") < 1:
            raise ConfigError(f"{path}.{axis} must be positive, got {width}")
    return dict(widths)


def _mapping(value: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path} must be an object, got {value!r}")
    return value


def _integer(value: Any, path: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{path} must be an integer, got {value!r}")
    return value


def _number(value: Any, path: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{path} must be a number, got {value!r}")
    return float(value)


def _choice(block: Mapping[str, Any], path: str, key: str, default: _E) -> _E:
    value = block.get(key, default.value)
    kind = type(default)
    try:
        return kind(value)
    except ValueError:
        known = [member.value for member in kind]
        raise ConfigError(f"{path}.{key} is {value!r}; {_known(value, known)}") from None


def _check_keys(block: Mapping[str, Any], path: str, known: Collection[str]) -> None:
    for key in block:
        if key not in known:
            raise ConfigError(f"unknown key {path}.{key}; {_known(key, known)}")


def _known(found: Any, known: Collection[str]) -> str:
    near = difflib.get_close_matches(str(found), known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}known: {', '.join(sorted(known))}"
