"""Build a model from its widths, without storage."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ds_sparkling.discovery.one_rank import frames_of, missing_group, without_peers
from ds_sparkling.errors import ConfigError, PlanError, UnsupportedError
from ds_sparkling.spec.axes import ParamAxes
from ds_sparkling.spec.layers import LayerGrowth, renumbered, source_of

BuildModel = Callable[..., nn.Module]

#: Kinds of a function's parameters that have no name of their own.
_ANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
#: What fills a tensor at random, in place.
_DRAWING: frozenset[Callable[..., Any]] = frozenset(
    (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)
)


def require_factory(build_model: object) -> None:
    """Raise ConfigError for a ``build_model`` that doesn't build: a model, for instance, as DeepSpeed takes one."""
    if isinstance(build_model, nn.Module) or not callable(build_model):
        kind = type(build_model).__name__
        raise ConfigError(
            f"build_model must be a function that makes the model from its widths, because a growth has to make it "
            f"anew; got a {kind}: pass lambda **widths: {kind if isinstance(build_model, nn.Module) else 'Model'}"
            "(**widths), or whatever makes it"
        )


def base_widths(build_model: BuildModel, axes: Iterable[str], given: Mapping[str, int] | None) -> dict[str, int]:
    """The widths to start with: given ones, else ``build_model``'s defaults, else the built model's config.

    Raises:
        PlanError: if an axis has no width in any of these places.
    """
    widths = dict(given or {})
    missing = [axis for axis in axes if axis not in widths]
    if not missing:
        return widths
    parameters = inspect.signature(build_model).parameters
    config = None
    for axis in missing:
        default = parameters[axis].default if axis in parameters else None
        if isinstance(default, int):
            widths[axis] = default
            continue
        if config is None:
            config = getattr(build_on_meta(build_model, given or {}), "config", None)
        width = getattr(config, axis, None)
        if not isinstance(width, int):
            raise PlanError(
                f"no starting width is known for axis {axis!r}: give it in sparkling.widths, as build_model's default, "
                f"or as an attribute of model.config{names_known(build_model, config, axis)}"
            )
        widths[axis] = width
    return widths


def names_known(build_model: BuildModel, config: object, wrong: str) -> str:
    """What widths may be called, for an error about a name that means nothing: empty if nothing is known.

    Args:
        config: the built model's, if it has one.
        wrong: the name that was given, whose nearest are listed first.
    """
    parameters = inspect.signature(build_model).parameters.values()
    taken = [parameter.name for parameter in parameters if parameter.kind not in _ANY]
    settings = vars(config) if hasattr(config, "__dict__") else {}
    declared = [name for name, value in settings.items() if type(value) is int and not name.startswith("_")]
    declared += list(getattr(config, "attribute_map", {}))
    nearest = difflib.get_close_matches(wrong, [*taken, *declared], n=3)
    said = [f"; did you mean {' or '.join(map(repr, dict.fromkeys(nearest)))}?"] if nearest else []
    said += [f" build_model takes {', '.join(taken)}."] if taken else []
    said += [f" Numbers in model.config: {', '.join(sorted(set(declared) - set(nearest)))}."] if declared else []
    return "".join(said)


def _refuse_unknown_names(build_model: BuildModel, widths: Mapping[str, int]) -> None:
    """Raise PlanError if ``build_model`` doesn't take one of ``widths`` by name."""
    parameters = inspect.signature(build_model).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for axis in widths:
        if axis not in parameters or parameters[axis].kind is inspect.Parameter.POSITIONAL_ONLY:
            raise PlanError(f"build_model takes no {axis!r} by name{names_known(build_model, None, axis)}")


def build_on_meta(build_model: BuildModel, widths: Mapping[str, int]) -> nn.Module:
    """The model with ``widths``, without storage for its parameters.

    Raises:
        PlanError: if ``build_model`` doesn't take the axes by name or fails.
        UnsupportedError: if it needs other ranks, or makes what can't grow.
    """
    return build_alone(build_model, widths, "meta")


def build_alone(build_model: BuildModel, widths: Mapping[str, int], device: str) -> nn.Module:
    """The model with ``widths`` on ``device``, built without any other rank.

    Raises:
        As :func:`build_on_meta`.
    """
    _refuse_unknown_names(build_model, widths)
    try:
        with without_peers(), torch.device(device), _Undrawn():
            model = build_model(**widths)
    except Exception as error:
        _refuse_pipelines(type(frame.f_locals.get("self")) for frame in frames_of(error))
        if isinstance(error, UnsupportedError):
            raise
        raise PlanError(
            f"build_model(**{dict(widths)}) failed: {type(error).__name__}: {error}{missing_group(error)}"
        ) from error
    _refuse_pipelines([type(model)])
    _refuse_partitioned(model)
    return model


