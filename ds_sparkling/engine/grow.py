"""The live room: an engine that can grow, and its growth.

:func:`initialize` wraps ``deepspeed.initialize``; :func:`grow` replaces a trained engine by a wider one that goes on
from the same state.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from ds_sparkling.discovery.build import BuildModel, check_wide, require_factory
from ds_sparkling.discovery.forward import Inputs
from ds_sparkling.engine import access
from ds_sparkling.engine.carry_over import Carried, preserved_rng
from ds_sparkling.engine.checkpoints import hook_checkpoints
from ds_sparkling.engine.extension_locks import warn_of_left_locks
from ds_sparkling.engine.fail_together import FailTogether, of_first_rank
from ds_sparkling.engine.gradients import GradientWatch
from ds_sparkling.engine.growing_run import GrowingRun, run_of
from ds_sparkling.engine.hooks import ENGINE_CLASS, RUN
from ds_sparkling.engine.hugging_face_build import built_plainly, weights_initialized
from ds_sparkling.engine.in_place import Held
from ds_sparkling.engine.internals import check_version, data_parallel_group
from ds_sparkling.engine.logical_names import held_parameters
from ds_sparkling.engine.move_shards import make_room, move
from ds_sparkling.engine.notices import notice_growth, notice_plans
from ds_sparkling.engine.optimizers import adapter_of
from ds_sparkling.engine.parallelism import refuse_engine, refuse_parallelism
from ds_sparkling.engine.planning import (
    agreed,
    check_same_config,
    check_same_model,
    knowing,
    parameter_counts,
    plan_growth,
    starting_record,
    warn_of_uncounted_experts,
)
from ds_sparkling.engine.shard import Shard
from ds_sparkling.engine.start import meet
from ds_sparkling.engine.stepping import check_optimizer, hook_step
from ds_sparkling.engine.watch.diagnosis import Diagnosis
from ds_sparkling.engine.watch.growth_curves import GrowthCurves, mark_growth
from ds_sparkling.engine.watch.step_callbacks import observe_steps
from ds_sparkling.engine.watch.tensorboard import close_writer, introduce_run
from ds_sparkling.engine.watch.token_meter import SpentMeter
from ds_sparkling.errors import ConfigError, PlanError
from ds_sparkling.growth import GrowthPlan
from ds_sparkling.spec.config import BLOCK, read_json, sparkling_config
from ds_sparkling.spec.record import GrowthRecord, find_checkpoint
from ds_sparkling.spec.unsupported import refuse_unsupported, zero_stage

logger = logging.getLogger(__name__)


class GrowingEngine(DeepSpeedEngine):
    """DeepSpeed's engine, as :func:`initialize` returns it: alone."""

    def __getitem__(self, _index: object) -> Any:
        """Raise TypeError: unpacking, where ``deepspeed.initialize`` returns four values, ends up here, too."""
        raise TypeError(
            "ds_sparkling.initialize returns one value, the engine: write engine = ds_sparkling.initialize(...); the "
            "others are engine.optimizer, engine.training_dataloader and engine.lr_scheduler"
        )


