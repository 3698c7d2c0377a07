"""Running any language model on made-up tokens, and what comes out of each of its modules."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ds_sparkling.errors import PlanError
from ds_sparkling.probe import groups_made, missing_group, without_peers

#: Made-up token ids: sequences and tokens per sequence.
SHAPE = (2, 16)
#: Names of forward's parameters that take token ids, best first; then whichever comes first.
_TOKENS = ("input_ids", "tokens", "ids", "x")

#: What a caller may give as a model's inputs: keyword arguments, positional ones, or the only one.
Inputs = Mapping[str, Any] | Sequence[Any] | Tensor


class NotRunnableError(PlanError):
    """A model can't be built or run here, so nothing is known about its function."""


@dataclass(frozen=True)
class Call:
    """The arguments of a forward pass."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Side(str, Enum):
    """Which end of a module a tensor was seen at."""

    INPUT = "input"
    OUTPUT = "output"


@dataclass(frozen=True)
class Seen:
    """The first float tensor that a module took or gave.

    Attributes:
        module: its name.
        call: which of the module's calls it was, from 0.
        side: whether it was taken or given.
        value: a copy of it.
    """

    module: str
    call: int
    side: Side
    value: Tensor

    @property
    def key(self) -> tuple[str, int, Side]:
        return self.module, self.call, self.side


def given_call(inputs: Inputs) -> Call:
    """The forward pass that a caller's inputs stand for."""
    if isinstance(inputs, Mapping):
        return Call((), dict(inputs))
    if isinstance(inputs, Tensor):
        return Call((inputs,), {})
    return Call(tuple(inputs), {})


def token_call(model: nn.Module, seed: int) -> Call:
    """A forward pass of ``model`` on random token ids [2, 16], which are also its labels if it can't do without.

    Raises:
        NotRunnableError: if the model has no embedding, or its forward takes something else as well.
    """
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(_vocabulary(model), SHAPE, generator=generator)
    parameters = inspect.signature(model.forward).parameters
    named = [p for p in parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    tokens = next((name for name in _TOKENS if name in parameters), named[0].name if named else None)
    if tokens is None:
        raise NotRunnableError(f"{_kind(model)}.forward takes no token ids by name; pass inputs")
    kwargs: dict[str, Any] = {tokens: ids_BT}
    for parameter in named:
        if parameter.name == "use_cache":
            kwargs["use_cache"] = False
        elif parameter.name == tokens or parameter.default is not parameter.empty:
            continue
        elif parameter.name in ("labels", "targets"):
            kwargs[parameter.name] = ids_BT
        else:
            raise NotRunnableError(
                f"{_kind(model)}.forward needs {parameter.name!r}, and only token ids and labels can be made up; "
                "pass inputs"
            )
    if parameters[tokens].kind is inspect.Parameter.POSITIONAL_ONLY:
        return Call((kwargs.pop(tokens),), kwargs)
    return Call((), kwargs)


def _vocabulary(model: nn.Module) -> int:
    """How many token ids are sure to be valid."""
    tables = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    if not tables:
        raise NotRunnableError(f"{_kind(model)} has no nn.Embedding to take token ids; pass inputs")
    declared = getattr(getattr(model, "config", None), "vocab_size", None)
    return declared if isinstance(declared, int) and declared in tables else min(tables)


@torch.no_grad()
def run(model: nn.Module, call: Call) -> Tensor:
    """The model's logits, or what comes nearest: the first float tensor of its output, the largest rank preferred.

    Raises:
        NotRunnableError: if the forward pass fails or gives no float tensor.
    """
    device, dtype = _home(model)

    def fitted(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)

    args, kwargs = tuple(map(fitted, call.args)), {name: fitted(value) for name, value in call.kwargs.items()}
    try:
        with without_peers(), groups_made(model):
            output = model(*args, **kwargs)
    except Exception as error:
        raise NotRunnableError(
            f"{_kind(model)}'s forward failed: {type(error).__name__}: {error}{missing_group(error)}"
        ) from error
    logits = getattr(output, "logits", None)
    found = [logits] if isinstance(logits, Tensor) else list(_float_tensors(output))
    if not found:
        raise NotRunnableError(f"{_kind(model)}'s forward gives no float tensor but {type(output).__name__}")
    ranked = [tensor for tensor in found if tensor.dim() >= 2]
    return (ranked or found)[0].detach()


def watch(model: nn.Module, call: Call) -> tuple[list[Seen], Tensor]:
    """What every module but the root took and gave, in the order of time, and the logits.

    Raises:
        NotRunnableError: if the forward pass fails.
    """
    seen: list[Seen] = []
    calls: Counter[str] = Counter()

    def look(name: str, side: Side, value: Any) -> None:
        tensor = next(_float_tensors(value), None)
        if tensor is not None:
            # A copy, as residual connections may add to it in place.
            seen.append(Seen(name, calls[name], side, tensor.detach().clone()))
        if side is Side.OUTPUT:
            calls[name] += 1

    def hook(name: str, module: nn.Module) -> Iterator[RemovableHandle]:
        yield module.register_forward_pre_hook(
            lambda _module, args, kwargs: look(name, Side.INPUT, (args, kwargs)), with_kwargs=True
        )
        yield module.register_forward_hook(lambda _module, _args, output: look(name, Side.OUTPUT, output))

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            for handle in hook(name, module) if name else ():
                hooks.callback(handle.remove)
        logits = run(model, call)
    return seen, logits


def difference_between_runs(model: nn.Module, call: Call) -> float:
    """Largest difference of a model's logits between two runs, over the largest logit."""
    first, second = run(model, call), run(model, call)
    return float((first - second).abs().max()) / max(float(first.abs().max()), torch.finfo(first.dtype).tiny)


def _float_tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _float_tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _float_tensors(value)


def _home(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    return parameter.device, parameter.dtype


def _kind(model: nn.Module) -> str:
    return type(model).__name__
