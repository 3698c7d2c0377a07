"""Plans in the names and shapes of a live engine, and the check of all planned growths at the start."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from deepspeed import comm as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from ds_sparkling.discovery.build import (
    BuildModel,
    base_widths,
    build_on_meta,
    check_wide,
    described_tensors,
    saved_buffers,
    shapes_of,
)
from ds_sparkling.discovery.deeper import layer_growths, layer_outputs, more_layers, prove_layers
from ds_sparkling.discovery.factory import named_inputs
from ds_sparkling.discovery.find_axes import WidthsAlone, axes_to_grow, planned
from ds_sparkling.discovery.fingerprint import fingerprint
from ds_sparkling.discovery.forward import Inputs
from ds_sparkling.discovery.proof import Proof, prove_growth
from ds_sparkling.engine.carry_over import preserved_rng
from ds_sparkling.engine.fail_together import FailTogether, of_first_rank
from ds_sparkling.engine.growing_run import GrowingRun
from ds_sparkling.engine.hugging_face_build import built_plainly
from ds_sparkling.engine.logical_names import engine_axes, logical_parameters, logical_shapes
from ds_sparkling.engine.parallelism import refuse_parallelism
from ds_sparkling.errors import CheckpointError, ConfigError, PlanError
from ds_sparkling.growth import GrowthPlan, count_parameters, make_plan
from ds_sparkling.spec.active_experts import active_share, doubt_of_share
from ds_sparkling.spec.axes import ParamAxes
from ds_sparkling.spec.config import BLOCK, SparklingConfig
from ds_sparkling.spec.layers import renumbered, source_of, widths_alone
from ds_sparkling.spec.record import FILE_NAME, GrowthRecord, check_shapes, read_record
from ds_sparkling.spec.unsupported import refuse_compiled

logger = logging.getLogger(__name__)

#: What decides, in DeepSpeed's config, which collectives a step has.
_IN_STEP = (
    "zero_optimization",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "train_batch_size",
)


def plan_growth(engine: DeepSpeedEngine, run: GrowingRun, widths: Mapping[str, int]) -> GrowthPlan:
    """The plan of the whole model, in the engine's parameter names; an empty ``widths`` plans a rebuild."""
    axes = engine_axes(engine, run.record.axes)
    layers = layer_growths(run.build_model, run.widths, widths, run.config.strategy)
    buffers = {name: tuple(buffer.shape) for name, buffer in saved_buffers(engine.module).items()}
    followers = {name: run.record.axes[name] for name in buffers if name in run.record.axes}
    return make_plan(
        logical_shapes(engine),
        {**axes, **followers},
        run.widths,
        widths_alone(widths, layers),
        run.config.strategy,
        number=len(run.record.growths) + 1,
        active_share=_shares(engine, axes),
        buffers=buffers,
        layers=layers,
    )


def parameter_counts(engine: DeepSpeedEngine, record: GrowthRecord) -> tuple[int, int]:
    """Total and active (per token) parameters of the engine's model."""
    shapes, axes = logical_shapes(engine), engine_axes(engine, record.axes)
    return count_parameters(shapes, axes), count_parameters(shapes, axes, _shares(engine, axes))