def initialize(
    build_model: BuildModel,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    args: Any = None,
    checkpoint: str | os.PathLike[str] | None = None,
    tag: str | None = None,
    optimizer: Callable[..., Any] | None = None,
    lr_scheduler: Callable[..., Any] | None = None,
    model_parameters: Callable[[nn.Module], Any] | None = None,
    inputs: Inputs | None = None,
    **arguments: Any,
) -> DeepSpeedEngine:
    """Make a DeepSpeed engine that can grow.

    Args:
        build_model: ``build_model(**widths) -> nn.Module``, called with the axis widths in force. It is also called on
            the meta device, to find out which dimensions grow.
        config: the DeepSpeed config with its ``"sparkling"`` block, a path or a mapping; ``args.deepspeed_config`` if
            left out.
        args: parsed command line, as for ``deepspeed.initialize``.
        checkpoint: the directory the run's checkpoints live in; the block's ``checkpoint_dir`` by default. If it holds
            one, the model is built at the widths recorded there, ready for ``engine.load_checkpoint``; before each
            growth a checkpoint is saved there.
        tag: the checkpoint to look at; the one named in ``latest``, or in ``latest_universal`` where the engine loads
            universal ones, by default.
        optimizer: ``optimizer(params) -> torch.optim.Optimizer``, if the JSON has none.
        lr_scheduler: ``lr_scheduler(optimizer) -> scheduler``, if the JSON has none.
        model_parameters: ``model_parameters(model) -> parameters or groups``; all parameters by default.
        inputs: to try growths with, for a model that takes more than token ids: what it is called with, as a mapping of
            keyword arguments, a sequence of positional ones, or the only one; ``"inputs"`` of the block by default.
        arguments: further arguments of ``deepspeed.initialize`` (``training_data``, ``collate_fn`` ...).

    Returns:
        The engine alone, with its :class:`~ds_sparkling.engine.growing_run.GrowingRun` as ``engine.sparkling``.

    Raises:
        ConfigError, PlanError, UnsupportedError, CheckpointError: before any memory is taken.
    """
    all_ranks = FailTogether("starting")
    with all_ranks:
        check_version()
        warn_of_left_locks()
        require_factory(build_model)
        check_factories(optimizer=optimizer, lr_scheduler=lr_scheduler, model_parameters=model_parameters)
        refuse_parallelism(arguments)
        ds_config = read_json(_given(config, args))
        block = sparkling_config(ds_config)
        refuse_unsupported(ds_config)
    meet(all_ranks, args)
    directory = os.fspath(checkpoint) if checkpoint is not None else block.checkpoint_dir
    all_ranks = FailTogether("planning")
    check_same_config(ds_config, all_ranks)
    universal = bool((ds_config.get("checkpoint") or {}).get("load_universal"))

    def starting() -> GrowthRecord:
        found = find_checkpoint(directory, tag, universal=universal) if directory is not None else None
        return starting_record(build_model, block, found, inputs)

    with preserved_rng():
        record = agreed(starting, all_ranks)
    run = GrowingRun(
        build_model,
        ds_config,
        block,
        {
            **arguments,
            "optimizer": optimizer,
            "lr_scheduler": lr_scheduler,
            "model_parameters": model_parameters,
        },
        record,
        directory if block.checkpoint_before_growth else None,
        inputs=inputs,
    )
    check_same_model(build_model, run.widths, all_ranks, partitioned=zero_stage(ds_config) == 3)
    all_ranks = FailTogether("making the engine")
    with all_ranks.together():
        engine = _engine(run)
        if block.growths:
            check_optimizer(engine, block.strategy)
    all_ranks.settle()
    notice_plans(engine)
    return engine


def _given(config: str | os.PathLike[str] | Mapping[str, Any] | None, args: Any) -> str | Mapping[str, Any]:
    """The DeepSpeed config that was passed, or that the parsed command line names."""
    config = getattr(args, "deepspeed_config", None) if config is None else config
    if config is None:
        raise ConfigError("no DeepSpeed config: pass config=, or args with deepspeed_config")
    return config if isinstance(config, Mapping) else os.fspath(config)


def check_factories(**factories: Any) -> None:
    """Raise ConfigError for what a growth has to make anew and that isn't a function."""
    for name, made in factories.items():
        if made is not None and (not callable(made) or isinstance(made, nn.Module)):
            raise ConfigError(
                f"{name} must be a function, because a growth has to make it anew; got a {type(made).__name__}: "
                f"pass {name}=lambda ...: ..."
            )


def grow_if_due(engine: DeepSpeedEngine, *, client_state: Mapping[str, Any] | None = None) -> DeepSpeedEngine:
    """Grow as planned if a growth is due; the engine itself otherwise.

    Call it before the forward pass of every step. With gradient accumulation it may be called before each micro-batch;
    a growth then waits for the first one of a step.

    Args:
        engine: made by :func:`initialize` or adopted.
        client_state: what ``save_checkpoint`` shall put into the checkpoint written before the growth. Without it, a
            run that has saved or loaded a client state gets that one, and a checkpoint that isn't named in ``latest``.

    Raises:
        GrowthError: if a growth is due and the call is between ``backward`` and ``step``.
        As :func:`grow`.
    """
    while (growth := run_of(engine).due(engine.global_steps)) is not None and not _gradients(engine).waiting:
        if engine.global_steps > growth.at_step and engine.global_rank == 0:
            logger.warning("the growth planned at step %d happens at step %d", growth.at_step, engine.global_steps)
        engine = _grow(engine, growth.widths, growth.at_step, client_state)
    return engine


def grow(
    engine: DeepSpeedEngine, widths: Mapping[str, int], *, client_state: Mapping[str, Any] | None = None
) -> DeepSpeedEngine:
    """Widen ``engine`` now.

    Collective. The old engine is destroyed; parameters, optimizer state, counters, loss scale, schedule, random state
    and data loader carry over. An adopted engine is grown in place.

    Args:
        engine: made by :func:`initialize` or adopted, after an optimizer step and before the next forward pass.
        widths: the axes that grow, and to what.
        client_state: as for :func:`grow_if_due`.

    Returns:
        The engine to go on with.

    Raises:
        GrowthError: the engine holds gradients that no optimizer step has used, or the call isn't the same on all ranks
            (it is untouched then); or a rank failed (every rank raises the same).
        PlanError: the widths don't fit; the engine is untouched.
    """
    if not widths:
        raise PlanError("no widths to grow to; to make the engine anew at the same widths, call rebuild")
    return _grow(engine, dict(widths), None, client_state)


