"""Growth under accelerate, whose ``Accelerator.prepare`` makes the engine.

    accelerator = growing(Accelerator(deepspeed_plugin=plugin), build_model)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    for batch in loader:
        ds_sparkling.grow_if_due(model)
        ...

The growth happens inside the objects that ``prepare`` has returned, so nothing has to be swapped in the loop.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import DummyOptim, DummyScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import ds_sparkling
from ds_sparkling.discovery.build import BuildModel, require_factory
from ds_sparkling.discovery.forward import Inputs
from ds_sparkling.errors import ConfigError, UnsupportedError

_A = TypeVar("_A")


def growing(
    accelerator: _A,
    build_model: BuildModel,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    optimizer: Callable[..., Any] | None = None,
    model_parameters: Callable[..., Any] | None = None,
    inputs: Inputs | None = None,
) -> _A:
    """Let the engine grow that ``accelerator.prepare`` is going to make.

    Args:
        accelerator: an ``Accelerator`` with a DeepSpeed plugin, whose config has the ``"sparkling"`` block.
        build_model: ``build_model(**widths) -> nn.Module``; the model that is prepared must be what it makes.
        checkpoint: the directory that ``accelerator.load_state`` is going to load from, if it is; the model has to be
            built at the widths recorded there. Nothing is saved there: a checkpoint before a growth goes into the
            ``checkpoint_dir`` of the ``"sparkling"`` block, if it has one.
        optimizer: ``optimizer(params) -> torch.optim.Optimizer``, if an optimizer is prepared rather than a
            ``DummyOptim``.
        model_parameters: ``model_parameters(model) -> groups``, if the optimizer has several.
        inputs: to try growths with; as for :func:`ds_sparkling.adopt`.

    Returns:
        ``accelerator``; its ``prepare`` adopts the engine.

    Raises:
        UnsupportedError: if it doesn't run DeepSpeed.
        ConfigError: from ``prepare``, if a scheduler is prepared that a growth can't make anew; and what
            :func:`ds_sparkling.adopt` raises.
    """
    require_factory(build_model)
    held: Any = accelerator
    if held.state.deepspeed_plugin is None:
        raise UnsupportedError("only models that accelerate trains by DeepSpeed can grow; pass a deepspeed_plugin")
    prepare = held.prepare

    def prepare_growing(*args: Any, **kwargs: Any) -> Any:
        lr_scheduler = _scheduler_factory(args)
        prepared = prepare(*args, **kwargs)
        results = prepared if isinstance(prepared, tuple) else (prepared,)
        engines = [result for given, result in zip(args, results, strict=True) if isinstance(given, nn.Module)]
        if engines and any(isinstance(given, (Optimizer, DummyOptim)) for given in args):
            ds_sparkling.adopt(
                engines[0],
                build_model,
                checkpoint=checkpoint,
                optimizer=optimizer,
                lr_scheduler=lr_scheduler,
                model_parameters=model_parameters,
                inputs=inputs,
                on_growth=lambda engine: _point(results, engine),
                read_only=True,
            )
            _point(results, engines[0])
        return prepared

    held.prepare = prepare_growing
    return accelerator


def _scheduler_factory(prepared: Iterable[Any]) -> Callable[..., Any] | None:
    """The function that makes the engine's scheduler, among what is going to be prepared.

    Raises:
        ConfigError: if there is a scheduler that holds on to an optimizer which won't survive a growth.
    """
    for given in prepared:
        if isinstance(given, LRScheduler):
            raise ConfigError(
                f"a growth can't make this {type(given).__name__} anew: put the scheduler into the DeepSpeed config, "
                "or prepare a DummyScheduler(optimizer, lr_scheduler_callable=...)"
            )
        if isinstance(given, DummyScheduler) and given.lr_scheduler_callable is not None:
            made: Callable[..., Any] = given.lr_scheduler_callable
            return made
    return None


def _point(wrappers: Iterable[Any], engine: Any) -> None:
    """Let accelerate's wrappers of optimizer and scheduler wrap those that the engine has now."""
    for wrapper in wrappers:
        if isinstance(wrapper, AcceleratedOptimizer):
            wrapper.optimizer = engine.optimizer
        elif isinstance(wrapper, AcceleratedScheduler):
            wrapper.scheduler = engine.lr_scheduler
