"""Count the tokens and the compute that a run spends, as it spends them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ds_sparkling.engine.growing_run import run_of
from ds_sparkling.engine.hooks import until_unhooked
from ds_sparkling.engine.watch.step_callbacks import ForwardHook, MonitorEvent
from ds_sparkling.spec.record import Spent


class SpentMeter:
    """Counts the tokens of all training forward passes, and every ``log_every`` steps writes what has been spent.

    Tokens are the elements of ``input_ids``, or else of the first tensor of integers that the module is called with,
    padding included, taken to be as many on every rank. Modules that are called with no such tensor spend nothing that
    is known here.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine = engine
        self._seen = 0
        seeing = engine.module.register_forward_pre_hook(ForwardHook(self._see), with_kwargs=True)
        until_unhooked(engine, seeing.remove)

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            tokens = token_ids(args, kwargs)
            self._seen += 0 if tokens is None else tokens.numel()

    def before_step(self) -> None:
        """Nothing: what is spent is known after the forward passes."""

    def after_step(self) -> None:
        engine, run = self._engine, run_of(self._engine)
        tokens, self._seen = self._seen * engine.seq_dp_world_size, 0
        if not tokens:
            return
        active = run.parameters[1]
        # Steps that a checkpoint doesn't tell of are taken to have been like this one.
        before = run.spent or Spent().plus(tokens * (engine.global_steps - 1), active)
        run.observations.spent = before.plus(tokens, active)
        every = run.config.log_every
        if every and engine.global_steps % every == 0 and run.monitored:
            engine.monitor.write_events(spent_events(engine))


def token_ids(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The token ids among a module's inputs; None if there are none."""
    named = kwargs.get("input_ids")
    candidates = [named] if isinstance(named, Tensor) else tree_leaves((args, dict(kwargs)))
    integers = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.uint16)
    return next(
        (leaf for leaf in candidates if isinstance(leaf, Tensor) and leaf.dim() and leaf.dtype in integers), None
    )


def spent_events(engine: DeepSpeedEngine) -> list[MonitorEvent]:
    """What has been spent so far, for the monitors; nothing if nothing is known."""
    spent, samples = run_of(engine).spent, engine.global_samples
    if spent is None or not spent.tokens:
        return []
    return [("Train/tokens", float(spent.tokens), samples), ("Train/compute_flops", spent.flops, samples)]
