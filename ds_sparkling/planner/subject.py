"""The subject of a planning: the model, its growths, how the run is spread, from a config and the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_sparkling.discovery.build import BuildModel
from ds_sparkling.discovery.factory import find_factory
from ds_sparkling.errors import ConfigError, UnsupportedError
from ds_sparkling.models.olmoe import OlmoeConfig, olmoe_factory
from ds_sparkling.planner.assumptions import DEFAULT_RANKS
from ds_sparkling.planner.memory import Setting
from ds_sparkling.planner.model import Model, probe_model
from ds_sparkling.spec.config import BLOCK, planned_steps, read_json, sparkling_config, value_at
from ds_sparkling.spec.strategy import Strategy
from ds_sparkling.spec.unsupported import refuse_unsupported

#: fp32 tensors of state per parameter, by the optimizer's name in a DeepSpeed JSON.
_STATES = {"adam": 2, "adamw": 2, "adagrad": 1, "lion": 1}
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
#: Settings that keep masters or state in another type than fp32.
_HALF_STATE = (
    "bf16.bf16_master_weights_and_grads",
    "bf16.bf16_optimizer_states",
    "fp16.fp16_master_weights_and_grads",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says; None or empty where it leaves it to the config.

    Attributes:
        model: module:function or a Hugging Face config that builds the model.
        widths: one growth to these widths, in place of the config's growths.
        share: of the tokens at that growth.
        tokens: of the whole run.
        steps: optimizer steps of the whole run.
        ranks: data-parallel ranks.
        stage: of ZeRO.
        expert_parallel: ranks that share one set of experts.
        dtype: of the compute weights, fp32, bf16 or fp16.
        states: fp32 tensors of optimizer state per parameter.
        experts_per_token: that a token is routed to.
    """

    model: str | None = None
    widths: Mapping[str, int] = field(default_factory=dict)
    share: float = 0.5
    tokens: float | None = None
    steps: int | None = None
    ranks: int | None = None
    stage: int | None = None
    expert_parallel: int | None = None
    dtype: str | None = None
    states: int | None = None
    experts_per_token: int | None = None


@dataclass(frozen=True)
class PlannedGrowth:
    """One planned growth: at a share of the tokens, these axes grow from widths in force to others."""

    share: float
    before: dict[str, int]
    after: dict[str, int]

    @property
    def widths(self) -> dict[str, int]:
        """All widths after the growth."""
        return {**self.before, **self.after}

    def __str__(self) -> str:
        return ", ".join(f"{axis} {self.before[axis]} -> {width}" for axis, width in self.after.items())


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """Everything that the planning needs.

    Attributes:
        name: of the config.
        model: the probed model.
        growths: the planned ones, in order.
        strategy: how they happen.
        tokens: of the whole run.
        steps: of the whole run; None if nothing tells.
        setting: how the run is spread over its ranks.
        dtype: name of the compute weights' type.
        checkpoint: whether a checkpoint is saved before each growth.
    """

    name: str
    model: Model
    growths: tuple[PlannedGrowth, ...]
    strategy: Strategy
    tokens: float
    steps: int | None
    setting: Setting
    dtype: str
    checkpoint: bool


def read_subject(reference: str, options: Options) -> PlannedRun:
    """Put together what the config and the command line say.

    Args:
        reference: a DeepSpeed JSON with a ``"sparkling"`` block, a Hugging Face ``config.json``, or
            ``module:function``.

    Raises:
        ConfigError, PlanError, UnsupportedError: name the key or option, and the way out.
    """
    config, build_model = _sources(reference, options.model)
    refuse_unsupported(config)
    block = sparkling_config(config)
    steps = options.steps or planned_steps(config)
    planned = _planned(config, options, steps)
    final = {axis: width for _, widths in planned for axis, width in widths.items()}
    model = probe_model(build_model, final, block.widths, final, options.experts_per_token, block.axes)
    growths, widths = [], model.widths
    for number, (share, after) in enumerate(planned, start=1):
        model.plan(widths, after, block.strategy, number)
        growths.append(PlannedGrowth(share, widths, after))
        widths = growths[-1].widths
    dtype = options.dtype or _dtype(config)
    setting = _setting(config, options, dtype)
    return PlannedRun(
        name=Path(reference).name,
        model=model,
        growths=tuple(growths),
        strategy=block.strategy,
        tokens=options.tokens or _tokens(config, steps),
        steps=steps,
        setting=setting,
        dtype=dtype,
        checkpoint=block.checkpoint_before_growth,
    )


