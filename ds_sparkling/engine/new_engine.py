"""DeepSpeed's engine around a run's model, and what is hung onto it so that it can grow."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine

from ds_sparkling.engine.checkpoints import hook_checkpoints
from ds_sparkling.engine.fail_together import FailTogether, of_first_rank
from ds_sparkling.engine.gradients import GradientWatch
from ds_sparkling.engine.growing_run import GrowingRun
from ds_sparkling.engine.hooks import ENGINE_CLASS, RUN
from ds_sparkling.engine.hugging_face_build import weights_initialized
from ds_sparkling.engine.internals import data_parallel_group
from ds_sparkling.engine.parallelism import refuse_engine
from ds_sparkling.engine.planning import parameter_counts, warn_of_uncounted_experts
from ds_sparkling.engine.stepping import hook_step
from ds_sparkling.engine.watch.diagnosis import Diagnosis
from ds_sparkling.engine.watch.growth_curves import GrowthCurves
from ds_sparkling.engine.watch.step_callbacks import observe_steps
from ds_sparkling.engine.watch.tensorboard import introduce_run
from ds_sparkling.engine.watch.token_meter import SpentMeter
from ds_sparkling.errors import ConfigError
from ds_sparkling.spec.config import BLOCK
from ds_sparkling.spec.unsupported import zero_stage


class GrowingEngine(DeepSpeedEngine):
    """DeepSpeed's engine, as :func:`~ds_sparkling.initialize` returns it: alone."""

    def __getitem__(self, _index: object) -> Any:
        """Raise TypeError: unpacking, where ``deepspeed.initialize`` returns four values, ends up here, too."""
        raise TypeError(
            "ds_sparkling.initialize returns one value, the engine: write engine = ds_sparkling.initialize(...); the "
            "others are engine.optimizer, engine.training_dataloader and engine.lr_scheduler"
        )


def new_engine(run: GrowingRun, group: Any = None) -> DeepSpeedEngine:
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
