"""An engine that can grow, from a function that builds the model and a DeepSpeed config."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from ds_sparkling.discovery.build import BuildModel
from ds_sparkling.discovery.forward import Inputs
from ds_sparkling.engine.carry_over import preserved_rng
from ds_sparkling.engine.fail_together import FailTogether
from ds_sparkling.engine.growing_run import GrowingRun
from ds_sparkling.engine.new_engine import new_engine
from ds_sparkling.engine.notices import notice_plans
from ds_sparkling.engine.planning import agreed, check_same_config, check_same_model, starting_record
from ds_sparkling.engine.refusals import accepted
from ds_sparkling.engine.start import meet
from ds_sparkling.engine.stepping import check_optimizer
from ds_sparkling.errors import ConfigError
from ds_sparkling.spec.config import SparklingConfig
from ds_sparkling.spec.record import GrowthRecord, find_checkpoint
from ds_sparkling.spec.unsupported import zero_stage


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
        **arguments: further arguments of ``deepspeed.initialize`` (``training_data``, ``collate_fn`` ...).

    Returns:
        The engine alone, with its :class:`~ds_sparkling.engine.growing_run.GrowingRun` as ``engine.sparkling``.

    Raises:
        ConfigError: if a setting or an argument is wrong; like those below, before any memory is taken.
        PlanError: if a planned growth doesn't fit the model.
        UnsupportedError: if a setting can't be combined with growth.
        CheckpointError: if the checkpoint's growth record can't be read.
    """
    factories = {"optimizer": optimizer, "lr_scheduler": lr_scheduler, "model_parameters": model_parameters}
    all_ranks = FailTogether("starting")
    with all_ranks:
        ds_config, block = accepted(build_model, _given(config, args), factories, arguments)
    meet(all_ranks, args)
    all_ranks = FailTogether("planning")
    check_same_config(ds_config, all_ranks)
    directory = os.fspath(checkpoint) if checkpoint is not None else block.checkpoint_dir
    record = _starting_record(build_model, ds_config, block, all_ranks, directory=directory, tag=tag, inputs=inputs)
    run = GrowingRun(
        build_model=build_model,
        ds_config=ds_config,
        config=block,
        arguments={**arguments, **factories},
        record=record,
        checkpoint_dir=directory if block.checkpoint_before_growth else None,
        inputs=inputs,
    )
    check_same_model(build_model, run.widths, all_ranks, partitioned=zero_stage(ds_config) == 3)
    all_ranks = FailTogether("making the engine")
    with all_ranks.together():
        engine = new_engine(run)
        if block.growths:
            check_optimizer(engine, block.strategy)
    all_ranks.settle()
    notice_plans(engine)
    return engine


def _starting_record(
    build_model: BuildModel,
    ds_config: Mapping[str, Any],
    block: SparklingConfig,
    all_ranks: FailTogether,
    *,
    directory: str | None,
    tag: str | None,
    inputs: Inputs | None,
) -> GrowthRecord:
    """The record of the checkpoint that the run goes on from, or a fresh one. Collective."""
    universal = bool((ds_config.get("checkpoint") or {}).get("load_universal"))

    def starting() -> GrowthRecord:
        found = find_checkpoint(directory, tag, universal=universal) if directory is not None else None
        return starting_record(build_model, block, found, inputs)

    with preserved_rng():
        return agreed(starting, all_ranks)


def _given(config: str | os.PathLike[str] | Mapping[str, Any] | None, args: Any) -> str | Mapping[str, Any]:
    """The DeepSpeed config that was passed, or that the parsed command line names."""
    config = getattr(args, "deepspeed_config", None) if config is None else config
    if config is None:
        raise ConfigError("no DeepSpeed config: pass config=, or args with deepspeed_config")
    return config if isinstance(config, Mapping) else os.fspath(config)