def knowing(
    record: GrowthRecord,
    growths: Sequence[Mapping[str, int]],
    build_model: BuildModel,
    config: SparklingConfig,
    inputs: Inputs | None = None,
) -> GrowthRecord:
    """``record`` with the axes of the growths to come, each tried on a small instance of the model.

    What the record has a proof of, for this very model, isn't tried again.

    Args:
        growths: the axes that will grow together, and their new widths.
        inputs: of the model's forward; by default those that ``config`` names, or random token ids.

    Raises:
        ConfigError: if the function that ``config`` names gives no inputs.
        PlanError: names the parameter that can't be told, or the module that a growth would change.
    """
    tried_on = config.inputs if inputs is None else "given"
    if inputs is None and config.inputs is not None and config.check:
        inputs = named_inputs(config.inputs)
    wanted = [axis for growth in growths for axis in growth]
    widths = base_widths(build_model, [*record.widths, *wanted], record.widths)
    known = record.axes and widths.keys() == record.widths.keys() and set(wanted) <= set(record.tried)
    alone = WidthsAlone.of(build_model, widths, growths)
    coming = list(planned(alone.widths, alone.growths, config.strategy))
    found: Proof | None = None
    if not known:
        grown = [growth.widths for growth in record.growths]
        read = axes_to_grow(
            build_model, widths, growths, grown, config.strategy, config.axes, inputs, check=config.check
        )
        started = {axis: record.initial_widths.get(axis, width) for axis, width in widths.items()}
        record, found = replace(record, initial_widths=started, axes=read.axes, tried=read.tried), read.proof
    record = replace(record, layer_axes=alone.layer_axes)
    if not config.check:
        return record
    deeper = list(more_layers(build_model, widths, growths, config.strategy))
    for growth, layers in deeper:
        record = replace(record, axes=layer_outputs(build_model, record.axes, growth.widths, layers, inputs))
    prove: dict[str, Callable[[], Proof]] = {}
    prints: dict[str, str] = {}
    for growth in coming:
        prints[growth.words] = fingerprint(alone.build_model, record.axes, growth, tried_on)
        prove[growth.words] = partial(prove_growth, alone.build_model, record.axes, growth, inputs)
    for growth, layers in deeper:
        prints[growth.words] = fingerprint(build_model, record.axes, growth, tried_on)
        prove[growth.words] = partial(prove_layers, build_model, record.axes, growth.widths, layers, inputs)
    tried = {growth.words for growth in coming} if found is not None else set()
    proofs = {
        words: found if found is not None and words in tried else prove[words]()
        for words, print_ in prints.items()
        if words in tried or record.proved.get(words) != print_
    }
    for doubt in dict.fromkeys(proof.doubt for proof in proofs.values() if proof.doubt):
        logger.warning("%s", doubt)
    return replace(
        record, proved={**record.proved, **{words: prints[words] for words, proof in proofs.items() if proof}}
    )


def agreed(find: Callable[[], GrowthRecord], all_ranks: FailTogether) -> GrowthRecord:
    """The record that the first rank finds, on all ranks. Collective.

    One rank is enough to try growths out, and what a model is read as rests on comparing floats, which processors of
    different makes may see differently.

    Raises:
        SparklingError: on all ranks, what ``find`` raises on the first.
    """
    box: list[Any] = [None]
    with all_ranks, built_plainly():
        if dist.get_rank() == 0:
            box = [find().to_dict()]
    all_ranks.settle()
    return GrowthRecord.from_dict(of_first_rank(box[0], all_ranks))


def check_same_config(ds_config: Mapping[str, Any], all_ranks: FailTogether) -> None:
    """Hold what ranks step by against the first rank's. Collective.

    Raises:
        ConfigError: on all ranks, if it isn't the same on one.
    """
    own = _settings({key: ds_config[key] for key in _IN_STEP if key in ds_config})
    first = of_first_rank(own, all_ranks)
    with all_ranks:
        for key in sorted(own.keys() | first.keys()):
            here, there = own.get(key, "missing"), first.get(key, "missing")
            if here != there:
                raise ConfigError(f"{key} is {here} here, and {there} on rank 0; pass the same config on all")
    all_ranks.settle()