def _refuse_pipelines(kinds: Iterable[type]) -> None:
    """Raise UnsupportedError if one of these is DeepSpeed's PipelineModule, which is known by its name alone here."""
    if any(base.__name__ == "PipelineModule" for kind in kinds for base in kind.__mro__):
        raise UnsupportedError(
            "build_model makes a PipelineModule; pipeline parallelism can't be combined with growth yet"
        )


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that checkpoints hold. All others the model makes anew, by its widths, as after a restart."""
    saved = model.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter, and of every buffer that checkpoints hold."""
    return {name: tuple(held.shape) for name, held in (*model.named_parameters(), *saved_buffers(model).items())}


def described_tensors(model: nn.Module) -> dict[str, tuple[str, int]]:
    """What ranks have to agree on: every parameter and buffer, in words, and its place in the order they come in.

    A tensor that has two names has one place. Where places differ, one rank's collectives meet those of other tensors.
    """
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    places: dict[int, int] = {}
    return {
        name: (
            f"{'trained' if tensor.requires_grad else 'fixed'} {tensor.dtype} {tuple(tensor.shape)}",
            places.setdefault(id(tensor), len(places) + 1),
        )
        for name, tensor in tensors
    }


def _refuse_partitioned(model: nn.Module) -> None:
    """Raise UnsupportedError for parameters that are spread over ranks already, by what that has left on them."""
    for name, param in model.named_parameters():
        if hasattr(param, "ds_tensor"):
            raise UnsupportedError(
                f"build_model partitions {name} by deepspeed.zero.Init: leave that out, what is built is partitioned "
                "under ZeRO-3 without it"
            )
        if hasattr(param, "device_mesh"):
            raise UnsupportedError(
                f"build_model makes {name} a DTensor; tensor parallelism can't be combined with growth yet"
            )


class _Undrawn(TorchFunctionMode):
    """Draws nothing into tensors without storage, which torch takes longer for than for real ones."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        settings = kwargs or {}
        if func in _DRAWING:
            tensor: Tensor = args[0] if args else settings["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **settings)


def check_wide(
    build_model: BuildModel,
    axes: Mapping[str, ParamAxes],
    widths: Mapping[str, int],
    after: Mapping[str, int],
    layers: Sequence[LayerGrowth] = (),
) -> None:
    """See that ``build_model`` makes at its new widths what the axes say.

    Args:
        axes: of the model's parameters, and of its buffers that follow an axis.
        widths: those in force, of all axes.
        after: the axes that grow.
        layers: the lists of layers that get longer with them.

    Raises:
        PlanError: names a parameter or a buffer that would have another shape.
    """
    narrow, wide = build_on_meta(build_model, widths), {**widths, **after}
    shapes = shapes_of(narrow)
    planned = {name: axes[name].shape(shapes[name], wide) if name in axes else None for name in shapes}
    planned.update({name: shapes[name] for name in saved_buffers(narrow) if name not in axes})
    made = shapes_of(build_on_meta(build_model, wide))
    for name in renumbered([*planned], layers):
        if name not in made:
            raise PlanError(
                f"{name} would come from {source_of(name, layers)}, but build_model makes no such parameter or buffer "
                f"at {wide}; what shares its tensors with others has to share them after the growth, too"
            )
    for name, shape in made.items():
        found = planned.get(source_of(name, layers))
        if shape != found:
            raise PlanError(
                f"{name} would become {found}, but build_model makes it {shape} at {wide}; if its size "
                "follows from several widths, they have to grow together, by the same "
                f"ratio{by_one_ratio(widths, after)}"
            )


def by_one_ratio(widths: Mapping[str, int], after: Mapping[str, int]) -> str:
    """The widths that would grow by the same ratio as the one that grows most, for an error; empty if they do.

    Args:
        widths: those in force, of all axes.
        after: the axes that grow.
    """
    wide = {**widths, **after}
    most = max(after, key=lambda axis: Fraction(after[axis], widths[axis]))
    ratio = Fraction(after[most], widths[most])
    wanted = {axis: ratio * width for axis, width in widths.items() if ratio * width != wide[axis]}
    whole = [f"{axis} {int(width)}" for axis, width in wanted.items() if width.denominator == 1]
    return f": with {most} {after[most]} that is {', '.join(whole)}" if whole else ""