def _sources(reference: str, model: str | None) -> tuple[dict[str, Any], BuildModel]:
    """The DeepSpeed config, empty if ``reference`` is a model's own, and what builds the model."""
    if not Path(reference).exists() and ":" in reference:
        return {}, find_factory(reference)
    config = read_json(reference)
    if "model_type" in config:
        return {}, find_factory(reference)
    if model is not None:
        return config, find_factory(model)
    if "model" not in config:
        raise ConfigError(
            f"{reference} has neither a 'model' block nor 'model_type': pass --model with the model's config.json or "
            "module:function of what builds it"
        )
    return config, olmoe_factory(OlmoeConfig.from_dict(config["model"], "model"))


def _planned(config: Mapping[str, Any], options: Options, steps: int | None) -> list[tuple[float, dict[str, int]]]:
    """(share of the tokens, widths) of every growth."""
    if options.widths:
        return [(options.share, dict(options.widths))]
    block = sparkling_config(config)
    where = f"{BLOCK}.{block.growths_key}"
    if not block.growths:
        raise ConfigError(f"no growth is planned: pass --widths AXIS=WIDTH, or give {where} in a DeepSpeed JSON")
    if steps is None:
        raise ConfigError(
            "the config doesn't tell how many steps the run has (training.steps or scheduler.params.total_num_steps): "
            "pass --steps N"
        )
    for index, growth in enumerate(block.growths):
        if not 0 < growth.at_step < steps:
            raise ConfigError(
                f"{where}[{index}].at_step is {growth.at_step}, which isn't within the run's {steps} steps; "
                "correct it or pass --steps N"
            )
    return [(growth.at_step / steps, growth.widths) for growth in block.growths]


def _tokens(config: Mapping[str, Any], steps: int | None) -> float:
    """Tokens of the whole run: steps x batch x sequence length."""
    batch = value_at(config, "train_batch_size")
    length = value_at(config, "training.sequence_length")
    if steps is None or not isinstance(batch, int) or not isinstance(length, int):
        raise ConfigError(
            "the config doesn't tell how many tokens the run has (training.steps, train_batch_size and "
            "training.sequence_length): pass --tokens N"
        )
    return float(steps * batch * length)


def _dtype(config: Mapping[str, Any]) -> str:
    """The compute weights' type: what the DeepSpeed JSON says, bf16 without one."""
    for name in ("bf16", "bfloat16", "fp16"):
        if value_at(config, f"{name}.enabled", False):
            return "fp16" if name == "fp16" else "bf16"
    return "fp32" if config else "bf16"


def _setting(config: Mapping[str, Any], options: Options, dtype: str) -> Setting:
    for path in _HALF_STATE:
        if value_at(config, path):
            raise UnsupportedError(f"{path}: memory is only known for fp32 masters and state; take it out of a copy")
    stage = options.stage
    if stage is None:
        stage = _whole(config, "zero_optimization.stage", 0 if config else 3, "--zero")
    shared = options.expert_parallel
    if shared is None:
        enabled = value_at(config, "expert_parallel.enabled", False)
        shared = _whole(config, "expert_parallel.autoep_size", 1, "--expert-parallel") if enabled else 1
    accumulated = value_at(config, "data_types.grad_accum_dtype") or dtype
    if accumulated not in _BYTES:
        raise ConfigError(f"data_types.grad_accum_dtype is {accumulated!r}; known: {', '.join(_BYTES)}")
    return Setting(
        ranks=max(DEFAULT_RANKS, shared) if options.ranks is None else options.ranks,
        stage=stage,
        expert_parallel=shared,
        weight_bytes=_BYTES[dtype],
        gradient_bytes=_BYTES[accumulated],
        states=_states(config) if options.states is None else options.states,
        offload_optimizer=_on_host(config, "offload_optimizer"),
        offload_weights=_on_host(config, "offload_param"),
    )


def _whole(config: Mapping[str, Any], path: str, default: int, option: str) -> int:
    value = value_at(config, path, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{path} must be a whole number, got {value!r}; correct it or pass {option} N")
    return value


def _states(config: Mapping[str, Any]) -> int:
    """Tensors of state that the optimizer keeps per parameter; Adam's two where the config names none."""
    name = str(value_at(config, "optimizer.type", "AdamW"))
    if name.lower() == "sgd":
        return 1 if value_at(config, "optimizer.params.momentum", 0) else 0
    if name.lower() not in _STATES:
        raise ConfigError(
            f"optimizer.type is {name!r}, whose state isn't known here: pass --states N, fp32 tensors per parameter"
        )
    return _STATES[name.lower()]


def _on_host(config: Mapping[str, Any], key: str) -> bool:
    return value_at(config, f"zero_optimization.{key}.device", "none") == "cpu"
