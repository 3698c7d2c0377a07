"""Plans in the names and shapes of a live engine, and the check of all planned stages at the start."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from deepspeed import comm as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from ds_sparkling.axes import ParamAxes
from ds_sparkling.check.proof import prove_function
from ds_sparkling.check.resolve import find_axes
from ds_sparkling.config import BLOCK, SparklingConfig
from ds_sparkling.errors import ConfigError, PlanError
from ds_sparkling.growth import GrowthPlan, count_parameters, make_plan
from ds_sparkling.probe import BuildModel, base_widths, build_on_meta, check_wide, probe
from ds_sparkling.record import GrowthRecord, read_record
from ds_sparkling.routing import active_share
from ds_sparkling.zero.access import full_shape
from ds_sparkling.zero.naming import engine_axes, expert_slices
from ds_sparkling.zero.run import GrowingRun

logger = logging.getLogger(__name__)


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
        active_share=_share(engine),
    )


def parameter_counts(engine: DeepSpeedEngine, record: GrowthRecord) -> tuple[int, int]:
    """Total and active (per token) parameters of the engine's model."""
    shapes, axes = logical_shapes(engine), engine_axes(engine, record.axes)
    return count_parameters(shapes, axes), count_parameters(shapes, axes, _share(engine))


def knowing(
    record: GrowthRecord, growths: Sequence[Mapping[str, int]], build_model: BuildModel, config: SparklingConfig
) -> GrowthRecord:
    """``record`` with the axes of the growths to come, each tried on a small instance of the model.

    Args:
        growths: the axes that will grow together, and their new widths.

    Raises:
        PlanError: names the parameter that can't be told, or the module that a growth would change.
    """
    grown = [axis for growth in growths for axis in growth]
    widths = base_widths(build_model, [*record.widths, *grown], record.widths)
    if not record.axes or widths.keys() != record.widths.keys() or (growths and not record.stages):
        # Axes that have grown must stay what they were taken for.
        sets = [tuple(growth) for growth in (*growths, *(stage.widths for stage in record.stages))]
        axes = _axes(build_model, widths, sets, config)
        started = {axis: record.initial_widths.get(axis, width) for axis, width in widths.items()}
        record = replace(record, initial_widths=started, axes=axes)
    for growth in growths if config.check else []:
        proof = prove_function(build_model, record.axes, widths, growth, config.strategy)
        if not proof and dist.get_rank() == 0:
            logger.warning("whether growing keeps the model's function is not known: %s", proof.reason)
    return record


def _axes(
    build_model: BuildModel, widths: Mapping[str, int], sets: Sequence[Collection[str]], config: SparklingConfig
) -> dict[str, ParamAxes]:
    if config.check:
        return find_axes(build_model, widths, sets, config.axes).axes
    return probe(build_model, widths, config.axes)


def starting_record(build_model: BuildModel, config: SparklingConfig, checkpoint: Path | None) -> GrowthRecord:
    """The record a run starts with: that of ``checkpoint``, or a fresh one; every stage still to come is checked."""
    record = read_record(checkpoint) if checkpoint is not None else None
    if record is None:
        record = GrowthRecord(dict(config.widths or {}), {})
    happened = {stage.planned_step for stage in record.stages}
    growths = [stage.widths for stage in config.stages if stage.at_step not in happened]
    record = knowing(record, growths, build_model, config)
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
        make_plan(shapes, record.axes, widths, stage.widths, config.strategy, stage=number)
        try:
            check_wide(build_model, record.axes, widths, stage.widths)
        except PlanError as error:
            raise ConfigError(f"{BLOCK}.stages[{number - 1}]: {error}") from error
        widths = {**widths, **stage.widths}


def _share(engine: DeepSpeedEngine) -> float:
    share = active_share(engine.module)
    return 1.0 if share is None else share