def rebuild(engine: DeepSpeedEngine) -> DeepSpeedEngine:
    """Replace ``engine`` by a fresh one at the same widths that goes on bit for bit as if nothing had happened.

    Raises:
        As :func:`grow`, which refuses unchanged widths.
    """
    return _grow(engine, {}, None, None)


@dataclass
class _Transition:
    """A growth on its way from the old engine to the grown one.

    Attributes:
        run: as it is when the growth is done.
        plan: what becomes of every parameter.
        old: this rank's shards of the old engine; emptied while they are moved.
        carried: everything else that goes on.
        group: the process group that stage 3 partitions parameters over.
        held: what others may hold of the old engine.
        compiled: whether the old engine was.
        checkpoint: the one written before the growth; None if there is none.
    """

    run: GrowingRun
    plan: GrowthPlan
    old: dict[str, Shard]
    carried: Carried
    group: Any
    held: Held
    compiled: bool
    checkpoint: Path | None = None

    @property
    def way_out(self) -> str:
        if self.checkpoint is None:
            return "the engine is lost; resume from the last checkpoint, in new processes"
        return f"the engine is lost, its state just before is in {self.checkpoint}; resume from there, in new processes"


def _grow(
    engine: DeepSpeedEngine,
    widths: dict[str, int],
    planned_step: int | None,
    client_state: Mapping[str, Any] | None,
) -> DeepSpeedEngine:
    with preserved_rng():
        growth = _prepared(engine, widths, planned_step)
        if widths:
            growth.checkpoint = _save_before(engine, growth, client_state)
            if engine.global_rank == 0:
                notice_growth(growth.run, growth.plan, engine.global_steps)
        all_ranks = FailTogether("growing", growth.way_out)
        with all_ranks:
            close_writer(engine)
            access.strip(engine)
        all_ranks.settle()
        with all_ranks.together():
            grown = _engine(
                replace(growth.run, arguments={**growth.run.arguments, "training_data": None}), growth.group
            )
            growth.carried.check(grown)
            make_room(growth.plan, growth.old, grown)
        all_ranks.settle()
        with all_ranks.together():
            move(growth.plan, growth.old, grown, all_ranks)
            growth.carried.restore(grown, growth.plan)
            if widths:
                grown.lr_scheduler.born(growth.plan.strategy)
                growth.run.observations.grown()
                mark_growth(grown, growth.plan.describe())
        all_ranks.settle()
    if growth.compiled and grown.global_rank == 0:
        logger.warning("the engine was compiled and the grown one isn't yet: call engine.compile() on it")
    if growth.run.on_growth is None:
        growth.held.leave_word(grown)
    else:
        grown = growth.held.become(grown)
        all_ranks = FailTogether("telling of the growth")
        with all_ranks.together():
            growth.run.on_growth(grown)
        all_ranks.settle()
    return grown


def _prepared(engine: DeepSpeedEngine, widths: dict[str, int], planned_step: int | None) -> _Transition:
    """Everything about a growth that can be known, and refused, while the engine is as it was. Collective."""
    run = run_of(engine)
    doing = f"growing to {dict(sorted(widths.items()))}" if widths else "rebuilding the engine"
    all_ranks = FailTogether(doing, patience=run.config.patience)
    with all_ranks:
        _gradients(engine).refuse_held()
    all_ranks.settle()
    all_ranks = FailTogether("planning the growth")
    growths = [widths] if widths else []
    record = agreed(partial(knowing, run.record, growths, run.build_model, run.config, run.inputs), all_ranks)
    run = replace(run, record=record)
    partitioned = zero_stage(run.ds_config) == 3
    check_same_model(run.build_model, {**run.widths, **widths}, all_ranks, partitioned=partitioned)
    with all_ranks, built_plainly():
        plan = plan_growth(engine, run, widths)
        check_wide(run.build_model, record.axes, run.widths, widths)
        if widths:
            check_optimizer(engine, run.config.strategy)
            engine.lr_scheduler.check(run.config.strategy)
            grown_record = record.after(
                plan.grown_widths, plan.strategy, step=engine.global_steps, planned_step=planned_step
            )
            run = replace(run, record=grown_record, plans=(*run.plans, plan))
        experts = {name for name, held in held_parameters(engine).items() if held.experts}
        group = adapter_of(engine).partition_group(experts)
        growth = _Transition(
            run, plan, access.shards(engine), Carried(engine), group, Held(engine), bool(engine.is_compiled)
        )
    all_ranks.settle()
    return growth


