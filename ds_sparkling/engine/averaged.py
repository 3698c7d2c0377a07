"""Averages of the weights (an EMA, SWA) that grow along with the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import overload

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from ds_sparkling.discovery.build import build_alone
from ds_sparkling.engine.carry_over import preserved_rng
from ds_sparkling.engine.growing_run import GrowingRun, run_of
from ds_sparkling.engine.hugging_face_build import built_plainly
from ds_sparkling.engine.logical_names import Logical, held_parameters
from ds_sparkling.engine.optimizers import adapter_of
from ds_sparkling.errors import GrowthError, PlanError
from ds_sparkling.growth import GrowthPlan, GrowthTables, Widener, grown_buffer

#: What averages like ``torch.optim.swa_utils.AveragedModel`` call the model that they hold.
_INNER = "module."


@overload
def grow_averaged(engine: DeepSpeedEngine, averaged: nn.Module) -> nn.Module: ...


@overload
def grow_averaged(engine: DeepSpeedEngine, averaged: Mapping[str, Tensor]) -> Mapping[str, Tensor]: ...


@torch.no_grad()
def grow_averaged(
    engine: DeepSpeedEngine, averaged: nn.Module | Mapping[str, Tensor]
) -> nn.Module | Mapping[str, Tensor]:
    """Grow an average of the weights as the engine's growths have grown the weights themselves.

    Of an average that equals the weights it makes the grown weights, bit for bit in float32. Local: ranks that hold no
    average needn't call it. Call it after every ``grow_if_due``: an average that has the engine's widths comes back as
    it is, and one that has missed several growths goes through them all.

    Args:
        engine: the engine after the growth.
        averaged: whole weights (not ZeRO-3's partitions) at widths that the engine has had since it was made: a module,
            which may be a wrapper that holds the model as ``module`` (``torch.optim.swa_utils.AveragedModel``), or a
            state dict. Stacked experts that AutoEP splits are either all of them or those that this rank holds.

    Returns:
        A wrapper itself, around a model made by ``build_model``; for any other module such a model; for a state dict a
        new one. Buffers are the average's own, grown if the plan grows them; where the model makes them anew by its
        widths, those of the engine's module.

    Raises:
        GrowthError: names the parameter that the average lacks, or that has no widths that the engine has had.
    """
    run, params, held = run_of(engine), dict(engine.module.named_parameters()), held_parameters(engine)
    if any(plan.layers for plan in run.plans):
        raise GrowthError("averages of the weights don't grow with the number of layers yet: start a new average")
    entries = dict(averaged.named_parameters()) if isinstance(averaged, nn.Module) else averaged
    prefix = _prefix(params, entries)
    weights = {name: entries[prefix + name].detach() for name in params}
    adapter = adapter_of(engine)
    if not _misfits({name: adapter.full_shape(param) for name, param in params.items()}, weights, held):
        return averaged
    missed = _missed(run, weights, held)
    tables = [GrowthTables(plan) for plan in missed]
    grown = {name: _grown(tables, held[name], weight) for name, weight in weights.items()}
    if not isinstance(averaged, nn.Module):
        own = {key.removeprefix(prefix): value for key, value in averaged.items()}
        return _state(engine, averaged, prefix, {**_buffers(engine, own, missed), **grown})
    inner = averaged.get_submodule(prefix.rstrip("."))
    wide = _rebuilt(run, inner, grown)
    for name, buffer in _buffers(engine, dict(inner.named_buffers()), missed).items():
        wide.get_buffer(name).data = buffer
    if inner is averaged:
        return wide
    averaged.module = wide
    return averaged


def _prefix(names: Iterable[str], entries: Mapping[str, Tensor]) -> str:
    """What stands before the engine's parameter names in those of the average."""
    for prefix in ("", _INNER):
        if all(prefix + name in entries for name in names):
            return prefix
    absent = [name for name in names if name not in entries]
    raise GrowthError(
        f"the average lacks {absent[:3]}; it must hold every parameter of engine.module by its name there, with or "
        f"without {_INNER!r} before it"
    )


def _misfits(
    shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor], held: Mapping[str, Logical]
) -> list[str]:
    """The weights that don't have their shape, of all experts or of this rank's."""
    return [
        name
        for name, shape in shapes.items()
        if tuple(weights[name].shape) not in (held[name].whole(shape), held[name].part(shape))
    ]


def _missed(run: GrowingRun, weights: Mapping[str, Tensor], held: Mapping[str, Logical]) -> Sequence[GrowthPlan]:
    """The growths that are between the weights and the engine."""
    misfits = [
        _misfits({name: plan.param(logical.name).before for name, logical in held.items()}, weights, held)
        for plan in run.plans
    ]
    if [] in misfits:
        return run.plans[misfits.index([]) :]
    nearest = min(misfits, key=len, default=[])
    named = f" ({nearest[0]} has shape {tuple(weights[nearest[0]].shape)})" if nearest else ""
    raise GrowthError(
        f"the average{named} isn't of any widths that this engine, now at {run.widths}, has had since it was made; "
        "pass whole weights, and load an average of the widths that the engine starts with"
    )


def _grown(growths: Sequence[GrowthTables], logical: Logical, weight: Tensor) -> Tensor:
    """One weight, grown as the engine's was; in float32 if its own type is narrower."""
    made = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for tables in growths:
        widener = Widener(tables.plan, logical.name, tables=tables)
        if tuple(made.shape) != widener.before:
            widener = Widener(tables.plan, logical.name, logical.stack, tables=tables)
        old, made = made.reshape(-1), torch.empty(widener.after, dtype=made.dtype, device=made.device)
        widener.weight(old, made.view(-1))
    return made.to(weight.dtype)


def _buffers(engine: DeepSpeedEngine, own: Mapping[str, Tensor], plans: Sequence[GrowthPlan]) -> dict[str, Tensor]:
    """The buffers of the engine's module that the average has, as they are after the growths."""
    found = {}
    for name, made in engine.module.named_buffers():
        if name in own:
            buffer = own[name].detach()
            for plan in plans:
                buffer = grown_buffer(plan, name, buffer)
            found[name] = (buffer if buffer.shape == made.shape else made.detach()).to(own[name], copy=True)
    return found


def _rebuilt(run: GrowingRun, old: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """The model at the widths in force, with ``weights`` and the modes of ``old``."""
    with preserved_rng(), built_plainly():
        wide = build_alone(run.build_model, run.widths, "cpu")
    trained = {name: param.requires_grad for name, param in old.named_parameters()}
    for name, param in wide.named_parameters():
        if name not in weights or tuple(param.shape) != tuple(weights[name].shape):
            raise PlanError(f"build_model makes {name} {tuple(param.shape)} at {run.widths}, which the engine has not")
        param.data = weights[name]
        param.requires_grad_(trained[name])
    modes = {name: module.training for name, module in old.named_modules()}
    for name, module in wide.named_modules():
        module.training = modes.get(name, module.training)
    return wide.to(next(iter(weights.values())).device)


def _state(
    engine: DeepSpeedEngine, averaged: Mapping[str, Tensor], prefix: str, grown: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state dict with what has grown, in its own order and under all of its names."""
    own = {id(param): name for name, param in engine.module.named_parameters()}
    names = {name: own[id(param)] for name, param in engine.module.named_parameters(remove_duplicate=False)}
    state = {}
    for key, value in averaged.items():
        name = key.removeprefix(prefix)
        state[key] = grown.get(names.get(name, name), value)
    return state
