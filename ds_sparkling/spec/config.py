"""The ``"sparkling"`` block of a DeepSpeed JSON, checked as a whole and turned into frozen values."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, BeforeValidator, Field, ModelWrapValidatorHandler, field_validator, model_validator

from ds_sparkling.errors import ConfigError
from ds_sparkling.spec.axes import GrownWidths, ParamAxes, Widths
from ds_sparkling.spec.axes_by_pattern import parse_hints
from ds_sparkling.spec.checked import Checked, Integer, InWords, Switch, Text, checked, shown
from ds_sparkling.spec.json_files import load_json
from ds_sparkling.spec.strategy import Strategy

BLOCK = "sparkling"


def _named_functions(value: Any) -> Any:
    if value is not None and not (isinstance(value, str) and ":" in value):
        raise ValueError(f"must be module:function, got {shown(value)}")
    return value


def _hints(value: Any) -> Any:
    return parse_hints(value, f"{BLOCK}.axes")


@checked()
class GrowthConfig(Checked):
    """One planned growth: when ``at_step`` optimizer steps are done, the axes in ``widths`` grow."""

    at_step: Integer = Field(ge=0, description="Optimizer steps done when the growth is due.")
    widths: GrownWidths = Field(description="The axes that grow, and the width that each of them grows to.")


@checked(kw_only=True)
class SparklingConfig(Checked):
    """The whole block."""

    SPREAD = "strategy"
    #: The key that the growths stood under, for errors.
    growths_key = "growths"

    growths: tuple[GrowthConfig, ...] = Field(
        default=(),
        validation_alias=AliasChoices("growths", "stages"),
        description='The planned growths, by at_step. "stages", the key of version 0.1, is still read.',
    )
    widths: Widths | None = Field(
        default=None, description="Widths to start with, where they aren't build_model's defaults."
    )
    strategy: Strategy = Field(default_factory=Strategy, description="How every growth is done.")
    checkpoint_dir: Text | None = Field(
        default=None,
        description="Directory of the run's checkpoints. A run resumes from it, and writes to it before a growth.",
    )
    checkpoint_before_growth: Switch = Field(
        default=True, description="Whether to save a checkpoint just before each growth."
    )
    log_every: Integer = Field(
        default=10,
        ge=0,
        description="Optimizer steps between points of the growth's curves in the monitors. 0 draws none.",
    )
    diagnose_every: Integer = Field(
        default=50,
        ge=0,
        description="Optimizer steps between diagnoses of blocks, twins, ranks and routers. 0 also switches the alarms "
        "off.",
    )
    axes: Annotated[dict[str, ParamAxes], BeforeValidator(_hints), InWords("object of pattern: axes")] = Field(
        default_factory=dict,
        description="What parameters are that probing can't read, by patterns that match their names.",
    )
    check: Switch = Field(
        default=True, description="Whether to try each growth on a small instance of the model beforehand."
    )
    inputs: Annotated[str | None, BeforeValidator(_named_functions), InWords('"module:function" or null')] = Field(
        default=None,
        description="The function that gives inputs to try the model with. Random token ids are the default.",
    )
    patience: Integer = Field(
        default=50, ge=1, description="Seconds that ranks may come later than others to where a growth begins."
    )

    @model_validator(mode="wrap")
    @classmethod
    def _remember_the_key(cls, data: Any, handler: ModelWrapValidatorHandler[SparklingConfig]) -> SparklingConfig:
        config = handler(data)
        if isinstance(data, Mapping) and "stages" in data:
            object.__setattr__(config, "growths_key", "stages")
        return config

    @field_validator("growths")
    @classmethod
    def _one_after_the_other(cls, growths: tuple[GrowthConfig, ...]) -> tuple[GrowthConfig, ...]:
        for index, (first, second) in enumerate(itertools.pairwise(growths), start=1):
            if second.at_step <= first.at_step:
                raise ValueError(
                    f"{{path}}[{index}].at_step ({second.at_step}) must come after {{path}}[{index - 1}].at_step "
                    f"({first.at_step})"
                )
        return growths


def read_json(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """A DeepSpeed config as a dict, from a path or a mapping.

    Raises:
        ConfigError: if the file doesn't exist, isn't a JSON object, or holds what :func:`load_json` doesn't take.
    """
    if isinstance(config, Mapping):
        return dict(config)
    path = Path(config)
    try:
        data = load_json(path)
    except FileNotFoundError:
        raise ConfigError(f"config file {path} doesn't exist") from None
    except OSError as error:
        raise ConfigError(f"config file {path} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"config file {path}: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"config file {path} must hold a JSON object, found {type(data).__name__}")
    return data


def sparkling_config(config: Mapping[str, Any]) -> SparklingConfig:
    """The checked ``"sparkling"`` block of a DeepSpeed config; all defaults if there is none."""
    for key in config:
        if key != BLOCK and difflib.get_close_matches(str(key).lower(), [BLOCK], cutoff=0.8):
            raise ConfigError(f"{key}: unknown key of a DeepSpeed config; did you mean {BLOCK!r}?")
    return SparklingConfig.from_dict(config.get(BLOCK, {}), BLOCK)


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
            raise ConfigError(f"{path} must be a positive integer, got {shown(steps)}; correct it or pass --steps N")
        return steps
    return None