def _save_before(engine: DeepSpeedEngine, growth: _Transition, client_state: Mapping[str, Any] | None) -> Path | None:
    """Write the checkpoint before the growth, if one is wanted, and say where.

    A run that puts a state of its own into checkpoints, but passes none for the growth, gets its last one into this
    checkpoint. It isn't the latest one then, unless that state is of this very step: what the script did since would
    be lost on a resume, without a word.
    """
    directory, known, step = growth.run.checkpoint_dir, growth.run.client, engine.global_steps
    if directory is None:
        return None
    if client_state is not None:
        known.see(client_state, step)
    contents = known.contents if client_state is None else client_state
    all_ranks = FailTogether("saving before the growth")
    current = of_first_rank(contents is not known.contents or not contents or known.step == step, all_ranks)
    checkpoint = Path(directory) / f"global_step{step}-before-growth{growth.plan.number}"
    engine.save_checkpoint(directory, tag=checkpoint.name, client_state=contents, save_latest=current)
    if not current and engine.global_rank == 0:
        logger.warning(
            "%s has the client_state of step %d, and isn't the latest checkpoint therefore; pass client_state= to "
            "grow_if_due or grow for one to resume from",
            checkpoint,
            known.step,
        )
    return checkpoint


def _gradients(engine: DeepSpeedEngine) -> GradientWatch:
    """What knows whether ``engine`` holds gradients."""
    watch = run_of(engine).gradients
    assert watch is not None
    return watch


def _engine(run: GrowingRun, group: Any = None) -> DeepSpeedEngine:
    """Build the model at the widths in force and put an engine around it.

    Args:
        group: what to partition parameters over under stage 3; the engine's own group by default.
    """
    config = copy.deepcopy(run.ds_config)
    # With the engine's own group, parameters made here and those AutoEP makes later share their sub-groups, and
    # checkpoints have the layout that DeepSpeed gives a model built outside zero.Init. A grown engine stays with the
    # group of the first one, which may have been built otherwise, so that checkpoints can be loaded into one built so.
    partitioned = deepspeed.zero.Init(
        data_parallel_group=group or data_parallel_group(),
        config_dict_or_path=copy.deepcopy(config),
        enabled=zero_stage(config) == 3,
    )
    with weights_initialized(), partitioned:
        model = run.build_model(**run.widths)
    arguments = dict(run.arguments)
    model_parameters = arguments.pop("model_parameters")
    engine, *_ = deepspeed.initialize(
        model=model,
        config=config,
        model_parameters=None if model_parameters is None else model_parameters(model),
        **arguments,
    )
    fit_out(engine, run)
    if run.on_growth is None:
        ENGINE_CLASS.install(engine, GrowingEngine)
    return engine


def fit_out(engine: DeepSpeedEngine, run: GrowingRun) -> None:
    """Hang ``run`` onto a fresh engine, and put its scheduler, optimizer step, checkpoints and monitors in order."""
    refuse_engine(engine)
    monitored = _agree_with_first_rank(engine, run)
    gradients = GradientWatch(engine)
    counts = parameter_counts(engine, run.record)
    RUN.install(engine, replace(run, parameters=counts, monitored=monitored, gradients=gradients))
    if run.plan is None and engine.global_rank == 0:
        warn_of_uncounted_experts(engine, run.record)
    step = hook_step(engine)
    hook_checkpoints(engine, step)
    introduce_run(engine)
    observe_steps(engine, [SpentMeter(engine), GrowthCurves(engine, step), Diagnosis(engine, step)])


def _agree_with_first_rank(engine: DeepSpeedEngine, run: GrowingRun) -> bool:
    """Whether the first rank has a monitor: what is measured for it is added up over all ranks. Collective.

    Raises:
        ConfigError: on all ranks, if they don't have the same ``"sparkling"`` block.
    """
    all_ranks = FailTogether("comparing configs")
    first, monitored = of_first_rank((run.config, bool(engine.monitor.enabled)), all_ranks)
    with all_ranks:
        if replace(run.config, checkpoint_dir=first.checkpoint_dir) != first:
            raise ConfigError(f'the "{BLOCK}" block isn\'t that of the first rank; pass the same config on all')
    all_ranks.settle()
    return bool(monitored)
