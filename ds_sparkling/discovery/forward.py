"""Run any language model on made-up tokens, and watch what comes out of it and of each of its modules."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from ds_sparkling.discovery.one_rank import frames_of, groups_made, missing_group, without_peers
from ds_sparkling.errors import PlanError

#: Made-up token ids: sequences, and tokens per sequence if nothing in the model asks for more.
SEQUENCES, LENGTH = 2, 16
#: Names of forward's parameters that take token ids, best first; then whichever comes first.
_TOKENS = ("input_ids", "tokens", "ids", "x")
#: Names of those that take what is to be predicted, and of those that a decoder behind an encoder reads.
_LABELS, _DECODED = ("labels", "targets"), "decoder_input_ids"

#: What a caller may give as a model's inputs: keyword arguments, positional ones, or the only one.
Inputs = Mapping[str, Any] | Sequence[Any] | Tensor


class NotRunnableError(PlanError):
    """A model can't be built or run here, so nothing is known about its function."""


@dataclass(frozen=True, eq=False)
class Call:
    """A forward pass: its arguments, and whether the model is in training mode."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    training: bool = False


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a forward pass gives.

    Attributes:
        tensors: every float tensor, by where it stands in the output.
        main: which one are the logits, or what comes nearest.
    """

    tensors: dict[str, Tensor]
    main: str

    @property
    def logits(self) -> Tensor:
        return self.tensors[self.main]


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


def token_calls(model: nn.Module, seed: int, length: int = LENGTH) -> Iterator[Call]:
    """Forward passes of ``model`` on random token ids [2, length] that it may take, the plainest first.

    The ids are also its labels if it can't do without, as encoder-decoders can't, which may read them in the decoder.

    Raises:
        NotRunnableError: if the model has no embedding, or its forward takes something else as well.
    """
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(_vocabulary(model), (SEQUENCES, length), generator=generator)
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
        elif parameter.name in _LABELS:
            kwargs[parameter.name] = ids_BT
        else:
            raise NotRunnableError(
                f"{_kind(model)}.forward needs {parameter.name!r}, and only token ids and labels can be made up; "
                "pass inputs"
            )
    positional = parameters[tokens].kind is inspect.Parameter.POSITIONAL_ONLY
    plain = Call((kwargs.pop(tokens),), kwargs) if positional else Call((), kwargs)
    yield plain
    if _DECODED in parameters:
        yield replace(plain, kwargs={**kwargs, _DECODED: ids_BT})


def with_labels(model: nn.Module, call: Call) -> Call:
    """``call`` with its token ids as labels, too; itself if it has labels, or the model takes none."""
    parameters = inspect.signature(model.forward).parameters
    label = next((name for name in _LABELS if name in parameters), None)
    ids = next((call.kwargs[name] for name in (_DECODED, *_TOKENS) if name in call.kwargs), next(iter(call.args), None))
    if label is None or label in call.kwargs or not isinstance(ids, Tensor) or ids.is_floating_point():
        return call
    return replace(call, kwargs={**call.kwargs, label: ids})


def _vocabulary(model: nn.Module) -> int:
    """How many token ids are sure to be valid."""
    tables = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    if not tables:
        raise NotRunnableError(f"{_kind(model)} has no nn.Embedding to take token ids; pass inputs")
    declared = getattr(getattr(model, "config", None), "vocab_size", None)
    return declared if isinstance(declared, int) and declared in tables else min(tables)


@torch.no_grad()
def run(model: nn.Module, call: Call, seed: int = 0) -> Outputs:
    """What the model gives; what it draws is drawn from ``seed``, and its buffers stay as they are.

    Raises:
        NotRunnableError: if the forward pass fails or gives no float tensor.
    """
    return _run(model, call, seed)


def leads_to_outputs(model: nn.Module, call: Call, compared: Collection[str], params: Sequence[nn.Parameter]) -> bool:
    """Whether a gradient gets from the outputs that are ``compared`` to any of some parameters.

    One that cancels out counts, as that of attention's keys' bias does; but not nothing at all, as of a loss that is
    still multiplied by 0.
    """
    # Gradients go through the collectives, too.
    with torch.enable_grad(), without_peers(), groups_made(model):
        tensors = [tensor for path, tensor in _run(model, call, 0).tensors.items() if path in compared]
        outputs = [_uneven_sum(tensor) for tensor in tensors if tensor.requires_grad]
        if not outputs:
            return False
        found = torch.autograd.grad(outputs, params, allow_unused=True)
    return any(gradient is not None and bool(gradient.any()) for gradient in found)


def _uneven_sum(tensor: Tensor) -> Tensor:
    """A sum in which nothing cancels out that adds up to 1, as probabilities do."""
    return (tensor.flatten() * torch.arange(1, tensor.numel() + 1).to(tensor).cos()).sum()