def _settings(block: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Every setting by its dotted name; without paths, which may be a node's own."""
    found: dict[str, str] = {}
    for key, value in block.items():
        if isinstance(value, Mapping):
            found |= _settings(value, f"{prefix}{key}.")
        elif not key.endswith("path"):
            found[prefix + key] = repr(value)
    return found


def check_same_model(
    build_model: BuildModel, widths: Mapping[str, int], all_ranks: FailTogether, *, partitioned: bool
) -> None:
    """Build the model on the meta device on every rank, and hold it against the first rank's. Collective.

    What fails in ``build_model`` fails here, before anything is touched. Afterwards every rank has imported what the
    model needs.

    Args:
        build_model, widths: what makes the model, and at which widths.
        all_ranks: what is being done.
        partitioned: whether DeepSpeed is going to partition the model while it is built.

    Raises:
        PlanError: on all ranks, if ``build_model`` fails on one, or makes another model there than on the first.
        UnsupportedError: on all ranks, if the model can't be partitioned.
    """
    own: dict[str, tuple[str, int]] = {}
    with all_ranks, preserved_rng(), built_plainly():
        model = build_on_meta(build_model, widths)
        refuse_parallelism()  # build_model may have asked for it
        if partitioned:
            refuse_compiled(model)
        own = described_tensors(model)
    all_ranks.settle()
    first = of_first_rank(own, all_ranks)
    with all_ranks:
        difference = _difference(own, first)
        if difference is not None:
            raise PlanError(f"build_model(**{dict(widths)}) doesn't make the same model on all ranks: {difference}")
    all_ranks.settle()


def _difference(own: Mapping[str, tuple[str, int]], first: Mapping[str, tuple[str, int]]) -> str | None:
    """How this rank's model differs from the first rank's."""
    missing = ("missing", 0)
    for name in sorted(own.keys() | first.keys()):
        here, there = own.get(name, missing)[0], first.get(name, missing)[0]
        if here != there:
            return f"{name} is {here} here, and {there} on rank 0"
    for name, (_, place) in own.items():
        if place != first[name][1]:
            order = "registered in the same order, and shared alike"
            return f"{name} is tensor {place} here, and tensor {first[name][1]} on rank 0: they have to be {order}"
    return None


def starting_record(
    build_model: BuildModel, config: SparklingConfig, checkpoint: Path | None, inputs: Inputs | None
) -> GrowthRecord:
    """The record a run starts with: that of ``checkpoint``, or a fresh one; every growth still to come is checked."""
    record = read_record(checkpoint) if checkpoint is not None else None
    if record is None or checkpoint is None:
        record = GrowthRecord(dict(config.widths or {}), {})
    else:
        _check_built(build_model, record, checkpoint)
    happened = {growth.planned_step for growth in record.growths}
    growths = [growth.widths for growth in config.growths if growth.at_step not in happened]
    record = knowing(record, growths, build_model, config, inputs)
    check_growths(build_model, config, record)
    return record


def _check_built(build_model: BuildModel, record: GrowthRecord, checkpoint: Path) -> None:
    """Hold a checkpoint's record against the model that is built by its widths.

    Raises:
        CheckpointError: names the record, and the parameter, or why the model can't be built.
    """
    try:
        shapes = shapes_of(build_on_meta(build_model, record.widths))
    except PlanError as error:
        raise CheckpointError(f"at the widths of growth record {checkpoint / FILE_NAME}: {error}") from error
    check_shapes(checkpoint, record, record.axes, shapes, "the model that build_model makes")


def check_growths(build_model: BuildModel, config: SparklingConfig, record: GrowthRecord) -> None:
    """Plan every growth still to come on the meta device, so that a mistake shows at the start and not at its step."""
    widths, axes = record.widths, record.axes
    happened = {growth.planned_step for growth in record.growths}
    for number, growth in enumerate(config.growths, start=1):
        if growth.at_step in happened:
            continue
        model = build_on_meta(build_model, widths)
        shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
        buffers = {name: tuple(buffer.shape) for name, buffer in saved_buffers(model).items()}
        try:
            layers = layer_growths(build_model, widths, growth.widths, config.strategy)
            make_plan(
                shapes,
                axes,
                widths,
                widths_alone(growth.widths, layers),
                config.strategy,
                number=number,
                buffers=buffers,
                layers=layers,
            )
            check_wide(build_model, axes, widths, growth.widths, layers)
        except PlanError as error:
            raise ConfigError(f"{BLOCK}.{config.growths_key}[{number - 1}]: {error}") from error
        widths = {**widths, **growth.widths}
        axes = {name: axes[source_of(name, layers)] for name in renumbered([*axes], layers)}


def warn_of_uncounted_experts(engine: DeepSpeedEngine, record: GrowthRecord) -> None:
    """Say so if all experts count as active, where a token may use some of them only."""
    if any(logical.experts for logical in logical_parameters(engine).values()):
        return  # DeepSpeed's own layers tell
    stacked = any(axes.stacked_experts for axes in engine_axes(engine, record.axes).values())
    doubt = doubt_of_share(active_share(engine.module), stacked=stacked)
    if doubt is not None:
        logger.warning("%s: active parameters and compute count all of them", doubt)


def _shares(engine: DeepSpeedEngine, axes: Mapping[str, ParamAxes]) -> dict[str, float]:
    """Share of each expert's parameters that one token uses: as DeepSpeed's layers have it, or else the model's config.

    Args:
        axes: of the whole model's parameters.
    """
    told = active_share(engine.module)
    of_stacks = {name: told for name, found in axes.items() if found.stacked_experts and told is not None}
    return of_stacks | {name: logical.share for name, logical in logical_parameters(engine).items() if logical.experts}
