"""Plans in the names and shapes of a live engine, and the check of all planned stages at the start."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from ds_sparkling.config import BLOCK, SparklingConfig
from ds_sparkling.errors import ConfigError
from ds_sparkling.growth import GrowthPlan, count_parameters, make_plan
from ds_sparkling.probe import BuildModel, base_widths, build_on_meta, probe
from ds_sparkling.record import GrowthRecord, read_record
from ds_sparkling.zero.access import full_shape
from ds_sparkling.zero.naming import engine_axes, expert_slices
from ds_sparkling.zero.run import GrowingRun


def logical_shapes(engine: DeepSpeedEngine) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter with all experts counted, in the module's order."""
    slices = expert_slices(engine)
    shapes = {}
    for name, param in engine.module.named_parameters():
        shape = full_shape(param)
        shapes[name] = (slices[name].experts, *shape[1:]) if name in slices else shape
    return shapes


def plan_growth(engine: DeepSpeedEngine, run: GrowingRun, widths: Mapping[str, int]) -> GrowthPlan:
    """The plan in the engine's parameter names; an empty ``widths`` plans a rebuild."""
    return make_plan(
        logical_shapes(engine),
        engine_axes(engine, run.record.axes),
        run.widths,
        widths,
        run.config.strategy,
        stage=len(run.record.stages) + 1,
        active_share=active_share(engine.module),
    )


def parameter_counts(engine: DeepSpeedEngine, record: GrowthRecord) -> tuple[int, int]:
    """Total and active (per token) parameters of the engine's model."""
    shapes, axes = logical_shapes(engine), engine_axes(engine, record.axes)
    return count_parameters(shapes, axes), count_parameters(shapes, axes, active_share(engine.module))


def knowing(record: GrowthRecord, axes: Iterable[str], build_model: BuildModel) -> GrowthRecord:
    """``record``, with ``axes`` probed if it doesn't know them all."""
    widths = base_widths(build_model, axes, record.widths)
    if record.axes and widths.keys() == record.widths.keys():
        return record
    started = {axis: record.initial_widths.get(axis, width) for axis, width in widths.items()}
    return replace(record, initial_widths=started, axes=probe(build_model, widths))


def starting_record(build_model: BuildModel, config: SparklingConfig, checkpoint: Path | None) -> GrowthRecord:
    """The record a run starts with: that of ``checkpoint``, or a fresh one; every stage still to come is checked."""
    record = read_record(checkpoint) if checkpoint is not None else None
    if record is None:
        record = GrowthRecord(dict(config.widths or {}), {})
    axes = [axis for stage in config.stages for axis in stage.widths]
    record = knowing(record, [*record.widths, *axes], build_model)
    check_stages(build_model, config, record)
    return record


def check_stages(build_model: BuildModel, config: SparklingConfig, record: GrowthRecord) -> None:
    """Plan every stage still to come on the meta device, so that a mistake shows at the start and not at its step."""
    widths = record.widths
    happened = {stage.planned_step for stage in record.stages}
    for number, stage in enumerate(config.stages, start=1):
        if stage.at_step in happened:
            continue
        model = build_on_meta(build_model, widths)
        shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
        plan = make_plan(shapes, record.axes, widths, stage.widths, config.strategy, stage=number)
        widths = {**widths, **stage.widths}
        wide = build_on_meta(build_model, widths)
        for name, param in wide.named_parameters():
            if tuple(param.shape) != plan.param(name).after:
                raise ConfigError(
                    f"{BLOCK}.stages[{number - 1}]: build_model makes {name} {tuple(param.shape)} at {widths}, "
                    f"planned was {plan.param(name).after}"
                )


def active_share(model: nn.Module) -> float:
    """Share of the stacked experts that one token uses, from the model's config; 1 if it doesn't tell."""
    config = getattr(model, "config", None)
    top_k = getattr(config, "num_experts_per_tok", None)
    for name in ("num_experts", "n_routed_experts", "num_local_experts"):
        experts = getattr(config, name, None)
        if isinstance(experts, int) and isinstance(top_k, int):
            return top_k / experts
    return 1.0