def _run(model: nn.Module, call: Call, seed: int) -> Outputs:
    device, dtype = _home(model)

    def fitted(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)

    args, kwargs = tuple(map(fitted, call.args)), {name: fitted(value) for name, value in call.kwargs.items()}
    try:
        with _mode_of(model, call.training), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            with without_peers(), groups_made(model):
                output = model(*args, **kwargs)
    except Exception as error:
        raise NotRunnableError(
            f"{_kind(model)}'s forward failed{_place_of(error, model)}: {type(error).__name__}: {error}"
            f"{missing_group(error)}"
        ) from error
    if not isinstance(output, (Tensor, Mapping, tuple, list)):
        output = getattr(output, "__dict__", output)
    found = dict(_float_tensors(output))
    if not found:
        raise NotRunnableError(f"{_kind(model)}'s forward gives no float tensor but {type(output).__name__}")
    ranked = [path for path, tensor in found.items() if tensor.dim() >= 2]
    return Outputs(found, "logits" if "logits" in found else (ranked or list(found))[0])


@contextmanager
def _mode_of(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in evaluation mode, or in training, where nothing is dropped and its buffers come back afterwards."""
    if not training:
        yield
        return
    owners = {id(owner): owner for owner in model.modules()}
    kept = [
        (owner, name, buffer, buffer.clone())
        for owner in owners.values()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]
    model.train()
    try:
        with _WithoutDropout():
            yield
    finally:
        model.eval()
        for owner, name, buffer, value in kept:
            # What was only read may be needed for gradients, as it is.
            owner._buffers[name] = buffer if torch.equal(buffer, value) else buffer.copy_(value)


#: Functions that give their first argument back where nothing is dropped.
_DROPPING: frozenset[Callable[..., Any]] = frozenset(
    (
        torch.dropout,
        torch.alpha_dropout,
        torch.feature_dropout,
        torch.feature_alpha_dropout,
        F.dropout,
        F.dropout1d,
        F.dropout2d,
        F.dropout3d,
        F.alpha_dropout,
        F.feature_alpha_dropout,
    )
)
#: Where attention takes its dropout by position.
_ATTENTION_DROPOUT = 4


class _WithoutDropout(TorchFunctionMode):
    """Training without what is dropped at random: two models of different widths can't drop the same."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        settings = dict(kwargs or {})
        if func in _DROPPING:
            return args[0] if args else settings["input"]
        if func is F.scaled_dot_product_attention:
            args, dropped = args[:_ATTENTION_DROPOUT], args[_ATTENTION_DROPOUT:]
            settings.update(zip(("dropout_p", "is_causal"), dropped, strict=False), dropout_p=0.0)
        if func is F.multi_head_attention_forward:
            settings["training"] = False
        return func(*args, **settings)


def watch(model: nn.Module, call: Call) -> tuple[list[Seen], Outputs]:
    """What every module but the root took and gave, in the order of time, and what the model gives.

    Raises:
        NotRunnableError: if the forward pass fails.
    """
    seen: list[Seen] = []
    calls: Counter[str] = Counter()

    def look(name: str, side: Side, value: Any) -> None:
        _, tensor = next(_float_tensors(value), ("", None))
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
        outputs = run(model, call)
    return seen, outputs


def difference(narrow: Tensor, wide: Tensor) -> float:
    """Largest absolute difference over the largest absolute value; of logits that grew, the old ones.

    Infinite if the shapes can't be compared or the wide model gives NaN.
    """
    if narrow.dim() != wide.dim() or any(a > b for a, b in zip(narrow.shape, wide.shape, strict=True)):
        return math.inf
    if not narrow.numel():
        return 0.0
    old = wide[tuple(slice(size) for size in narrow.shape)]
    largest = float((narrow - old).abs().max()) / max(float(narrow.abs().max()), torch.finfo(narrow.dtype).tiny)
    return largest if math.isfinite(largest) else math.inf


def _float_tensors(output: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every float tensor of an output, with the keys and numbers that lead to it."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield path, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from _float_tensors(value, f"{path}.{key}" if path else str(key))
    elif isinstance(output, (tuple, list)):
        for number, value in enumerate(output):
            yield from _float_tensors(value, f"{path}.{number}" if path else str(number))


def _place_of(error: BaseException, model: nn.Module) -> str:
    """The innermost module of the model that an error came from, in words; empty if it is the model itself."""
    names = {module: name for name, module in model.named_modules() if name}
    owners = (frame.f_locals.get("self") for frame in frames_of(error))
    inner = [owner for owner in owners if isinstance(owner, nn.Module) and owner in names]
    return f" in {names[inner[-1]]} ({_kind(inner[-1])})" if inner else ""


def _home(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    return parameter.device, parameter.dtype


def _kind(model: nn.Module) -> str:
    return type(model).__name__
