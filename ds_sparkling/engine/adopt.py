"""Enable growth on an engine that another training loop has made by ``deepspeed.initialize``."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from ds_sparkling.discovery.build import BuildModel
from ds_sparkling.discovery.forward import Inputs
from ds_sparkling.engine import access
from ds_sparkling.engine.carry_over import preserved_rng
from ds_sparkling.engine.fail_together import FailTogether
from ds_sparkling.engine.growing_run import GrowingRun
from ds_sparkling.engine.hugging_face_build import built_plainly
from ds_sparkling.engine.new_engine import fit_out
from ds_sparkling.engine.notices import notice_plans
from ds_sparkling.engine.optimizers import adapter_of
from ds_sparkling.engine.parallelism import refuse_engine
from ds_sparkling.engine.planning import agreed, check_same_model, plan_growth, starting_record
from ds_sparkling.engine.refusals import accepted
from ds_sparkling.engine.stepping import check_optimizer
from ds_sparkling.errors import ConfigError, GrowthError, PlanError, UnsupportedError
from ds_sparkling.spec.record import GrowthRecord, find_checkpoint
from ds_sparkling.spec.unsupported import zero_stage


def adopt(
    engine: DeepSpeedEngine,
    build_model: BuildModel,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    tag: str | None = None,
    optimizer: Callable[..., Any] | None = None,
    lr_scheduler: Callable[..., Any] | None = None,
    model_parameters: Callable[[nn.Module], Any] | None = None,
    inputs: Inputs | None = None,
    on_growth: Callable[[DeepSpeedEngine], None] | None = None,
    read_only: bool = False,
) -> DeepSpeedEngine:
    """Enable growth on an engine that ``deepspeed.initialize`` has made.

    Collective; call it right after the engine has been made, before a checkpoint is loaded. Such an engine grows in
    place: the engine, its model, and the optimizer and the scheduler that ``deepspeed.initialize`` returned become the
    grown ones, wherever they are held. Its DeepSpeed config has the ``"sparkling"`` block.

    Args:
        engine: DeepSpeed's plain engine.
        build_model: as for :func:`~ds_sparkling.initialize`; the engine's model must be what it makes.
        checkpoint: as for :func:`~ds_sparkling.initialize`, the directory the run's checkpoints live in;
            the block's ``checkpoint_dir`` by default. If it holds one, the engine is going to load that, and its model
            has been built at the widths recorded there (:func:`~ds_sparkling.spec.record.recorded_widths`); before each
            growth a checkpoint is saved there.
        tag: the checkpoint to look at; the one named in ``latest``, or in ``latest_universal`` where the engine loads
            universal ones, by default.
        optimizer: ``optimizer(params)``, which makes anew, at a growth, an optimizer that was passed to
            ``deepspeed.initialize``; as for :func:`~ds_sparkling.initialize`.
        lr_scheduler: ``lr_scheduler(optimizer)``, likewise.
        model_parameters: ``model_parameters(model)``, likewise.
        inputs: to try growths with; as for :func:`~ds_sparkling.initialize`.
        on_growth: called with the engine after each growth.
        read_only: ``checkpoint`` is what is resumed from, if anything, and nothing is saved there, as the loop saves by
            itself; before a growth a checkpoint is saved in the block's ``checkpoint_dir``, if it has one.

    Returns:
        The engine itself.

    Raises:
        ConfigError: if a setting is wrong, or a function is missing; like those below, before anything is touched.
        PlanError: if a planned growth doesn't fit, or the model isn't what ``build_model`` makes.
        UnsupportedError: if a setting can't be combined with growth.
        CheckpointError: if the checkpoint's growth record can't be read.
        GrowthError: if it has been adopted already, or has loaded a checkpoint of a grown model.
    """
    factories = {"optimizer": optimizer, "lr_scheduler": lr_scheduler, "model_parameters": model_parameters}
    all_ranks = FailTogether("adopting the engine")
    with all_ranks:
        if hasattr(engine, "sparkling"):
            raise GrowthError("this engine can grow already")
        refuse_engine(engine)  # one of another kind may have no config
        ds_config, block = accepted(build_model, copy.deepcopy(engine.config), factories)
        _check_remade(engine, factories)
    all_ranks.settle()
    looked_at = os.fspath(checkpoint) if checkpoint is not None else None
    directory = block.checkpoint_dir
    if not read_only:
        directory = looked_at = looked_at or directory

    def starting() -> GrowthRecord:
        found = None
        if looked_at is not None:
            found = find_checkpoint(looked_at, tag, universal=engine.load_universal_checkpoint())
        record = starting_record(build_model, block, found, inputs)
        if record.growths and engine.global_steps:
            raise GrowthError("adopt the engine before it loads a checkpoint, which knows about growths")
        return record

    with preserved_rng():
        record = agreed(starting, all_ranks)
    run = GrowingRun(
        build_model=build_model,
        ds_config=ds_config,
        config=block,
        arguments=factories,
        record=record,
        checkpoint_dir=directory if block.checkpoint_before_growth else None,
        on_growth=on_growth or (lambda _engine: None),
        inputs=inputs,
    )
    check_same_model(build_model, run.widths, all_ranks, partitioned=zero_stage(ds_config) == 3)
    with all_ranks, preserved_rng(), built_plainly():
        _check_widths(engine, run)
    all_ranks.settle()
    with all_ranks.together():
        fit_out(engine, run)
        if block.growths:
            check_optimizer(engine, block.strategy)
    all_ranks.settle()
    notice_plans(engine, loop_saves=read_only)
    return engine


def _check_remade(engine: DeepSpeedEngine, factories: Mapping[str, Any]) -> None:
    """Raise ConfigError for what was passed to ``deepspeed.initialize`` and a growth couldn't make anew."""
    if engine.mpu is not None:
        raise UnsupportedError("mpu: model parallelism beyond expert parallelism can't be combined with growth yet")
    if engine.optimizer is None:
        raise ConfigError("the engine has no optimizer, so there is no training to grow in the middle of")
    groups = [group for group in adapter_of(engine).base.param_groups if not group.get("moe")]
    trained = {name for name, param in engine.module.named_parameters() if param.requires_grad}
    stepped = {name for names in access.group_names(engine) for name in names}
    if factories["model_parameters"] is None and stepped != trained:
        raise ConfigError(
            f"the engine's optimizer leaves out {sorted(trained - stepped)[:3]}, and a growth has to make its groups "
            "anew: pass model_parameters=lambda model: ..., or freeze them inside build_model"
        )
    used = {
        "optimizer": engine.client_optimizer is not None,
        "lr_scheduler": engine.client_lr_scheduler is not None,
        "model_parameters": len(groups) > 1,
    }
    for name, factory in factories.items():
        if used[name] and factory is None:
            raise ConfigError(
                f"the engine's {name} doesn't come from its JSON, and a growth has to make it anew: "
                f"pass {name}=lambda ...: ..."
            )


def _check_widths(engine: DeepSpeedEngine, run: GrowingRun) -> None:
    """The engine's model must be what ``build_model`` makes at the widths that the record tells."""
    try:
        plan_growth(engine, run, {})
    except PlanError as error:
        asked = "checkpoint, universal=True" if engine.load_universal_checkpoint() else "checkpoint"
        raise PlanError(
            f"the engine's model isn't what build_model makes at widths {run.widths} ({error}); to go on from a "
            f"checkpoint, build it by build_model(**ds_sparkling.recorded_widths({asked})) and pass that checkpoint"
        ) from error
