"""Finding a model's width axes by building it, on the meta device, with one width moved at a time.

The dimensions that move belong to the axis; by how much tells block and segments; the module's type tells the role.
What can't be told is an error that names the parameter, never a guess. The ancestor is mup's base and delta shapes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from ds_sparkling.axes import FIXED, Dim, ParamAxes, Role
from ds_sparkling.errors import PlanError

BuildModel = Callable[..., nn.Module]

#: Parameters that hold gate and up projections end to end, gate first.
_FUSED_GATE_UP = ("gate_up_proj",)
#: Parameters (or the linear maps they belong to) whose output gates another one's.
_GATES = ("gate_proj", "w1")


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
                "or as an attribute of model.config"
            )
        widths[axis] = width
    return widths


def build_on_meta(build_model: BuildModel, widths: Mapping[str, int]) -> nn.Module:
    """The model with ``widths``, without storage for its parameters.

    Raises:
        PlanError: if ``build_model`` doesn't take the axes by name or fails.
    """
    try:
        with torch.device("meta"):
            return build_model(**widths)
    except Exception as error:
        raise PlanError(f"build_model(**{dict(widths)}) failed: {type(error).__name__}: {error}") from error


def probe(build_model: BuildModel, widths: Mapping[str, int]) -> dict[str, ParamAxes]:
    """What every dimension of every parameter of the model is.

    Args:
        build_model: builds the model when called with the axis widths.
        widths: the widths to probe around, one per axis.

    Returns:
        name -> :class:`ParamAxes`, in the model's order, tied parameters once, under their first name.

    Raises:
        PlanError: names the parameter whose dimension can't be told.
    """
    model = build_on_meta(build_model, widths)
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    dims: dict[str, list[Dim]] = {name: [FIXED] * len(shape) for name, shape in shapes.items()}
    modules = dict(model.named_modules())
    for axis, width in widths.items():
        moved = build_on_meta(build_model, {**widths, axis: 2 * width})
        moved_shapes = {name: tuple(param.shape) for name, param in moved.named_parameters()}
        if moved_shapes.keys() != shapes.keys():
            raise PlanError(f"changing {axis} changes which parameters the model has; such an axis can't grow")
        _refuse_moving_buffers(model, moved, axis)
        if moved_shapes == shapes:
            raise PlanError(f"no parameter changes with {axis!r}: is it a width, and does build_model pass it on?")
        for name, shape in shapes.items():
            for position, (before, after) in enumerate(zip(shape, moved_shapes[name], strict=True)):
                if before == after:
                    continue
                if dims[name][position] is not FIXED:
                    raise PlanError(
                        f"{name}: dimension {position} changes with both {dims[name][position].axis} and {axis}"
                    )
                if after != 2 * before or before % width:
                    raise PlanError(
                        f"{name}: dimension {position} goes from {before} to {after} when {axis} goes from {width} to "
                        f"{2 * width}; only multiples of the width can grow"
                    )
                owner = modules[name.rpartition(".")[0]]
                dims[name][position] = _dim(name, owner, len(shape), position, axis, before // width)
    axes = {}
    for name, param_dims in dims.items():
        owner = modules[name.rpartition(".")[0]]
        axes[name] = ParamAxes(tuple(param_dims), stacked_experts=_stacks_experts(owner, len(param_dims)))
    return _with_tied_heads(model, axes)


def _dim(name: str, owner: nn.Module, ndim: int, position: int, axis: str, multiple: int) -> Dim:
    """The :class:`Dim` at ``position`` of a parameter that moves with ``axis``."""
    leaf = name.rpartition(".")[2]
    parent = name.split(".")[-2] if "." in name else ""
    role = _role(name, owner, ndim, position)
    if multiple == 1:
        alive = (0,) if role is Role.FAN_OUT and (leaf in _GATES or parent in _GATES) else ()
        return Dim(axis, role, alive=alive)
    if multiple == 2 and role is Role.FAN_OUT and (leaf in _FUSED_GATE_UP or parent in _FUSED_GATE_UP):
        return Dim(axis, role, segments=2, alive=(0,))
    raise PlanError(
        f"{name} ({type(owner).__name__}): dimension {position} is {multiple} times {axis}, which may be blocks, or "
        f"segments end to end or interleaved; known fused parameters are {', '.join(_FUSED_GATE_UP)}"
    )


def _role(name: str, owner: nn.Module, ndim: int, position: int) -> Role:
    if isinstance(owner, nn.Embedding):
        if position == 1:
            return Role.FAN_OUT
    elif isinstance(owner, nn.Linear) or (ndim == 2 and "router" in type(owner).__name__.lower()):
        return Role.FAN_IN if position == 1 else Role.FAN_OUT
    elif "norm" in type(owner).__name__.lower() and ndim == 1:
        if name.endswith("weight"):
            return Role.GAIN
    elif _stacks_experts(owner, ndim) and position > 0:
        return Role.FAN_OUT if position == 1 else Role.FAN_IN
    raise PlanError(
        f"{name}: can't tell the role of dimension {position} in a {type(owner).__name__}; known are nn.Linear, "
        "nn.Embedding, routers [experts, in], RMSNorm gains and stacked experts [experts, out, in]"
    )


def _stacks_experts(owner: nn.Module, ndim: int) -> bool:
    """Whether a parameter is taken for experts stacked as [experts, out, in]: 3-D, and of no module of torch's own."""
    return ndim == 3 and not type(owner).__module__.startswith("torch.nn")


def _refuse_moving_buffers(model: nn.Module, moved: nn.Module, axis: str) -> None:
    shapes = {name: buffer.shape for name, buffer in model.named_buffers()}
    for name, buffer in moved.named_buffers():
        if shapes.get(name) != buffer.shape:
            raise PlanError(f"buffer {name} changes its shape with {axis}; growing buffers isn't supported")


def _with_tied_heads(model: nn.Module, axes: dict[str, ParamAxes]) -> dict[str, ParamAxes]:
    """Mark the norm gain that feeds a head tied to the embedding: it takes the head's fan-in factor (App. D.1)."""
    modules = dict(model.named_modules())
    first_name = {id(param): name for name, param in model.named_parameters()}
    tied: dict[str, str] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if name == first_name[id(param)] or not axes[first_name[id(param)]].axes:
            continue
        owners = modules[first_name[id(param)].rpartition(".")[0]], modules[name.rpartition(".")[0]]
        if not (isinstance(owners[0], nn.Embedding) and isinstance(owners[1], nn.Linear)):
            raise PlanError(
                f"{name} shares its weight with {first_name[id(param)]}; only a linear head tied to the embedding "
                "can grow"
            )
        for axis in axes[first_name[id(param)]].axes:
            tied[axis] = name
    repeated = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    for axis, head in tied.items():
        gains = [
            name
            for name, param_axes in axes.items()
            if axis in param_axes.axes and param_axes.dims[0].role is Role.GAIN and not name.startswith(repeated)
        ]
        if len(gains) != 1:
            raise PlanError(
                f"{head} is tied to the embedding, so {axis}'s fan-in factor must go into the one norm before the "
                f"head; found {gains or 'none'} outside the repeated layers"
            )
        axes[gains[0]] = ParamAxes(axes[gains[0]].dims, head_gain=True)
    return axes
