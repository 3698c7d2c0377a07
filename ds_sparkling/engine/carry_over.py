"""Carry over what a grown engine takes from the old one besides parameters and optimizer state."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine

from ds_sparkling.discovery.build import saved_buffers
from ds_sparkling.engine.access import group_names
from ds_sparkling.engine.internals import COUNTERS
from ds_sparkling.engine.optimizers import adapter_of
from ds_sparkling.errors import GrowthError
from ds_sparkling.growth import GrowthPlan, grown_buffer
from ds_sparkling.optim.scheduler import regrouped_state


class Carried:
    """A snapshot of an engine's counters, schedule, loss scale, hyperparameters, buffers and modes."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.step: int = engine.global_steps
        self._counters = {name: getattr(engine, name) for name in COUNTERS if hasattr(engine, name)}
        self._step_state = adapter_of(engine).step_state()
        self._groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in adapter_of(engine).base.param_groups
        ]
        self._group_names = group_names(engine)
        self._schedule = None if engine.lr_scheduler is None else engine.lr_scheduler.state_dict()
        self._buffers = saved_buffers(engine.module)
        self._training = {name: module.training for name, module in engine.module.named_modules()}
        self._frozen = _frozen_names(engine)

    def check(self, engine: DeepSpeedEngine, plan: GrowthPlan) -> None:
        """Raise GrowthError if the fresh ``engine`` isn't built like the old one: groups, frozen parameters."""
        self._origins(engine, plan)
        frozen = frozenset(map(plan.source_of, _frozen_names(engine)))
        trained = {plan.source_of(name) for group in group_names(engine) for name in group}
        if frozen != self._frozen or frozen & trained:
            changed = sorted((frozen ^ self._frozen) | (frozen & trained))
            raise GrowthError(
                f"requires_grad of {changed[:3]} isn't what it was; freeze parameters inside build_model, so that the "
                "grown model has them frozen too"
            )

    @torch.no_grad()
    def restore(self, engine: DeepSpeedEngine, plan: GrowthPlan) -> None:
        """Put everything into the fresh ``engine``; buffers that follow an axis grow as planned.

        Raises:
            GrowthError: if a buffer isn't of the planned shape.
        """
        for name, value in self._counters.items():
            setattr(engine, name, value)
        adapter_of(engine).set_step_state(self._step_state)
        origins = self._origins(engine, plan)
        for group, origin in zip(adapter_of(engine).base.param_groups, origins, strict=True):
            group.update(self._groups[origin])
        if self._schedule is not None:
            engine.lr_scheduler.load_state_dict(regrouped_state(self._schedule, origins))
        for name, buffer in saved_buffers(engine.module).items():
            if plan.source_of(name) in self._buffers:
                grown = grown_buffer(plan, name, self._buffers[plan.source_of(name)])
                if grown.shape != buffer.shape:
                    raise GrowthError(
                        f"buffer {name} is {tuple(buffer.shape)} in the grown engine, planned was {tuple(grown.shape)}"
                    )
                buffer.copy_(grown)
        for name, module in engine.module.named_modules():
            module.training = self._training.get(plan.source_of(name), module.training)

    def _origins(self, engine: DeepSpeedEngine, plan: GrowthPlan) -> list[int]:
        """The old group that each of the fresh engine's groups has its settings from.

        DeepSpeed splits the experts' group by its number of elements, so a grown model may have more of them.

        Raises:
            GrowthError: if a group has parameters of old groups that were set differently.
        """
        origins: list[int] = []
        for names in (frozenset(map(plan.source_of, group)) for group in group_names(engine)):
            found = [index for index, old in enumerate(self._group_names) if names & old]
            known = frozenset().union(*(self._group_names[index] for index in found))
            alike = all(self._groups[index] == self._groups[found[0]] for index in found)
            if not alike or not names <= known or (len(found) > 1 and not self._groups[found[0]].get("moe")):
                raise GrowthError(
                    "the grown engine's parameter groups hold other parameters than before; build_model, optimizer and "
                    "model_parameters must make the same groups at every width"
                )
            # A group without trained parameters stands where it stood.
            origins.append(found[0] if found else min(len(origins), len(self._groups) - 1))
        return origins


def _frozen_names(engine: DeepSpeedEngine) -> frozenset[str]:
    return frozenset(name for name, param in engine.module.named_parameters() if not param.requires_grad)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Leave Python's, NumPy's, torch's and the accelerator's random state as they were."""
    accelerator: Any = get_accelerator()
    device_state = accelerator.get_rng_state() if accelerator.device_name() != "cpu" else None
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if device_state is not None:
            accelerator.set_rng_state(device_state)
