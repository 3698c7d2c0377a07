"""Read and write what each rank holds of every parameter and its optimizer state, in any of DeepSpeed's optimizers.

What differs between these is in :mod:`ds_sparkling.engine.optimizers`.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import math
from collections.abc import Mapping

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from ds_sparkling.engine.optimizers import adapter_of
from ds_sparkling.engine.shard import Shard
from ds_sparkling.engine.stale_references import leave_word
from ds_sparkling.errors import GrowthError
from ds_sparkling.optim.step_counters import same_numbers


def shards(engine: DeepSpeedEngine) -> dict[str, Shard]:
    """This rank's shard of every parameter of ``engine``, in the module's order.

    Raises:
        UnsupportedError: if the base optimizer keeps state that is neither per element nor a number.
    """
    adapter = adapter_of(engine)
    found = {shard.name: shard for shard in itertools.chain(adapter.trained(), adapter.frozen())}
    return {name: found[name] for name in adapter.names.values()}


def group_names(engine: DeepSpeedEngine) -> list[frozenset[str]]:
    """Which parameters each parameter group of the base optimizer trains, by name."""
    adapter = adapter_of(engine)
    names = adapter.names
    members: list[set[str]] = [set() for _ in adapter.base.param_groups]
    for group, params in adapter.param_groups():
        members[group].update(names[id(param)] for param in params)
    return [frozenset(group) for group in members]


def master_groups(engine: DeepSpeedEngine) -> dict[Tensor, int]:
    """Every tensor that the base optimizer steps, in the order of DeepSpeed's, and the index of its parameter group."""
    adapter = adapter_of(engine)
    names = adapter.names
    groups = {names[id(param)]: group for group, params in adapter.param_groups() for param in params}
    return {shard.master: groups[shard.name] for shard in adapter.trained() if shard.master is not None}


def make_states(engine: DeepSpeedEngine, templates: Mapping[str, Shard], *, drop: bool) -> None:
    """Give the fresh ``engine``'s base optimizer state tensors like those of ``templates``, zeroed.

    Numbers (step counters) are copied, or zeroed if ``drop``.

    Args:
        templates: shards of the old engine by parameter name.

    Raises:
        GrowthError: if parameters that now share one flat tensor were at different steps.
    """
    adapter = adapter_of(engine)
    base = adapter.base
    by_master: dict[int, tuple[Tensor, list[str]]] = {}
    numels: dict[str, int] = {}
    for shard in adapter.trained():
        assert shard.master is not None
        by_master.setdefault(id(shard.master), (shard.master, []))[1].append(shard.name)
        numels[shard.name] = math.prod(shard.shape) if shard.piece.numel else 0
    for master, members in by_master.values():
        template = templates[members[0]]
        for name in members[1:]:
            if not same_numbers(template.scalars, templates[name].scalars):
                raise GrowthError(
                    f"{template.name} and {name} are at different optimizer steps ({template.scalars} and "
                    f"{templates[name].scalars}) but share one flat tensor after the growth"
                )
        if not template.states and not template.scalars and not template.wholes:
            continue
        state = base.state[master]
        for key, old in template.states.items():
            made = state.get(key)
            if not isinstance(made, Tensor) or made.shape != master.shape or made.dtype != old.dtype:
                state[key] = torch.zeros_like(master, dtype=old.dtype, requires_grad=False)
            else:
                made.zero_()
        for key, held in template.wholes.items():
            size = sum(numels[name] for name in members)
            state[key] = torch.zeros(size, dtype=held.dtype, device=held.device)
        for key, value in template.scalars.items():
            copied = value.to(_step_device(value, master), copy=True) if isinstance(value, Tensor) else value
            state[key] = copied * 0 if drop else copied


def strip(engine: DeepSpeedEngine) -> None:
    """Destroy ``engine`` and free its compute weights, gradients and buffers; shards taken before stay valid.

    The engine itself, its module, its optimizer and all parameters are left empty, and say so when they are used.
    """
    module, adapter = engine.module, adapter_of(engine)
    optimizer, base = adapter.optimizer, adapter.base
    adapter.keep_masters()
    engine.destroy()
    for name, param in list(module.named_parameters()):
        adapter.empty(param)
        if nn.Parameter in type(param).__mro__:  # not other classes of tensors that torch counts as parameters
            leave_word(param, f"parameter ({name})", "the grown engine's module's")
    for wrapper in {id(held): held for held in (optimizer, base)}.values():
        leave_word(wrapper, "optimizer", "engine.optimizer of the grown engine")
    leave_word(module, "model", "engine.module of the grown engine")
    leave_word(engine, "engine", "the one that grow() returned")
    release_memory()


def release_memory() -> None:
    """Give back what DeepSpeed's reference cycles, the accelerator's caches and the C heap hold on to."""
    gc.collect()
    get_accelerator().empty_cache()
    if torch.accelerator.is_available():
        torch.accelerator.empty_host_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps freed host memory otherwise
    if trim is not None:
        trim(0)


def _step_device(value: Tensor, master: Tensor) -> torch.device:
    """Where a number kept as a tensor belongs: with the master if it was, on the CPU if it was there."""
    return value.device if value.device.type == "cpu" else master.device
